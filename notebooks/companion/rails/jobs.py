"""Runs of a sweep as jobs: where a run's results belong, how runs are dealt into tasks, and what a
worker does with a task.

Notable here:
- each worker computes with one thread, so a run's bits do not depend on who computes it or on how
  many workers there are.
- runs that see the same batches travel together: these are read once for them
  (:func:`jumprelu.train_many`), and the language model's own pass over the held-out text is
  computed once (:func:`jumprelu.metrics.evaluate_many`).
- of two workers with the same run, one computes it, and the other waits and finds it done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from jumprelu.activations import Activations, open_activations
from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.metrics import Report, evaluate, evaluate_many
from jumprelu.recipe import TrainConfig
from jumprelu.train import train, train_many

from .cache import Slot, remember, slot

TOGETHER = 8
"""At most so many runs are trained in one pass over the data: their weights and moments are in
memory at once."""

LOG_ROWS = 20
"""Rows in the log of a run: a logged step also pays for its diagnostics, and short runs would log
every other step."""


class Job(NamedTuple):
    """What a worker needs to know of a run. The two places are found once, here, so that both sides
    agree on them."""

    store: Path
    config: TrainConfig
    folder: Path
    """Of the SAE and the log of its training."""
    report: Slot


Task = Sequence[Job]
"""Runs of one store and one order of the data, for one worker."""
Runner = Callable[[Sequence[Task], LM, Tokens, tqdm], None]
"""Brings tasks to workers, waits for all, and counts finished runs in the progress bar."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread for the time of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_and_score(acts: Activations, config: TrainConfig, lm: LM, tokens: Tokens) -> Report:
    """The :class:`Report` on `tokens` of an SAE trained on `acts`: what :func:`work` keeps for each
    run."""
    return evaluate(remember(train, acts, config, log_rows=LOG_ROWS).sae, lm, tokens)


def make_job(acts: Activations, config: TrainConfig, lm: LM, tokens: Tokens) -> Job:
    """The run of a configuration on activations, to be scored on `tokens`."""
    with one_thread():  # of which the keys speak, on every machine
        return Job(
            acts.folder,
            config,
            slot(train, acts, config, log_rows=LOG_ROWS).folder,
            slot(train_and_score, acts, config, lm, tokens),
        )


def deal(jobs: Sequence[Job], workers: int) -> list[Task]:
    """Jobs dealt into tasks, the most expensive first: each of one store and one order of the
    data."""
    groups: dict[tuple[Path, int, int], dict[Path, Job]] = {}
    for job in jobs:
        key = (job.store, job.config.batch_size, job.config.data_order)
        groups.setdefault(key, {})[job.folder] = job
    total = sum(len(group) for group in groups.values())
    most = max(1, min(TOGETHER, -(-total // (3 * workers))))
    tasks = []
    for group in groups.values():
        ordered = sorted(group.values(), key=_cost)
        number = -(-len(ordered) // most)
        tasks += [ordered[n::number] for n in range(number)]  # so tasks cost about the same
    return sorted(tasks, key=lambda task: -sum(_cost(job) for job in task))


def _cost(job: Job) -> int:
    return job.config.length * job.config.batch_size * job.config.d_sae


open_store = functools.lru_cache(maxsize=4)(open_activations)
"""A worker reads and checks a store once, and not for every task."""


def work(task: Task, lm: LM, tokens: Tokens) -> None:
    """Train and score the runs of a task that are not there yet, and keep what comes out.

    Raises what :func:`jumprelu.train_many` does.
    """
    with ExitStack() as stack:
        # in one order, or two workers could each wait for the other
        for job in sorted(task, key=lambda job: job.report.folder):
            stack.enter_context(job.report.locked())
        missing = [job for job in task if not job.report.filled]
        if not missing:
            return
        results = train_many(
            open_store(missing[0].store),
            [job.config for job in missing],
            out=[job.folder for job in missing],
            log_rows=LOG_ROWS,
        )
        reports = evaluate_many([result.sae for result in results], lm, tokens)
        for job, report in zip(missing, reports, strict=True):
            job.report.write(report)
