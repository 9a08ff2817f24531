"""Released SAEs: Gemma Scope and Gemma Scope 2, from the hub or from a copy on disk, in the form of
:class:`jumprelu.SAE`.

    layer_20/width_16k/average_l0_68/params.npz                       Gemma Scope; token embeddings: embedding/width_4k/…
    resid_post/layer_12_width_16k_l0_medium/params.safetensors        Gemma Scope 2, with a config.json beside it

Sources: Lieberum et al. 2024, Gemma Scope; for Gemma Scope 2 (McDougall et al. 2025) the public
documentation of its repositories and SAELens's table of them. Both run as f = π ⊙ H(π − θ)₊ on raw
activations, without subtracting b_dec.

Notable here:
- arrays are taken as released. Atoms have a norm near 1 but not exactly 1, unlike those that this
  package trains, and the input scale of training is not known: `input_scale` is 1, so θ and f are
  in units of the raw activations.
- sites have the names of :mod:`jumprelu.sites`: `attn_out` is the heads, concatenated, before the
  output projection. Two are not to be had there: `embedding`, a row of the embedding matrix before
  Gemma multiplies it by √d_model; and, for transcoders, `mlp_in`, the output of the norm before the
  MLP (Gemma Scope 2), or `mlp_in_before_gain`, the same without the norm's gain (Gemma Scope, whose
  authors folded the gain into the MLP: appendix "Language model technical details").
- a file is mapped, never unpickled, and goes array by array and 64 MiB at a time to its place, type
  and device. So an SAE of 1M latents (30 GB) is in memory once. Arrays of an .npz are checked
  against its checksums on the way.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..files import read_json, writing
from ..sae import CONFIG, SAE, WEIGHTS, Origin, Transcoder
from . import formats, hub

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
OPTIONAL = ("scaling_factor", "affine_skip_connection")
CANONICAL_L0 = 100
BLOCK_BYTES = 2**26

_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out", "transcoders": "transcoder"}
_HOOKS = {
    "output": "resid_post",
    "post_feedforward_layernorm.output": "mlp_out",
    "self_attn.o_proj.input": "attn_out",
    "pre_feedforward_layernorm.output": "transcoder",
}
_WORDS = ("small", "medium", "big")
_RELEASE = re.compile(
    r"gemma-scope-(?P<two>2-)?(?P<size>\d+[mb])-(?P<kind>pt|it)(-(?P<site>res|mlp|att|transcoders))?(?=/)"
)
_FIRST = re.compile(
    r"(layer_(?P<layer>\d+)|embedding)/width_(?P<width>\d+[km])/average_l0_(?P<l0>\d+)/params\.npz$"
)
_SECOND = re.compile(
    r"(?P<site>resid_post|mlp_out|attn_out|transcoder)(?P<all>_all)?/layer_(?P<layer>\d+)_width_"
    r"(?P<width>\d+[km])_l0_(?P<l0>small|medium|big)(_(?P<variant>\w+))?/params\.safetensors$"
)


# ---- which SAEs there are


class _Entry(NamedTuple):
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
    return f"{'embedding' if layer is None else f'layer_{layer}'}/width_{_width(width)}/average_l0_{round(l0)}"


def available(source: str | Path, *, revision: str | None = None) -> pd.DataFrame:
    """The SAEs of a release, one a row: site, layer, width, l0, variant, path.

    source: hub id or local folder, as for :func:`load_sae`. Embedding SAEs have no layer. l0: a
    number, or for Gemma Scope 2 a word; the numbers behind it differ by layer (small 10 to 20,
    medium 30 to 60, big 60 to 150). Cross-layer transcoders and crosscoders are left out. Raises
    FileNotFoundError if there is none; from the hub as :func:`jumprelu.exchange.hub.list_files`
    does.
    """
    root = _local(source)
    frame = pd.DataFrame(_entries(source, root, revision), columns=list(_Entry._fields))
    return frame.astype({"layer": "Int64"})


def _entries(source: str | Path, root: Path | None, revision: str | None) -> list[_Entry]:
    if root is None:
        prefix, paths = source, hub.list_files(str(source), revision)
    else:
        prefix = root.absolute().as_posix()
        paths = [path.relative_to(root).as_posix() for path in root.rglob("params.*")]
    found = [entry for path in paths if (entry := _parse(f"{prefix}/{path}", path)) is not None]
    if not found:
        raise FileNotFoundError(
            f"no SAE in {source}: expected files such as {path_for(20, '16k', 68)}/params.npz or "
            f"resid_post/layer_12_width_16k_l0_medium/params.safetensors, found {paths[:3] or 'none'}"
        )
    return sorted(found, key=lambda entry: entry.order)


def _parse(full: str, path: str) -> _Entry | None:
    """What the full path of a file, repository included, says of its SAE; None if it is not one."""
    if match := _SECOND.search(full):
        variant = " ".join(filter(None, ["all" if match["all"] else "", match["variant"]]))
        return _Entry(
            match["site"], int(match["layer"]), match["width"], match["l0"], variant, path
        )
    if match := _FIRST.search(full):
        release = _RELEASE.search(full)
        site = _SITES.get(release["site"]) if release else None
        layer = None if match["layer"] is None else int(match["layer"])
        return _Entry(
            "embedding" if layer is None else site,
            layer,
            match["width"],
            int(match["l0"]),
            "",
            path,
        )
    return None


def _choose(
    entries: list[_Entry], source: str | Path, l0: float | str | None, **wanted: Any
) -> _Entry:
    """The one SAE of `wanted` site, layer and width (None: must be the only one) whose L0 is `l0`
    or nearest to it."""
    given = {name: value for name, value in wanted.items() if value is not None}
    for name, value in given.items():
        there = dict.fromkeys(getattr(entry, name) for entry in entries)
        # a copy of a release whose folders do not tell the site is taken at the caller's word
        entries = [
            entry
            for entry in entries
            if getattr(entry, name) in ((value, None) if name == "site" else (value,))
        ]
        if not entries:
            raise FileNotFoundError(
                f"{source} has no SAE of {', '.join(f'{k} {v}' for k, v in given.items())}: for {name}, "
                f"there is {', '.join(map(str, there))}"
            )
    for name in wanted:
        there = dict.fromkeys(getattr(entry, name) for entry in entries)
        if len(there) > 1:
            raise ValueError(
                f"{source} has several SAEs: give {name}, one of {', '.join(map(str, there))}"
            )
    first = min(
        (entry.variant for entry in entries),
        key=lambda variant: (variant != "", variant != "all", variant),
    )
    entries = [entry for entry in entries if entry.variant == first]
    there = [entry.l0 for entry in entries]
    listed = ", ".join(map(str, there))
    if isinstance(there[0], str):
        word = l0 or ("medium" if len(there) > 1 else there[0])
        if word not in there:
            raise ValueError(f"L0 has names in {source}: give l0, one of {listed}, not {word!r}")
        return entries[there.index(word)]
    if isinstance(l0, str):
        raise ValueError(f"L0 has numbers in {source}: give l0, one of {listed}, not {l0!r}")
    target = CANONICAL_L0 if l0 is None else l0
    entry = min(entries, key=lambda entry: (abs(entry.l0 - target), -entry.l0))
    if l0 is not None and entry.l0 != l0:
        warnings.warn(
            f"{source} has no SAE with L0 {l0} there: taking {entry.l0}, the nearest of {listed}",
            stacklevel=4,
        )
    return entry


def _width(width: int | str) -> str:
    """16384 → "16k", 1048576 → "1m": thousands, rounded down; a label is left as it is."""
    if isinstance(width, int):
        return f"{width // 10**6}m" if width >= 10**6 else f"{width // 1000}k"
    if not re.fullmatch(r"\d+[km]", width.lower()):
        raise ValueError(
            f"width must be a number of latents such as 16384, or a label such as '16k' or '1m', got {width!r}"
        )
    return width.lower()


# ---- loading


def load_sae(
    source: str | Path,
    *,
    layer: int | None = None,
    site: str | None = None,
    width: int | str | None = None,
    l0: float | str | None = None,
    path: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> SAE:
    """Load an SAE: saved by this package or another (:mod:`jumprelu.exchange.formats`), or released
    in Gemma Scope or Gemma Scope 2.

        load_sae("my_sae")                                                       # a folder that SAE.save or a peer wrote
        load_sae("google/gemma-scope-9b-pt-res", layer=20, width="16k", l0=68)   # from the hub, kept in its cache
        load_sae("downloads/gemma-scope-9b-pt-res", layer=20, width="16k")       # a copy of a release, or of a part of it
        load_sae("downloads/params.npz", site="resid_post", layer=20)            # one file, or the folder that holds it

    layer, site, width ("16k" or 16384): which SAE of a release; what is not given must be the same
    for all that are left. site: resid_post, mlp_out, attn_out, transcoder or embedding. l0: the
    nearest there is, with a warning if it is another one; None is SAELens's canonical choice, the
    L0 nearest to 100 (of two as near, the higher). For Gemma Scope 2: "small", "medium" or "big",
    None is "medium" or the only one. path: a file of the release, as :func:`available` lists it, in
    place of all these. For a file whose path tells nothing, site and layer are remembered as given.
    revision: of the hub's repository. dtype: of all but θ, which stays float32.

    The result is a :class:`Transcoder` for site transcoder. `origin` says where the activations
    must come from.

    Raises FileNotFoundError where there is no such SAE, ValueError for an ambiguous choice or a
    damaged or foreign file (a pickle is never opened), and from the hub PermissionError or
    ConnectionError as :func:`jumprelu.lm.hub_access` says.
    """
    wanted = {"site": site, "layer": layer, "width": None if width is None else _width(width)}
    root = _local(source)
    if root is None:
        file, full = _from_hub(str(source), wanted, l0, path, revision)
    elif not (_is_ours(root) or _is_foreign(root)):
        file = _in_folder(root, wanted, l0, path)
        full = file.absolute().as_posix()
    elif any(value is not None for value in (*wanted.values(), l0, path)):
        raise ValueError(
            f"{source} holds one SAE, not a release: leave out layer, site, width, l0 and path"
        )
    elif _is_foreign(root):
        return formats.read(root).to(device, dtype)
    else:
        return SAE.load(root, device, dtype)
    try:
        arrays = _open(file)
        origin, kind = _origin(full, file, site, layer, "affine_skip_connection" in arrays)
        return _build(file, arrays, kind, origin, torch.device(device), dtype)
    except (zipfile.BadZipFile, zlib.error, SafetensorError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged or cut off ({error}): copy or download it again"
        ) from error


def _local(source: str | Path) -> Path | None:
    """`source` as a path, None if it is a hub id. Raises FileNotFoundError for what is neither."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(
            f"no SAE at {str(source)!r}: expected a folder that SAE.save wrote, Gemma Scope's params.npz or "
            "params.safetensors, a copy of a release, or a hub id such as google/gemma-scope-9b-pt-res"
        )
    return None


