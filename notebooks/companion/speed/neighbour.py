"""What a busy neighbour costs a training step, by how the threads of torch wait for each other.

A step's threads meet at the end of every operation. By default the ones that come first spin, which
takes the core away from the one that is waited for as soon as anything else runs. OpenMP reads how
to wait once, when torch is loaded, so each way is measured in a process of its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import pandas as pd
import torch

from jumprelu.recipe import TrainConfig
from jumprelu.state import train_step
from jumprelu.threads import PASSIVE_WAITING

from .quality import synthetic_activations
from .trainers import RUN_STEPS, Pool, Size, set_l0

WAYS: dict[str, dict[str, str]] = {
    "spin": {},
    "spin briefly": PASSIVE_WAITING,
    "sleep": PASSIVE_WAITING | {"GOMP_SPINCOUNT": "0"},
}
"""How threads wait: OpenMP's own default, what this package sets, and no spinning at all."""
NEIGHBOURS = {"nothing": None, "one busy process": "while True: pass"}
"""What else runs: a program for a process of its own."""


def answer_with_times(size: Size, threads: int) -> None:
    """Do a training step for every line of standard input, and print the seconds that it took."""
    torch.set_num_threads(threads)
    pool = Pool(synthetic_activations(2 * size.batch, size.d_in))
    config = TrainConfig(
        d_sae=size.d_sae,
        steps=RUN_STEPS,
        batch_size=size.batch,
        bandwidth=size.bandwidth,
        lr=1e-9,
    )
    state = pool.state(config)
    x = pool.x / state.input_scale
    set_l0(state.trainee, x[:1024], size.l0)
    batches = x.split(size.batch)
    for number, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        train_step(state, batches[number % len(batches)])
        print(time.perf_counter() - began, flush=True)


def neighbour_table(size: Size, threads: int, rounds: int = 8, steps: int = 3) -> pd.DataFrame:
    """Milliseconds of a JumpReLU step at `size`: columns waiting, neighbour, ms, q1, q3 (median and
    quartiles over `rounds`, each the mean of `steps` steps).

    All ways take turns, with a neighbour and without. The first step of each is not counted.
    Raises RuntimeError if a process that trains dies.
    """
    # torch comes first, so that importing this package changes nothing
    code = (
        f"import torch; from {__name__} import answer_with_times as answer; "
        "from companion.speed.trainers import Size; "
        f"answer({size!r}, {threads})"
    )
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    trainers = {
        way: subprocess.Popen(
            [sys.executable, "-c", code],
            env=inherited | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way, variables in WAYS.items()
    }

    def seconds(trainer: subprocess.Popen) -> float:
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        line = trainer.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that trains died, with exit code {trainer.wait()}")
        return float(line)

    measured = {(way, name): [] for name in NEIGHBOURS for way in WAYS}
    try:
        for trainer in trainers.values():
            seconds(trainer)
        for _ in range(rounds):
            for name, program in NEIGHBOURS.items():
                busy = program and subprocess.Popen([sys.executable, "-c", program])
                try:
                    for way, trainer in trainers.items():
                        times = [seconds(trainer) for _ in range(steps)]
                        measured[way, name].append(1e3 * statistics.mean(times))
                finally:
                    if busy:
                        busy.kill()
                        busy.wait()
    finally:
        for trainer in trainers.values():
            trainer.kill()
            trainer.communicate()
    rows = []
    for (way, name), times in measured.items():
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
        rows.append({"waiting": way, "neighbour": name, "ms": median, "q1": q1, "q3": q3})
    return pd.DataFrame(rows)
