"""SAEs in the files of other libraries: which there are, read into our form, and written so that
those libraries load them.

    jumprelu             cfg.json + sae.safetensors                        SAE.save
    saelens              cfg.json + sae_weights.safetensors                SAELens 6 and later
    dictionary_learning  config.json + ae.pt                               dictionary_learning
    sparsify             cfg.json + sae.safetensors                        EleutherAI's: TopK
    gemma_scope          params.npz or params.safetensors                  Lieberum et al. 2024
    llama_scope          hyperparams.json + checkpoints/final.safetensors  He et al. 2024; read only
    llamascopium         config.json + sae_weights.safetensors             its successor; read only

`ae.pt` is a pickle. It is opened with `weights_only=True`, which builds tensors and nothing else;
other pickles are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..sae import SAE, Transcoder, check_autoencoder
from . import gemma_scope, peers
from .parts import OURS, Parts, arrays, fold, kind_of, read_settings


class Reading(NamedTuple):
    """A file that was read. notes: what was folded, a line each."""

    sae: SAE
    format: str
    notes: tuple[str, ...]


def recognise(folder: str | Path) -> str:
    """Which of FORMATS `folder` has. Raises FileNotFoundError for none, ValueError for more than
    one."""
    folder = Path(folder)
    found = [name for name, each in FORMATS.items() if not _missing(folder, each)]
    if OURS in found and "sparsify" in found:  # files of the same names; only ours have a number
        mine = "format" in read_settings(folder / "cfg.json")
        found.remove("sparsify" if mine else OURS)
    if len(found) > 1:
        raise ValueError(f"{folder} looks like {' and '.join(found)}: say which with `format`")
    if not found:
        inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
        there = "no such folder" if inside is None else inside[:12]
        expected = "; ".join(f"{name}: {' and '.join(f.files)}" for name, f in FORMATS.items())
        raise FileNotFoundError(
            f"no SAE that can be read in {folder}: found {there}; expected one of {expected}"
        )
    return found[0]


def examine(folder: str | Path, format: str | None = None) -> Reading:
    """The SAE in `folder`, or in the folder of a file, and what was done to bring it into our form.

    format: one of FORMATS; found from the files by default. Atoms have norm 1 except for most TopK,
    see :func:`jumprelu.exchange.parts.fold`.

    Raises FileNotFoundError where there is none, ValueError for a damaged file, a pickle of more
    than tensors, or an SAE that our form cannot hold.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    format = format or recognise(folder)
    if missing := " and no ".join(_missing(folder, _format(format))):
        raise FileNotFoundError(f"{folder} has no {missing}, which a {format} SAE has")
    try:
        sae, notes = fold(FORMATS[format].read(folder))
    except KeyError as error:
        problem = "it is cut off, or of another version"
        raise ValueError(f"{folder} has no {error}, which a {format} SAE has: {problem}") from error
    return Reading(sae, format, notes)


def write(sae: SAE, folder: str | Path, format: str) -> tuple[str, ...]:
    """Write `sae` to `folder` for another library, in float32; returns what is different there, a
    line each.

    Raises ValueError, before anything is written, where the format cannot hold the SAE.
    """
    target, kind = _format(format), kind_of(sae)
    if target.write is None:
        able = ", ".join(name for name, each in FORMATS.items() if each.write)
        raise ValueError(f"{format} is only read: write one of {able}")
    if isinstance(sae, Transcoder):
        raise ValueError("a transcoder is no SAE: SAE.save and save_gemma_scope write it")
    if kind not in target.holds:
        others = ", ".join(name for name, each in FORMATS.items() if kind in each.holds)
        raise ValueError(f"{format} has no {kind} SAE: choose one of {others}")
    return target.write(sae, Path(folder))


def _missing(folder: Path, format: Format) -> list[str]:
    return [
        names
        for names in format.files
        if not any((folder / name).is_file() for name in names.split(" or "))
    ]


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _parts(sae: SAE) -> Parts:
    check_autoencoder(sae)
    return Parts(**arrays(sae), k=sae.k, origin=sae.origin)


def _write_ours(sae: SAE, folder: Path) -> tuple[str, ...]:
    sae.save(folder)
    return ()


def _write_gemma_scope(sae: SAE, folder: Path) -> tuple[str, ...]:
    gemma_scope.save_gemma_scope(sae, folder)
    return ()


class Format(NamedTuple):
    """A row of FORMATS."""

    files: tuple[str, ...]
    read: Callable[[Path], Parts]
    write: Callable[[SAE, Path], tuple[str, ...]] | None = None
    holds: tuple[str, ...] = ()
    """Which of :func:`jumprelu.exchange.parts.kind_of` it can be written with."""


FORMATS = {
    OURS: Format(
        ("cfg.json", "sae.safetensors"),
        lambda folder: _parts(SAE.load(folder)),
        _write_ours,
        ("relu", "jumprelu", "topk", "topk with thresholds"),
    ),
    "saelens": Format(
        ("cfg.json", "sae_weights.safetensors"),
        peers.read_saelens,
        peers.write_saelens,
        ("relu", "jumprelu", "topk"),
    ),
    "dictionary_learning": Format(
        ("config.json", "ae.pt"),
        peers.read_dictionary_learning,
        peers.write_dictionary_learning,
        ("relu", "jumprelu", "topk"),
    ),
    "sparsify": Format(
        ("cfg.json", "sae.safetensors"), peers.read_sparsify, peers.write_sparsify, ("topk",)
    ),
    "gemma_scope": Format(
        ("params.npz or params.safetensors",),
        lambda folder: _parts(gemma_scope.read(*gemma_scope.find(folder, gemma_scope.Wanted()))),
        _write_gemma_scope,
        ("relu", "jumprelu"),
    ),
    "llama_scope": Format(
        ("hyperparams.json", "checkpoints/final.safetensors"), peers.read_llama_scope
    ),
    "llamascopium": Format(("config.json", "sae_weights.safetensors"), peers.read_llamascopium),
}
"""Every format by name."""
