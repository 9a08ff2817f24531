"""One way to load an SAE, whoever wrote it."""

import re
from contextlib import suppress
from pathlib import Path

import torch

from ..sae import CONFIG, PICKLES, SAE, WEIGHTS
from . import formats, gemma_scope


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
    """Load an SAE: one that :meth:`SAE.save` or another library (:mod:`jumprelu.exchange.formats`)
    wrote, or one released in Gemma Scope or Gemma Scope 2.

        load_sae("my_sae")                                      # a folder of ours, or of a library
        load_sae("google/gemma-scope-9b-pt-res", layer=20, width="16k", l0=68)       # from the hub
        load_sae("downloads/gemma-scope-9b-pt-res", layer=20, width="16k")  # a copy of a release
        load_sae("downloads/params.npz", site="resid_post", layer=20)    # one file, or its folder

    layer, site, width ("16k" or 16384): which SAE of a release; what is not given must be the same
    for all that are left. site: resid_post, mlp_out, attn_out, transcoder or embedding. l0: the
    nearest there is, with a warning if it is another one; None is SAELens's canonical choice, the
    L0 nearest to 100 (of two as near, the higher). For Gemma Scope 2: "small", "medium" or "big",
    None is "medium" or the only one. path: a file of the release, as
    :func:`jumprelu.exchange.gemma_scope.available` lists it, in place of all these. For a file
    whose path tells nothing, site and layer are remembered as given. revision: of the hub's
    repository. dtype: of all but θ, which stays float32.

    The result is a :class:`jumprelu.sae.Transcoder` for site transcoder. `origin` says where the
    activations must come from.

    Raises FileNotFoundError where there is no such SAE, ValueError for an ambiguous choice or a
    damaged or foreign file (a pickle that holds more than tensors is never opened), and from the
    hub PermissionError or ConnectionError as :func:`jumprelu.hub_access` says.
    """
    label = None if width is None else gemma_scope.width_label(width)
    wanted = gemma_scope.Wanted(site, layer, label, l0, path)
    root = Path(source).expanduser()
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    if not root.exists() and not is_hub_id:
        raise FileNotFoundError(
            f"no SAE at {str(source)!r}: expected a folder that SAE.save or another library wrote, "
            "a file or a copy of Gemma Scope, or a hub id such as google/gemma-scope-9b-pt-res"
        )
    format = _format(root)
    if format is None:
        file, full = gemma_scope.find(source, wanted, revision)
        return gemma_scope.read(file, full, site, layer, device, dtype)
    if any(value is not None for value in wanted):
        raise ValueError(
            f"{source} holds one SAE, not a release: leave out layer, site, width, l0 and path"
        )
    if format == formats.OURS:
        return SAE.load(root, device, dtype)
    return formats.examine(root, format).sae.to(device, dtype)


def _format(root: Path) -> str | None:
    """What a folder, or a file in it, is to be read as; None: as Gemma Scope, from here or the
    hub."""
    folder = root.parent if root.is_file() else root
    with suppress(FileNotFoundError):
        found = formats.recognise(folder)
        if found != "gemma_scope" and (root == folder or root.name in formats.FORMATS[found].files):
            return found
    if root.suffix in PICKLES or (root / CONFIG).exists() or (root / WEIGHTS).exists():
        return formats.OURS  # whose reader says what is wrong
    return None
