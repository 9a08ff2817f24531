"""What this package does on a GPU at the paper's scale: `python -m companion.speed.gpu_evidence`,
in four parts.

    kernels   each Triton kernel against float64 (gpu_kernels.py)
    step      a JumpReLU training step beside a dense one (gpu_step.py)
    harvest   activations of a Gemma 2 9B with random weights (gpu_pipeline.py)
    run       harvest, training and evaluation as in notebook 02 (gpu_pipeline.py)

Notable here:
- the floor of a step is the encoder's matmul in bfloat16 and Adam's 24 bytes a weight, at rates
  measured on this device. Nothing that looks at every latent and trains every weight in float32 can
  be faster.
- ways to take a step run in turns on one state; a number is the median over turns. Parts are timed
  with a wait before and after each, so they add up to more than the step. On a CPU, memory is what
  the process has.
- the model's weights are made on the device: nothing is downloaded. Speed and memory are the real
  one's; FVU says nothing.
- a part is written when it is done, with the device's name, and not measured again for this device
  and these sizes.

FULL needs, by arithmetic: a GPU of 80 GB (weights, gradients and moments 11 GB; a dense step some
ten float32 arrays of [4096, 131072], 2 GB each; later the model, 18.5 GB), 64 GB of host memory, 4
GB for temporary files, and ten minutes of an H200.
"""

from __future__ import annotations

import argparse
import functools
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from rich.console import Console
from rich.table import Table

from jumprelu import kernels
from jumprelu.files import read_json, write_json, write_text

from ..rails.figures import MEASURED
from .gpu_clock import now
from .gpu_kernels import measure_kernels
from .gpu_pipeline import measure_harvest, measure_run, random_gemma
from .gpu_sizes import FULL, TINY, Size
from .gpu_step import measure_step

PARTS = {
    "kernels": measure_kernels,
    "step": measure_step,
    "harvest": measure_harvest,
    "run": measure_run,
}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; of driver, clocks and power limit what nvidia-smi says of the
    first GPU."""
    facts = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "triton": getattr(kernels.triton, "__version__", None),
    }
    wanted = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | dict(zip(wanted.split(","), said.partition("\n")[0].split(", "), strict=False))


def measure(
    parts: Sequence[str], size: Size, device: torch.device, folder: Path, again: bool = False
) -> bool:
    """Measure those of `parts` that `folder` does not have of this device and these sizes, and show
    all. One that fails stops no other, since a GPU may be there for minutes. Returns whether none
    did."""
    facts, path, succeeded, console = machine(device), folder / "gpu_evidence.json", True, Console()
    lm = functools.cache(lambda: random_gemma(size, device))
    for part in parts:
        csv, records = folder / f"gpu_{part}.csv", read_json(path) if path.exists() else {}
        there = records.get(part, {})
        if (
            again
            or not csv.exists()
            or (there.get("device"), there.get("size")) != (facts["device"], str(size))
        ):
            began = now(device)
            try:
                table, more = PARTS[part](size, device, lm)
            except Exception:
                succeeded = False
                console.print_exception()
                continue
            table.insert(0, "device", facts["device"])
            # Written before the record that vouches for it.
            write_text(csv, table.to_csv(index=False, float_format="%.6g"))
            record = facts | more | {"size": str(size), "seconds": round(now(device) - began, 1)}
            write_json(path, records | {part: record})
        table = pd.read_csv(csv).drop(columns="device")
        shown = Table(*table.columns, title=f"{part}: {facts['device']}")
        for row in table.astype(object).itertuples(index=False):
            shown.add_row(
                *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)
            )
        console.print(shown)
    return succeeded


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 if a part failed, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m companion.speed.gpu_evidence", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="some of the four, with commas (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--size",
        choices=("full", "tiny"),
        default="full",
        help="tiny runs anywhere (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=MEASURED, help="folder of the files (default: figures)"
    )
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    given = parser.parse_args(arguments)
    try:
        device, parts = torch.device(given.device), given.parts.split(",")
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(
                f"no part {', '.join(map(repr, unknown))}: expected some of {','.join(PARTS)}"
            )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "PyTorch sees no GPU: --device cpu --size tiny --out FOLDER runs the same code "
                "without one"
            )
        if device.type == "cpu" and (
            given.size == "full" or given.out.resolve() == MEASURED.resolve()
        ):
            raise ValueError(
                "a CPU gives no evidence of a GPU: give --size tiny, and --out with another "
                "folder than figures"
            )
        size = FULL if given.size == "full" else TINY
        return 0 if measure(parts, size, device, given.out, given.again) else 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
