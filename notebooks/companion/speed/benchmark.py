"""Speed beside other SAE libraries and beside the machine's own: `make benchmark`, or `python -m
companion.speed.benchmark --help`.

Notable here:
- all systems run in one process, in turns A B C A B C …, on the same batches with as many threads:
  a machine that slows down slows all of them. A number is the median over rounds, its spread the
  quartiles.
- a step is a whole training step of each system (`peers.py`), and ours is timed at a stated L0,
  because its cost depends on it.
- the floor is the encoder's matrix product alone, into memory that is there already: nothing that
  looks at every latent of every token can be faster. Five of them are what a training step costs
  where every product is dense (encode, decode, and the gradients: two of the decoder, one of the
  encoder).
- memory is measured in processes of their own, one for each row.

How good the SAEs of each system are is the other half: `quality.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from safetensors.torch import load_file

from jumprelu.files import write_json, write_tensors, write_text
from jumprelu.recipe import TrainConfig
from jumprelu.sparse import fast_dtype

from ..rails.figures import MEASURED
from .neighbour import neighbour_table
from .peers import DISTRIBUTIONS, Trainer, version
from .quality import OURS, SETTINGS, make_plan, quality_table, scan_settings, synthetic_activations
from .steptime import density_table, profile_step
from .trainers import (
    BASELINE,
    FLOOR,
    QUICK_SIZES,
    RUN_STEPS,
    SIZES,
    Pool,
    Size,
    System,
    encoder_product,
    make_trainer,
    pool_for,
    set_l0,
    systems,
    warmed,
)

# ---- ours


# ---- measuring


def interleaved(
    calls: dict[Any, Callable[[torch.Tensor], Any]],
    batches: Sequence[torch.Tensor],
    rounds: int,
    turn: int,
) -> dict[Any, list[float]]:
    """Seconds a call takes, one number a round: every round gives each of `calls` a turn of `turn`
    batches, the same for all."""
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for number in range(rounds):
        mine = [batches[(number * turn + i) % len(batches)] for i in range(turn)]
        for key, call in calls.items():
            began = time.perf_counter()
            for x in mine:
                call(x)
            seconds[key].append((time.perf_counter() - began) / turn)
    return seconds


def peak_rss() -> int:
    """Most bytes of memory that this process has had at a time."""
    import resource  # not on Windows, where the other columns can still be measured

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _steps_memory(row: System, size: Size, path: str, threads: int) -> float:
    """MiB that three training steps add to a process that has the libraries and the data; run in a
    process of its own."""
    torch.set_num_threads(threads)
    pool = Pool(load_file(path)["x"])
    tiny = Size(8, 32, 16, 2, "synthetic")
    # First loads what any first step loads.
    make_trainer(row, tiny, Pool(synthetic_activations(64, 8))).step(torch.randn(16, 8))
    if row.system == OURS:
        warmed(pool, size, row.architecture)  # what is read from disk counts as data
    pool.inputs  # noqa: B018 (touches all of it)
    with suppress(OSError):  # Linux: the peak begins here; elsewhere it may have been before
        Path("/proc/self/clear_refs").write_text("5")
    # Without it the steps would begin with memory that is free and yet counted.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    trainer = make_trainer(row, size, pool)
    for x in pool.x.split(size.batch)[:3]:
        trainer.step(x)
    return (peak_rss() - before) / 2**20


def peak_memory(rows: Sequence[System], size: Size, pool: Pool) -> dict[System, float]:
    """MiB of each of `rows`, see :func:`_steps_memory`."""
    # one process imports the libraries, each row is measured in a fresh child of it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["companion.speed.quality", "sae_lens", "dictionary_learning.trainers.top_k", "sparsify"]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, {"x": pool.x})
        found = {}
        for row in rows:
            with ProcessPoolExecutor(1, context) as child:
                found[row] = child.submit(
                    _steps_memory, row, size, str(path), torch.get_num_threads()
                ).result()
    return found


COLUMNS = (
    "task",
    "system",
    "architecture",
    "dtype",
    "data",
    "d_in",
    "d_sae",
    "batch",
    "l0",
    "entries",
    "tokens_per_s",
    "tokens_per_s_q1",
    "tokens_per_s_q3",
    "peak_mb",
    "ours_over_this",
    "times_floor1",
    "times_floor2",
    "error",
)


def speed_table(
    size: Size, pool: Pool, rounds: int, turn: int, memory: bool = True
) -> pd.DataFrame:
    """Training and inference of all systems at one size: COLUMNS, a row for each task and system.

    l0: active latents a token in the state timed; entries: those that a training step looks at
    (d_sae where it is dense); peak_mb: see :func:`_steps_memory`; ours_over_this: speed of BASELINE
    over the row's; times_floor1, times_floor2: the row's time over that of one and of five float32
    products. A system that cannot run has the reason in `error`, and no numbers.
    """
    batches = pool.x.split(size.batch)
    trainers: dict[System, Trainer] = {}
    known: dict[System, dict[str, Any]] = {row: row._asdict() for row in systems()}
    for row in known:
        try:
            trainer = make_trainer(row, size, pool)
            trainer.step(batches[0])
        except Exception as error:
            if row.system == OURS:
                raise
            # another library's failure is a result: it is shown, and the others go on
            known[row]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            trainers[row] = trainer
    with torch.no_grad():
        finished = {row: trainer.finish() for row, trainer in trainers.items()}
        for row, trainer in trainers.items():
            active = finished[row].sae.encode(batches[0]) > 0
            known[row] |= {
                "l0": active.sum(-1).float().mean().item(),
                "entries": trainer.entries(batches[0]),
            }
    floors = {
        System(FLOOR, "one product", dtype): encoder_product(size, dtype)
        for dtype in ("float32", "bfloat16")
    }
    seconds = {
        "train": interleaved(
            floors | {row: each.step for row, each in trainers.items()}, batches, rounds, turn
        )
    }
    with torch.no_grad():
        calls, fast = dict(floors), str(fast_dtype(torch.device("cpu")))[6:]
        for row in finished:
            # All SAEs are float32; ours look for what is active in the faster type.
            if row.dtype == "float32":
                searches = row.system == OURS and row.architecture != "topk"
                calls[row._replace(dtype=fast if searches else row.dtype)] = finished[
                    row
                ].reconstruct
        seconds["inference"] = interleaved(calls, batches, rounds, turn)
    used = (
        peak_memory([row for row in trainers if row.dtype == "float32"], size, pool)
        if memory
        else {}
    )
    five = {
        row._replace(architecture="five products"): [5 * each for each in seconds["train"][row]]
        for row in floors
    }
    seconds["train"] = five | seconds["train"]

    table = []
    for task, measured in seconds.items():
        # At inference it is in the faster type.
        baseline = next(row for row in measured if row[:2] == BASELINE[:2])
        one, ours = (
            statistics.median(measured[row]) for row in (System(FLOOR, "one product"), baseline)
        )
        for row in [*measured, *(row for row in known if "error" in known[row])]:
            facts = {
                "task": task,
                **size._asdict(),
                "l0": None,
                **row._asdict(),
                **known.get(row, {}),
            }
            if row in measured:
                q1, median, q3 = statistics.quantiles(measured[row], n=4, method="inclusive")
                facts |= {
                    "tokens_per_s": size.batch / median,
                    "tokens_per_s_q1": size.batch / q3,
                    "tokens_per_s_q3": size.batch / q1,
                    "ours_over_this": median / ours,
                    "times_floor1": median / one,
                    "times_floor2": median / (5 * one),
                }
            table.append(
                facts | ({"peak_mb": used.get(row)} if task == "train" else {"entries": None})
            )
    return pd.DataFrame(table).reindex(columns=COLUMNS)


# ---- ours alone

SHAPES, QUICK_SHAPES = ((1024, 512), (4096, 2048)), ((64, 32),)
"""(d_sae, batch) at which the time of a step is measured over the density of S."""
THRESHOLDS = (0.25, 0.16, 0.14, 0.12, 0.105, 0.09, 0.075, 0.06, 0.05)


def profile_table(pool: Pool, size: Size, batches: int = 6) -> pd.DataFrame:
    """:func:`profile_step` of our JumpReLU at `size`, with the search in each type, in the column
    `search`."""
    tables = []
    for search in ("float32", "bfloat16"):
        config = TrainConfig(
            d_sae=size.d_sae,
            steps=RUN_STEPS,
            batch_size=size.batch,
            bandwidth=size.bandwidth,
            lr=1e-9,
            encoder_dtype=search,
        )
        state = pool.state(config)
        x = pool.rows(batches * size.batch) / state.input_scale
        set_l0(state.trainee, x[:1024], size.l0)
        tables.append(profile_step(state, x.split(size.batch)).assign(search=search))
    return pd.concat(tables, ignore_index=True)


# ---- the command


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, threads, versions; a peer that is not installed has
    None."""
    model = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        model = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            model,
        )
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    known = {name: capabilities.get(name, False) for name in ("avx2", "avx512_bf16", "amx_bf16")}
    versions = {}
    for peer in DISTRIBUTIONS:
        try:
            versions[peer] = version(peer)
        except ModuleNotFoundError:
            versions[peer] = None
    return {
        "cpu": model,
        "cpu_features": [name for name, there in known.items() if there],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "peers": versions,
    }