def _is_ours(root: Path) -> bool:
    """For jumprelu.sae: a folder of SAE.save, or a file of another kind, which it refuses."""
    if root.is_file():
        return root.suffix not in {".npz", ".safetensors"}
    return (root / CONFIG).exists() or (root / WEIGHTS).exists()


def _is_foreign(root: Path) -> bool:
    """Whether a folder has another library's files."""
    with suppress(FileNotFoundError):
        return root.is_dir() and formats.recognise(root) not in {formats.OURS, "gemma_scope"}
    return False


def _in_folder(
    root: Path, wanted: dict[str, Any], l0: float | str | None, path: str | None
) -> Path:
    if path is not None:
        if not (root / path).is_file():
            raise FileNotFoundError(
                f"{root} has no file {path}: jumprelu.exchange.gemma_scope.available lists what it has"
            )
        return root / path
    for file in (root, root / "params.npz", root / "params.safetensors"):
        if file.is_file():
            if entry := _parse(file.absolute().as_posix(), ""):
                _choose(
                    [entry], root, l0, **wanted
                )  # raises unless this is the SAE that is asked for
            return file
    return root / _choose(_entries(root, root, None), root, l0, **wanted).path


def _from_hub(
    repo: str,
    wanted: dict[str, Any],
    l0: float | str | None,
    path: str | None,
    revision: str | None,
) -> tuple[Path, str]:
    """The downloaded file, and its full name. A path that can be written down is asked for without
    a look at the list."""
    if path is None and isinstance(l0, int) and None not in (wanted["layer"], wanted["width"]):
        exact = f"{path_for(wanted['layer'], wanted['width'], l0)}/params.npz"
        site = _parse(f"{repo}/{exact}", exact).site
        if site is not None and wanted["site"] in (None, site):
            with suppress(FileNotFoundError):  # the list tells which there are
                return hub.fetch(repo, exact, revision), f"{repo}/{exact}"
    if path is None:
        path = _choose(_entries(repo, None, revision), repo, l0, **wanted).path
    return hub.fetch(repo, path, revision), f"{repo}/{path}"


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
    return Origin(
        model, site, layer, training={"released_as": full[release.start() :]} if release else None
    ), kind


