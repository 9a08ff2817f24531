"""How long a notebook takes: what this machine has measured, or a committed number scaled to it.

Notable here:
- a finished run leaves its seconds and memory in `timings.json` in the cache. Before the first one,
  the number committed in `notebooks/profiles/costs.json` stands for it, times how much slower or
  faster this machine trains an SAE than the one that it was measured on.
- that factor comes from a few real training steps, timed once per machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from jumprelu.activations import activations_from_tensor
from jumprelu.files import cache_root, read_json, write_json
from jumprelu.recipe import TrainConfig
from jumprelu.train import train

from .environment import environment, kernel_environment
from .profiles import Notebook
from .running import Cost

STEPS = 40
"""Of the training run that is timed, of the size of those in notebook 02: about five seconds on two
cores."""


def _committed(root: Path) -> Path:
    """{profile: {"calibration": seconds, "seconds": {notebook: seconds}}}, each of one machine."""
    return root / "notebooks/profiles/costs.json"


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def timed_training() -> float:
    """Seconds of `STEPS` steps of training on random activations: [8192, 256], d_sae 1024, batch
    512."""
    x = torch.randn(8192, 256, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(d_sae=1024, steps=STEPS, batch_size=512, lr=0.003)
    with tempfile.TemporaryDirectory() as folder:
        acts = activations_from_tensor(x, folder)
        began = time.perf_counter()
        train(acts, config, device="cpu")
        return time.perf_counter() - began


def calibration() -> float:
    """:func:`timed_training` on this machine: in a process with the threads of a kernel, once; then
    kept in the cache.

    Raises subprocess.CalledProcessError if that process fails.
    """
    path = cache_root() / "calibration.json"
    machine = f"{platform.node()}, {os.cpu_count()} cores, torch {torch.__version__}"
    known = _read(path)
    if machine not in known:
        code = f"from {__name__} import timed_training as timed; print(timed())"
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with environment(kernel_environment() | paths):
            command = [sys.executable, "-c", code]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        known[machine] = round(float(printed.split()[-1]), 2)
        write_json(path, known)
    return known[machine]


def expected_seconds(
    root: Path, profile: str, notebooks: Sequence[Notebook]
) -> dict[Notebook, float]:
    """Notebook → seconds that it will take here, of those of which something is known."""
    measured, committed = _read(_timings()), _read(_committed(root)).get(profile, {})
    found = {}
    for notebook in notebooks:
        if own := measured.get(f"{profile}/{notebook.name}"):
            found[notebook] = own["seconds"]
        elif notebook.name in committed.get("seconds", {}):
            # without the factor nothing is known, and that is no reason not to run
            with suppress(subprocess.CalledProcessError):
                factor = calibration() / committed["calibration"]
                found[notebook] = committed["seconds"][notebook.name] * factor
    return found


def _timings() -> Path:
    return cache_root() / "timings.json"


def keep_cost(profile: str, notebook: Notebook, cost: Cost) -> None:
    """Remember what a run took on this machine."""
    write_json(_timings(), _read(_timings()) | {f"{profile}/{notebook.name}": cost._asdict()})


def record_costs(root: Path, profile: str, notebooks: Sequence[Notebook]) -> Path:
    """Write what the runs of these notebooks took on this machine to the committed table of costs;
    returns its path.

    Raises FileNotFoundError if one has not run here: numbers of two machines do not go together.
    """
    measured = _read(_timings())
    missing = [n.name for n in notebooks if f"{profile}/{n.name}" not in measured]
    if missing:
        raise FileNotFoundError(
            f"no run of {', '.join(missing)} in the profile {profile} was timed on this machine: "
            f"first `make reproduce PROFILE={profile}`"
        )
    seconds = {n.name: round(measured[f"{profile}/{n.name}"]["seconds"]) for n in notebooks}
    costs = {"calibration": calibration(), "seconds": seconds}
    write_json(_committed(root), _read(_committed(root)) | {profile: costs})
    return _committed(root)
