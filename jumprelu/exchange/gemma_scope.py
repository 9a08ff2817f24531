"""Gemma Scope and Gemma Scope 2: which SAEs a release has, reading one, and writing the layout.

    layer_20/width_16k/average_l0_68/params.npz                   Gemma Scope
    resid_post/layer_12_width_16k_l0_medium/params.safetensors    Gemma Scope 2, with a config.json

Sources: Lieberum et al. 2024, Gemma Scope; for Gemma Scope 2 (McDougall et al. 2025) the public
documentation of its repositories and SAELens's table of them. Both run as f = π ⊙ H(π − θ)₊ on raw
activations, without subtracting b_dec.

- arrays are taken as released: atoms have a norm near 1 but not exactly 1, and `input_scale` is 1,
  because the scale of training is not known.
- sites have the names of :mod:`jumprelu.sites`, and `embedding`, a row of the embedding matrix
  before Gemma multiplies it by √d_model. Transcoders read `mlp_in` (Gemma Scope 2), or
  `mlp_in_before_gain` (Gemma Scope: appendix "Language model technical details").
- a file is never unpickled. Arrays are read one by one into their final place, type and device, so
  that no more than one of them is in memory twice. An .npz is checked against its checksums.
"""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..files import read_json, writing
from ..sae import SAE, Origin, Transcoder
from . import hub

if TYPE_CHECKING:
    import pandas as pd

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
OPTIONAL = ("scaling_factor", "affine_skip_connection")
FILES = ("params.npz", "params.safetensors")
CANONICAL_L0 = 100

_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "transcoders": "transcoder"}
_HOOKS = {
    "output": "resid_post",
    "post_feedforward_layernorm.output": "mlp_out",
    "self_attn.o_proj.input": "attn_out",
    "pre_feedforward_layernorm.output": "transcoder",
}
_WORDS = ("small", "medium", "big")
_RELEASE = re.compile(
    r"gemma-scope-(?P<two>2-)?(?P<size>\d+[mb])-(?P<kind>pt|it)"
    r"(-(?P<site>res|mlp|att|transcoders))?(?=/)"
)
_FIRST = re.compile(
    r"(layer_(?P<layer>\d+)|embedding)/width_(?P<width>\d+[km])/average_l0_(?P<l0>\d+)/params\.npz$"
)
_SECOND = re.compile(
    r"(?P<site>resid_post|mlp_out|attn_out|transcoder)(?P<all>_all)?/layer_(?P<layer>\d+)_width_"
    r"(?P<width>\d+[km])_l0_(?P<l0>small|medium|big)(_(?P<variant>\w+))?/params\.safetensors$"
)


# ---- which SAEs there are


class Wanted(NamedTuple):
    """What a caller says of an SAE of a release; None: nothing. width: a label such as "16k"."""

    site: str | None = None
    layer: int | None = None
    width: str | None = None
    l0: float | str | None = None
    path: str | None = None


class Entry(NamedTuple):
    """One SAE of a release, as its path describes it."""

    site: str | None
    layer: int | None
    width: str
    l0: int | str
    variant: str
    """Gemma Scope 2: "all" for the smaller suite at every layer, "affine" with a skip connection,
    "seed_1", …; else ""."""
    path: str

    @property
    def order(self) -> tuple:
        width = int(self.width[:-1]) * (1000 if self.width[-1] == "m" else 1)
        l0 = _WORDS.index(self.l0) if isinstance(self.l0, str) else self.l0
        return self.site or "", -1 if self.layer is None else self.layer, self.variant, width, l0


def path_for(layer: int | None, width: int | str, l0: float) -> str:
    """Gemma Scope's folder of an SAE: "layer_20/width_16k/average_l0_68"; width: 16384 or "16k".
    layer None: the embedding."""
    place = "embedding" if layer is None else f"layer_{layer}"
    return f"{place}/width_{width_label(width)}/average_l0_{round(l0)}"