def _build(
    file: Path,
    arrays: dict[str, _Array],
    kind: type[SAE],
    origin: Origin,
    device: torch.device,
    dtype: torch.dtype,
) -> SAE:
    """An SAE of `arrays`. Its parameters are made without memory, and take over the arrays one by
    one."""
    if len(arrays["W_enc"].shape) != 2:
        raise ValueError(
            f"{file} is not one SAE: W_enc has shape {arrays['W_enc'].shape}, expected [d_in, d_sae]. Cross-layer "
            "transcoders and crosscoders cannot be loaded"
        )
    scale = arrays.pop("scaling_factor", None)
    if scale is not None and math.prod(scale.shape) not in (1, arrays["W_enc"].shape[1]):
        raise ValueError(
            f"{file}: scaling_factor has shape {scale.shape}, expected one number, or one a latent"
        )
    if "affine_skip_connection" in arrays:
        arrays["W_skip"] = arrays.pop("affine_skip_connection")
    model = kind(
        **{name: torch.empty(array.shape, device="meta") for name, array in arrays.items()},
        origin=origin,
    )
    done = {}
    total = sum(4 * math.prod(array.shape) for array in arrays.values())
    with tqdm(
        total=total, desc="loading the SAE", unit="B", unit_scale=True, delay=3, leave=False
    ) as progress:
        for name, array in arrays.items():
            precise = torch.float32 if name == "threshold" else dtype
            done[name] = _read(array, device, precise, progress, by_column=name == "W_enc")
        if scale is not None:  # activations are multiplied by it when they are decoded
            done["W_dec"] *= _read(scale, device, dtype, progress).reshape(-1, 1)
    model.load_state_dict(done, assign=True)
    return model


