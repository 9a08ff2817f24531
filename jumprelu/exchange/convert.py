"""An SAE from one library's files to another's: `python -m jumprelu convert SRC DST --to FORMAT`.

- DST appears whole or not at all: the copy is made beside it, read back and compared, and only then
  gets its name.
- activations are compared before θ and TopK cut, and then θ and k themselves: a pre-activation that
  rounding carries over its threshold is no difference between SAEs.
"""

import math
import shutil
import tempfile
from pathlib import Path

import torch

from ..sae import SAE
from .formats import examine, write

TOLERANCE = 1e-4
"""Largest relative difference of a copy that counts as rounding."""
PROBES = 64
"""Random inputs that a copy is compared on."""


@torch.no_grad()
def difference(one: SAE, two: SAE, seed: int = 0) -> dict[str, float]:
    """Largest relative difference of `two` from `one`, over random inputs: of encode (π, and θ) and
    of decode.

    Inputs are reconstructions from eight random latents a little over their thresholds, plus noise
    of a tenth of their norm. A row's difference is its norm over that of `one`'s row. Infinite
    where k differs. Raises ValueError for other sizes.
    """
    if (one.d_in, one.d_sae) != (two.d_in, two.d_sae):
        sizes = f"{one.d_in}, {one.d_sae} and {two.d_in}, {two.d_sae}"
        raise ValueError(f"SAEs of d_in, d_sae = {sizes} cannot be compared")
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randint(one.d_sae, (PROBES, min(8, one.d_sae)), generator=generator)
    size = one.threshold[latent] + one.threshold.mean() + one.b_dec.norm() / 8 + 0.1
    size = size * (1 + torch.rand(latent.shape, generator=generator))
    acts = torch.zeros(PROBES, one.d_sae).scatter(1, latent, size)
    x = one.decode(acts)
    noise = torch.randn(x.shape, generator=generator) / one.d_in**0.5
    x = x + 0.1 * x.norm(dim=-1, keepdim=True) * noise
    encode = _relative(one.preactivations(x), two.preactivations(x))
    encode = max(encode, _relative(one.threshold, two.threshold))
    decode = _relative(one.decode(acts), two.decode(acts))
    return {"encode": encode if one.k == two.k else math.inf, "decode": decode}


def _relative(one: torch.Tensor, two: torch.Tensor) -> float:
    size = one.norm(dim=-1)
    return float(((two - one).norm(dim=-1) / size.where(size > 0, 1)).max())


def convert(
    source: str | Path, target: str | Path, to: str, format: str | None = None
) -> list[str]:
    """Read the SAE in `source` (of `format`, recognised by default), write it to the folder
    `target`; returns a report, in lines.

    Raises FileExistsError where `target` has something in it, ValueError and FileNotFoundError as
    :func:`formats.examine` and :func:`formats.write` do, and ValueError for a copy that does not
    compute the same. `target` is untouched then.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} has something in it: give a new or empty folder")
    reading = examine(source, format)
    sae = reading.sae
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        notes = write(sae, made, to)
        found = difference(sae, examine(made, to).sae)
        if not max(found.values()) <= TOLERANCE:
            raise ValueError(
                f"the copy of {source} differs by {max(found.values()):.2g}, relative, from what "
                f"was read (at most {TOLERANCE:g} is rounding): not kept. Its weights may not be "
                "finite, or beyond float32"
            )
        made.chmod(0o755)  # mkdtemp makes 0700
        if target.exists():
            target.rmdir()
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    size = f"d_in {sae.d_in}, d_sae {sae.d_sae}" + (f", k {sae.k}" if sae.k else "")
    return [
        f"{source}: {reading.format}, {sae.origin.architecture}, {size}",
        *(f"  read: {note}" for note in reading.notes),
        f"{target}: {to}",
        *(f"  written: {note}" for note in notes),
        f"largest relative difference, read back: encode {found['encode']:.1e}, "
        f"decode {found['decode']:.1e}",
    ]
