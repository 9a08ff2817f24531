"""Many SAEs trained and scored, in a process for each core, every run remembered by itself.

Notable here:
- a training step of a small SAE gains less from a second thread than two runs side by side do. So
  each worker computes with one thread, and a run's bits do not depend on how many workers there
  were.
- a run is kept under its own configuration: sweeps that share runs share them, and a sweep that was
  interrupted or is extended computes what is missing.
- runs that see the same batches travel together: these are read once for them
  (:func:`jumprelu.train_many`), and the language model's own pass over the held-out text is
  computed once (:func:`jumprelu.metrics.evaluate_many`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.activations import Activations, open_activations
from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.metrics import Report, evaluate, evaluate_many
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE
from jumprelu.train import TrainResult, train, train_many

from .cache import Slot, remember, slot

TOGETHER = 8
"""At most so many runs are trained in one pass over the data: their weights and moments are in
memory at once."""

LOG_ROWS = 20
"""Rows in the log of a run: a logged step also pays for its diagnostics, and short runs would log
every other step."""

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


class Job(NamedTuple):
    """What a worker needs to know of a run; the two places are found once, here, so that both sides
    agree on them."""

    store: Path
    config: TrainConfig
    folder: Path
    report: Slot


def train_and_score(acts: Activations, config: TrainConfig, lm: LM, tokens: Tokens) -> Report:
    """The :class:`Report` on `tokens` of an SAE trained on `acts`: what :func:`sweep` does for each
    of its runs."""
    return evaluate(remember(train, acts, config, log_rows=LOG_ROWS).sae, lm, tokens)


def sweep(
    runs: Sequence[Run], lm: LM, tokens: Tokens, workers: int | None = None, executor: Any = None
) -> list[Scored]:
    """Train a configuration on activations for each of `runs`, score each SAE on held-out `tokens`;
    in their order.

    A run that is there twice is computed once. workers: processes, each with one thread; default is
    one a core, and none where the model is on a GPU, which is then shared by nobody. executor: of
    submitit, see :mod:`companion.rails.cluster`: a job for each task in place of processes;
    `workers` is then about how many are to run at once.

    Raises what :func:`jumprelu.train` does, for the first run that fails, and RuntimeError if a
    worker dies, which means that memory ran out or that someone killed it. Finished runs are kept:
    the same call goes on from there.
    """
    workers = workers or _cores()
    with _one_thread():  # of which the key of a result speaks
        jobs = [
            Job(
                acts.folder,
                config,
                slot(train, acts, config, log_rows=LOG_ROWS).folder,
                slot(train_and_score, acts, config, lm, tokens),
            )
            for acts, config in runs
        ]
    tasks = _tasks([job for job in jobs if not job.report.filled], workers)
    with tqdm(total=sum(map(len, tasks)), desc="SAEs", unit="run", leave=bool(tasks)) as progress:
        if executor is not None:
            from .cluster import on_cluster  # which imports from here

            on_cluster(tasks, lm, tokens, executor, progress)
        elif lm.device.type == "cpu":
            _in_processes(tasks, lm, tokens, workers, progress)
        else:
            for task in tasks:
                progress.update(_work(task, lm, tokens))
    return [
        Scored(acts.site, acts.layer, job.config, job.report.read(), job.folder)
        for (acts, _), job in zip(runs, jobs, strict=True)
    ]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tasks(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Jobs dealt into tasks for a worker, the most expensive first: each of one store and one order
    of the data."""
    groups: dict[tuple[Path, int, int], dict[Path, Job]] = {}
    for job in jobs:
        groups.setdefault((job.store, job.config.batch_size, job.config.data_order), {})[
            job.folder
        ] = job
    most = max(1, min(TOGETHER, -(-sum(map(len, groups.values())) // (3 * workers))))
    tasks = []
    for group in groups.values():
        ordered = sorted(group.values(), key=_cost)
        number = -(-len(ordered) // most)
        tasks += [
            ordered[n::number] for n in range(number)
        ]  # dealt out, so that tasks cost about the same
    return sorted(tasks, key=lambda task: -sum(map(_cost, task)))


def _cost(job: Job) -> int:
    return job.config.length * job.config.batch_size * job.config.d_sae


_opened = functools.lru_cache(maxsize=4)(open_activations)
"""A worker reads and checks a store once, and not for every task."""


def _work(task: Sequence[Job], lm: LM, tokens: Tokens) -> int:
    """Train and score the runs of a task, and keep what comes out; returns their number."""
    results = train_many(
        _opened(task[0].store),
        [job.config for job in task],
        out=[job.folder for job in task],
        log_rows=LOG_ROWS,
    )
    for job, report in zip(
        task, evaluate_many([result.sae for result in results], lm, tokens), strict=True
    ):
        job.report.write(report)
    return len(task)


# ---- worker processes

_shared: dict[str, LM | Tokens] = {}


def _start(lm: LM, tokens: Tokens) -> None:
    torch.set_num_threads(1)
    _shared.update(lm=lm, tokens=tokens)


def _work_on_shared(task: Sequence[Job]) -> int:
    return _work(task, **_shared)


def _in_processes(
    tasks: Sequence[list[Job]], lm: LM, tokens: Tokens, workers: int, progress: tqdm
) -> None:
    if not tasks:
        return
    before = {name: os.environ.get(name) for name in ("TQDM_DISABLE", "OMP_NUM_THREADS")}
    # a server that has imported everything once, and whose copies are ready at once; a copy of this
    # very process would not do, because torch may refuse gradients in the copy of a process that
    # has computed some
    served = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if served else "spawn")
    if served:
        context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (lm, tokens))
    try:
        os.environ.update(
            TQDM_DISABLE="1", OMP_NUM_THREADS="1"
        )  # read by server and workers as they start
        waiting: list[Future[int]] = [pool.submit(_work_on_shared, task) for task in tasks]
        for done in as_completed(waiting):
            progress.update(done.result())
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died: memory ran out, or it was killed. Finished runs are kept; "
            f"call again, with fewer workers than {workers} if memory is short"
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        pool.shutdown(wait=True, cancel_futures=True)