# ---- files


class _Array(NamedTuple):
    """An array of a file, not read yet."""

    shape: tuple[int, ...]
    parts: Callable[[], Iterator[tuple[Any, torch.Tensor]]]
    """Its parts, one after the other: where each belongs, and the part."""


def _read(
    array: _Array, device: torch.device, dtype: torch.dtype, progress: tqdm, by_column: bool = False
) -> torch.Tensor:
    """The array in memory; by_column: with columns contiguous, as SAE keeps W_enc."""
    if by_column:
        target = torch.empty(array.shape[::-1], device=device, dtype=dtype).T
    else:
        target = torch.empty(array.shape, device=device, dtype=dtype)
    for place, part in array.parts():
        target[place].copy_(part)
        progress.update(4 * part.numel())
    return target


def _open(file: Path) -> dict[str, _Array]:
    """The arrays of a params file by their names in :data:`ARRAYS` and :data:`OPTIONAL`."""
    names = {name.lower(): name for name in (*ARRAYS, *OPTIONAL)}
    # safetensors with W_enc are of other libraries, which may mean them to be run in another way
    found = _open_npz(file) if file.suffix == ".npz" else _open_safetensors(file)
    if not {name.lower() for name in ARRAYS} <= set(found) <= set(names):
        raise ValueError(
            f"{file} is not a Gemma Scope SAE: expected the arrays {', '.join(ARRAYS)}, perhaps "
            f"{' and '.join(OPTIONAL)}, found {', '.join(found)}"
        )
    return {names[name]: array for name, array in found.items()}


