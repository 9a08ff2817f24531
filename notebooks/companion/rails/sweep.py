"""Many SAEs trained and scored, in a process for each core, every run remembered by itself.

Notable here:
- a training step of a small SAE gains less from a second thread than two runs side by side do. So
  there is a process for each core, and each computes with one thread.
- a run is kept under its own configuration: sweeps that share runs share them, and a sweep that was
  interrupted or is extended computes what is missing.
- where the tasks of a sweep are worked on is a function that is passed in: the processes of this
  machine, one after another, or the jobs of a cluster (:mod:`companion.rails.cluster`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.activations import Activations
from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.metrics import Report
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE
from jumprelu.train import TrainResult

from .environment import WORKER, environment
from .jobs import Runner, Task, deal, make_job, work

Run = tuple[Activations, TrainConfig]


class Scored(NamedTuple):
    """A run of a sweep: what it was, how good its SAE is, and the folder with that SAE and its
    log."""

    site: str
    layer: int
    config: TrainConfig
    report: Report
    folder: Path

    def load(self) -> TrainResult:
        """The SAE and the log of its training."""
        return TrainResult(self.sae(), pd.read_csv(self.folder / "log.csv"))

    def sae(self) -> SAE:
        return SAE.load(self.folder)


def sweep(
    runs: Sequence[Run],
    lm: LM,
    tokens: Tokens,
    workers: int | None = None,
    run: Runner | None = None,
) -> list[Scored]:
    """Train a configuration on activations for each of `runs`, score each SAE on held-out `tokens`;
    in their order.

    A run that is there twice is computed once. workers: about how many tasks are worked on at once;
    default is one a core. run: who works on them, by default :func:`in_processes`, and
    :func:`in_turn` where the model is on a GPU, which is then shared by nobody;
    :func:`companion.rails.cluster.make_runner` makes one for a cluster.

    Raises what :func:`jumprelu.train` does, for the first run that fails, and what `run` does.
    Finished runs are kept: the same call goes on from there.
    """
    workers = workers or usable_cores()
    if run is None:
        on_cpu = lm.device.type == "cpu"
        run = functools.partial(in_processes, workers=workers) if on_cpu else in_turn
    jobs = [make_job(acts, config, lm, tokens) for acts, config in runs]
    missing = [job for job in jobs if not job.report.filled]
    if missing:
        tasks = deal(missing, workers)
        with tqdm(total=sum(map(len, tasks)), desc="SAEs", unit="run") as progress:
            run(tasks, lm, tokens, progress)
    return [
        Scored(acts.site, acts.layer, job.config, job.report.read(), job.folder)
        for (acts, _), job in zip(runs, jobs, strict=True)
    ]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turn(tasks: Sequence[Task], lm: LM, tokens: Tokens, progress: tqdm) -> None:
    """A :data:`Runner`: work on the tasks one after another, in this process."""
    for task in tasks:
        work(task, lm, tokens)
        progress.update(len(task))


# ---- worker processes

_shared: dict[str, LM | Tokens] = {}


def _start(lm: LM, tokens: Tokens) -> None:
    torch.set_num_threads(1)
    _shared.update(lm=lm, tokens=tokens)


def _work_on_shared(task: Task) -> int:
    work(task, **_shared)
    return len(task)


def in_processes(
    tasks: Sequence[Task], lm: LM, tokens: Tokens, progress: tqdm, workers: int | None = None
) -> None:
    """A :data:`Runner`: work on the tasks in processes of this machine, each with one thread.

    workers: at most so many processes; default is one a core.

    Raises RuntimeError if a worker dies, which means that memory ran out or that someone killed it.
    """
    # a server that has imported everything once, and whose copies are ready at once; a copy of this
    # very process would not do, because torch may refuse gradients in the copy of a process that
    # has computed some
    served = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if served else "spawn")
    if served:
        context.set_forkserver_preload([__name__])
    workers = workers or usable_cores()
    with environment(WORKER):  # read by server and workers as they start
        pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (lm, tokens))
        try:
            for done in as_completed([pool.submit(_work_on_shared, task) for task in tasks]):
                progress.update(done.result())
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died: memory ran out, or it was killed. Finished runs are kept; "
                f"call again, with fewer workers than {workers} if memory is short"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