def width_label(width: int | str) -> str:
    """16384 → "16k", 1048576 → "1m": thousands, rounded down; a label is left as it is."""
    if isinstance(width, int):
        return f"{width // 10**6}m" if width >= 10**6 else f"{width // 1000}k"
    if not re.fullmatch(r"\d+[km]", width.lower()):
        raise ValueError(f"width must be a number like 16384 or a label like '16k', got {width!r}")
    return width.lower()


def available(source: str | Path, *, revision: str | None = None) -> pd.DataFrame:
    """The SAEs of a release, one a row: site, layer, width, l0, variant, path.

    source: a local folder, or else a hub id. Embedding SAEs have no layer. l0: a number, or for
    Gemma Scope 2 a word; the numbers behind it differ by layer (small 10 to 20, medium 30 to 60,
    big 60 to 150). Cross-layer transcoders and crosscoders are left out. Raises FileNotFoundError
    if there is none; from the hub as :func:`jumprelu.exchange.hub.list_files` does.
    """
    import pandas as pd

    frame = pd.DataFrame(_entries(source, revision), columns=list(Entry._fields))
    return frame.astype({"layer": "Int64"})


def _entries(source: str | Path, revision: str | None = None) -> list[Entry]:
    root = Path(source).expanduser()
    if root.exists():
        prefix = root.absolute().as_posix()
        paths = [path.relative_to(root).as_posix() for path in root.rglob("params.*")]
    else:
        prefix, paths = source, hub.list_files(str(source), revision)
    found = [entry for path in paths if (entry := _parse(f"{prefix}/{path}", path)) is not None]
    if not found:
        raise FileNotFoundError(
            f"no SAE in {source}: expected files such as {path_for(20, '16k', 68)}/params.npz or "
            "resid_post/layer_12_width_16k_l0_medium/params.safetensors, found "
            f"{paths[:3] or 'none'}"
        )
    return sorted(found, key=lambda entry: entry.order)


def _parse(full: str, path: str) -> Entry | None:
    """What the full path of a file, repository included, says of its SAE; None if it is not one."""
    if match := _SECOND.search(full):
        variant = " ".join(filter(None, ["all" if match["all"] else "", match["variant"]]))
        return Entry(match["site"], int(match["layer"]), match["width"], match["l0"], variant, path)
    if match := _FIRST.search(full):
        if match["layer"] is None:
            return Entry("embedding", None, match["width"], int(match["l0"]), "", path)
        release = _RELEASE.search(full)
        site = _SITES.get(release["site"]) if release else None
        return Entry(site, int(match["layer"]), match["width"], int(match["l0"]), "", path)
    return None


def _choose(entries: list[Entry], source: str | Path, wanted: Wanted) -> Entry:
    """The one SAE of the wanted site, layer and width whose L0 is the wanted one or nearest to it.
    What is not wanted must be the same for all that are left."""
    names = ("site", "layer", "width")
    given = {name: value for name in names if (value := getattr(wanted, name)) is not None}
    for name, value in given.items():
        there = _listed(entries, name)
        # a copy of a release whose folders do not tell the site is taken at the caller's word
        accepted = (value, None) if name == "site" else (value,)
        entries = [entry for entry in entries if getattr(entry, name) in accepted]
        if not entries:
            asked = ", ".join(f"{name} {value}" for name, value in given.items())
            raise FileNotFoundError(f"{source} has no SAE of {asked}: for {name}, there is {there}")
    for name in names:
        if "," in (there := _listed(entries, name)):
            raise ValueError(f"{source} has several SAEs: give {name}, one of {there}")
    # first the plain ones, then those of the suite at every layer, then other variants
    variants = {entry.variant for entry in entries}
    first = min(variants, key=lambda variant: (variant != "", variant != "all", variant))
    entries = [entry for entry in entries if entry.variant == first]
    l0s, listed, l0 = [entry.l0 for entry in entries], _listed(entries, "l0"), wanted.l0
    if isinstance(l0s[0], str):
        word = l0 or ("medium" if len(l0s) > 1 else l0s[0])
        if word not in l0s:
            raise ValueError(f"L0 has names in {source}: give l0, one of {listed}, not {word!r}")
        return entries[l0s.index(word)]
    if isinstance(l0, str):
        raise ValueError(f"L0 has numbers in {source}: give l0, one of {listed}, not {l0!r}")
    target = CANONICAL_L0 if l0 is None else l0
    entry = min(entries, key=lambda entry: (abs(entry.l0 - target), -entry.l0))
    if l0 not in (None, entry.l0):
        warnings.warn(
            f"{source} has no SAE with L0 {l0} there: taking {entry.l0}, the nearest of {listed}",
            stacklevel=4,
        )
    return entry