def shown(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format="{:.4g}".format, na_rep="")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, float_format="%.5g"))
    print(f"wrote {path}")


def add_rows(path: Path, table: pd.DataFrame) -> None:
    """Write a table with the column `machine`, beside the rows of other machines that the file
    has."""
    others = pd.read_csv(path) if path.exists() else table[:0]
    write_csv(path, pd.concat([others[~others.machine.isin(table.machine)], table]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m companion.speed.benchmark", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--only",
        choices=("speed", "density", "neighbour", "quality", "scan"),
        help="one part, or other settings of the libraries (scan); default: all parts but scan",
    )
    parser.add_argument(
        "--rounds", type=int, default=8, help="turns of each system (default: %(default)s)"
    )
    parser.add_argument("--turn", type=int, default=2, help="steps a turn (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of every system (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="sizes of seconds, for a look at what it does"
    )
    parser.add_argument(
        "--out", type=Path, default=MEASURED, help="folder of the CSVs (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    facts = machine() | {"rounds": given.rounds, "turn": given.turn}
    sizes = QUICK_SIZES if given.quick else SIZES
    label = f"{given.threads} threads, {' '.join(facts['cpu_features'][-1:]) or 'no AVX2'}"
    if given.only in (None, "speed"):
        tables = [speed_table(size, pool_for(size), given.rounds, given.turn) for size in sizes]
        for size, table in zip(sizes, tables, strict=True):
            print(f"\n{size}, {given.threads} threads")
            print(shown(table.drop(columns=["data", "d_in", "d_sae", "batch"])))
        write_csv(given.out / "benchmark.csv", pd.concat(tables, ignore_index=True))
        write_csv(given.out / "benchmark_profile.csv", profile_table(pool_for(sizes[0]), sizes[0]))
        write_json(
            given.out / "benchmark.json", facts | {"sizes": [size._asdict() for size in sizes]}
        )
    if given.only in (None, "density"):
        pool, shapes = pool_for(sizes[0]), QUICK_SHAPES if given.quick else SHAPES
        table = pd.concat([density_table(pool, *shape, THRESHOLDS) for shape in shapes])
        add_rows(given.out / "benchmark_density.csv", table.assign(machine=label))
    if given.only in (None, "neighbour"):
        table = neighbour_table(sizes[0], given.threads, given.rounds)
        print("\n" + shown(table))
        add_rows(given.out / "benchmark_neighbour.csv", table.assign(machine=label))
    if given.only in (None, "quality", "scan"):
        scan = given.only == "scan"
        table = quality_table(make_plan(scan_settings() if scan else SETTINGS, given.quick))
        print("\n" + shown(table))
        write_csv(given.out / f"benchmark_{'scan' if scan else 'quality'}.csv", table)


if __name__ == "__main__":
    from .benchmark import (
        main as run,  # under its own name, which is part of the keys of what is kept
    )

    run()