def _rows(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Slices of the first axis, of at most BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (itemsize * math.prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _open_safetensors(file: Path) -> dict[str, _Array]:
    def parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in _rows(shape, 4):
            with safe_open(
                file, framework="pt"
            ) as f:  # opened anew, so that what was read need not stay in memory
                yield rows, f.get_slice(name)[rows]

    with safe_open(file, framework="pt") as f:
        shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (not a dictionary)
    return {
        name: _Array(shape, lambda name=name, shape=shape: parts(name, shape))
        for name, shape in shapes.items()
    }


def _open_npz(file: Path) -> dict[str, _Array]:
    """An .npz is a zip archive of .npy files: a header with shape and type, then the numbers. Names
    in lower case."""
    with zipfile.ZipFile(file) as archive:
        return {
            info.filename.removesuffix(".npy").lower(): _open_npy(file, archive, info)
            for info in archive.infolist()
        }


def _open_npy(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
    with archive.open(info) as f:
        try:
            headers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, transposed, dtype = headers[np.lib.format.read_magic(f)](f)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: {info.filename} is not a NumPy array") from error
        begin = f.tell()
    if dtype.kind != "f" or not dtype.isnative:
        raise ValueError(
            f"{file}: {info.filename} is of type {dtype}, expected floating-point numbers; a pickle is never opened"
        )
    shape = shape or (1,)
    stored = shape[::-1] if transposed else shape

    def mapped() -> Iterator[tuple[Any, torch.Tensor]]:
        with open(file, "rb") as f:
            f.seek(info.header_offset + 26)
            start = (
                info.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))
            )  # past file name and extra field
            f.seek(start)
            checksum = zlib.crc32(f.read(begin))
        row_bytes = dtype.itemsize * math.prod(stored[1:])
        for rows in _rows(stored, dtype.itemsize):
            offset, block_shape = (
                start + begin + rows.start * row_bytes,
                (rows.stop - rows.start, *stored[1:]),
            )
            block = np.memmap(
                file, dtype, "c", offset, block_shape
            )  # copy-on-write: what torch takes without a warning
            checksum = zlib.crc32(block, checksum)
            part = torch.from_numpy(block)
            yield ((..., rows), part.T) if transposed else (rows, part)
        if checksum != info.CRC:
            raise zipfile.BadZipFile(f"another checksum of {info.filename}")

    def unpacked() -> Iterator[tuple[Any, torch.Tensor]]:
        with zipfile.ZipFile(file) as archive, archive.open(info) as f:
            yield (
                ...,
                torch.from_numpy(np.lib.format.read_array(f, allow_pickle=False)).reshape(shape),
            )

    return _Array(shape, mapped if info.compress_type == zipfile.ZIP_STORED else unpacked)


def save_gemma_scope(model: SAE, folder: str | Path) -> Path:
    """Write `folder`/params.npz in Gemma Scope's layout, in float32 and not compressed; returns the
    path of the file.

    `folder / path_for(layer, width, l0)` makes it part of a tree that :func:`load_sae` and
    :func:`available` read. Raises ValueError for TopK, which the layout cannot express.
    """
    if model.k is not None:
        raise ValueError(
            "Gemma Scope's layout has no k: a TopK SAE cannot be written in it; use SAE.save"
        )
    tensors = {name: getattr(model, name) for name in ARRAYS}
    if getattr(model, "W_skip", None) is not None:
        tensors["affine_skip_connection"] = model.W_skip
    path = Path(folder) / "params.npz"
    with writing(path) as temporary, open(temporary, "wb") as f:
        np.savez(
            f,
            **{
                name: np.ascontiguousarray(tensor.detach().float().cpu().numpy())
                for name, tensor in tensors.items()
            },
        )
    return path