def _listed(entries: list[Entry], name: str) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(getattr(e, name) for e in entries))


def find(source: str | Path, wanted: Wanted, revision: str | None = None) -> tuple[Path, str]:
    """The file of an SAE, and its full name, which tells what the SAE is.

    source: a file, the folder that holds it, a copy of a release, or a hub id, from which it is
    downloaded. Raises FileNotFoundError, ValueError for an ambiguous choice, and from the hub as
    :func:`jumprelu.hub_access` says.
    """
    root = Path(source).expanduser()
    if not root.exists():
        path = wanted.path or _guess(str(source), wanted, revision)
        path = path or _choose(_entries(source, revision), source, wanted).path
        return hub.fetch(str(source), path, revision), f"{source}/{path}"
    files = [file for file in (root, *(root / name for name in FILES)) if file.is_file()]
    if wanted.path is not None:
        file = root / wanted.path
        if not file.is_file():
            raise FileNotFoundError(f"{root} has no file {wanted.path}: see available(...)")
    elif files:
        file = files[0]
        if entry := _parse(file.absolute().as_posix(), ""):
            _choose([entry], root, wanted)  # raises unless this is the SAE that is asked for
    else:
        file = root / _choose(_entries(root), root, wanted).path
    return file, file.absolute().as_posix()


def _guess(repo: str, wanted: Wanted, revision: str | None) -> str | None:
    """The path of an SAE of Gemma Scope where all that it is made of is given, which spares a look
    at the list of files; None where it is not, or there is no such file."""
    if not isinstance(wanted.l0, int) or None in (wanted.layer, wanted.width):
        return None
    path = f"{path_for(wanted.layer, wanted.width, wanted.l0)}/params.npz"
    site = _parse(f"{repo}/{path}", path).site
    if site is None or wanted.site not in (None, site):
        return None
    with suppress(FileNotFoundError):
        hub.fetch(repo, path, revision)
        return path
    return None


# ---- reading


def read(
    file: Path,
    full: str,
    site: str | None = None,
    layer: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """The SAE, or transcoder, in a params file whose full name is `full`; site, layer: what is
    known where the name tells nothing.

    Raises ValueError for a damaged or foreign file, or one of another site or layer.
    """
    done = {}
    try:
        found = tqdm(_arrays(file), desc="loading the SAE", unit="array", delay=3, leave=False)
        for name, array in found:
            shape = array.shape[::-1] if name == "W_enc" else array.shape
            kept = torch.float32 if name == "threshold" else dtype
            target = torch.empty(shape, device=device, dtype=kept)
            # W_enc is in memory latent by latent, as SAE keeps it
            done[name] = (target.T if name == "W_enc" else target).copy_(array)
    except (zipfile.BadZipFile, zlib.error, SafetensorError, EOFError) as error:
        raise ValueError(f"{file} is damaged or cut off ({error}): copy it again") from error
    if "scaling_factor" in done:  # activations are multiplied by it when they are decoded
        factor = done.pop("scaling_factor")
        if factor.numel() not in (1, len(done["W_dec"])):
            shape = tuple(factor.shape)
            raise ValueError(
                f"{file}: scaling_factor has shape {shape}, expected one or one a latent"
            )
        done["W_dec"] *= factor.reshape(-1, 1)
    if "affine_skip_connection" in done:
        done["W_skip"] = done.pop("affine_skip_connection")
    origin, kind = _origin(full, file, site, layer, "W_skip" in done)
    # made without memory, then given the arrays, which are not copied again
    empty = {name: torch.empty(array.shape, device="meta") for name, array in done.items()}
    sae = kind(**empty, origin=origin)
    sae.load_state_dict(done, assign=True)
    return sae


def _arrays(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The arrays of a params file one after the other, by their names in :data:`ARRAYS` and
    :data:`OPTIONAL`."""
    zipped = file.suffix == ".npz"
    with ExitStack() as stack:
        if zipped:  # opened here, because np.load leaves what is no archive open
            f = np.load(stack.enter_context(open(file, "rb")), allow_pickle=False)
        else:
            f = stack.enter_context(safe_open(file, framework="pt"))
        # safetensors with W_enc, not w_enc, are of other libraries, and may be meant otherwise
        found = {name.lower() if zipped else name: name for name in f.keys()}  # noqa: SIM118
        needed = {name.lower() for name in ARRAYS}
        if not needed <= set(found) <= needed | set(OPTIONAL):
            raise ValueError(
                f"{file} is not a Gemma Scope SAE: expected the arrays {', '.join(ARRAYS)}, "
                f"perhaps {' and '.join(OPTIONAL)}, found {', '.join(found)}"
            )
        for name in (*ARRAYS, *OPTIONAL):
            if name.lower() not in found:
                continue
            array = f[found[name.lower()]] if zipped else f.get_tensor(name.lower())
            if isinstance(array, bytes):
                raise ValueError(f"{file}: {name} is not an array")
            tensor = torch.as_tensor(array)
            if not tensor.is_floating_point():
                raise ValueError(f"{file}: {name} is {tensor.dtype}, expected floating point")
            if name == "W_enc" and tensor.ndim != 2:
                raise ValueError(
                    f"{file} is not one SAE: W_enc has shape {tuple(tensor.shape)}, expected "
                    "[d_in, d_sae]. Cross-layer transcoders and crosscoders cannot be loaded"
                )
            yield name, tensor


def _origin(
    full: str, file: Path, site: str | None, layer: int | None, has_skip: bool
) -> tuple[Origin, type[SAE]]:
    """Origin and class, by the names in the full path, else by config.json, else as the caller
    says."""
    entry, release, model = _parse(full, full), _RELEASE.search(full), None
    if release:
        model = f"google/gemma-{3 if release['two'] else 2}-{release['size']}"
        if release["kind"] == "it" or (release["two"] and release["size"] != "270m"):
            model += f"-{release['kind']}"
    known = {"site": entry.site, "layer": entry.layer} if entry else {}
    second = file.suffix == ".safetensors"
    if not entry and second and file.with_name("config.json").exists():
        config = read_json(file.with_name("config.json"))
        model = model or config.get("model_name")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", config.get("hf_hook_point_in", "")):
            known = {"site": _HOOKS.get(match[2]), "layer": int(match[1])}
    for name, given in (("site", site), ("layer", layer)):
        if None not in (given, known.get(name)) and given != known[name]:
            raise ValueError(f"{file} is of {name} {known[name]}, not {given}")
    site, layer = known.get("site") or site, known.get("layer", layer)
    kind = Transcoder if has_skip or site == "transcoder" else SAE
    if kind is Transcoder and site in (None, "transcoder"):
        site = "mlp_in" if second else "mlp_in_before_gain"
    training = {"released_as": full[release.start() :]} if release else None
    return Origin(model, site, layer, training=training), kind


# ---- writing


def save_gemma_scope(sae: SAE, folder: str | Path) -> Path:
    """Write `folder`/params.npz in Gemma Scope's layout, in float32 and not compressed; returns the
    path of the file.

    `folder / path_for(layer, width, l0)` makes it part of a tree that :func:`jumprelu.load_sae` and
    :func:`available` read. Raises ValueError for TopK, which the layout cannot express.
    """
    if sae.k is not None:
        raise ValueError("Gemma Scope's layout has no k for a TopK SAE: use SAE.save")
    tensors = {name: getattr(sae, name) for name in ARRAYS}
    if getattr(sae, "W_skip", None) is not None:
        tensors["affine_skip_connection"] = sae.W_skip
    arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}
    path = Path(folder) / "params.npz"
    with writing(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return path
