"""Sweeps over a cluster: each task of a sweep is a job, which submitit brings to Slurm.

    from companion.rails.cluster import make_executor, make_runner
    executor = make_executor(timeout_min=240, gpus_per_node=1, slurm_partition="gpu")
    runs = [(acts, config) for config in configs]
    scored = sweep(runs, lm, tokens, workers=32, run=make_runner(executor))

Notable here:
- results land where a sweep on one machine puts them. The cache (`JUMPRELU_CACHE`), the stores and
  the model's folder must be on a file system that the jobs see under the same path; a later sweep,
  anywhere, reads the results back.
- model and tokens travel by place and are checked by content. Before it trains, a job finds the
  keys of its runs anew and refuses if they differ: code that was edited while the job stood in the
  queue must not file results under the old code's key.
- the process that waits may be killed: jobs go on. Called again, a sweep computes what is missing
  and does not know of jobs that still wait or run. It submits their runs once more: a job leaves
  out what is finished and, where the file system's locks reach over machines, waits for another one
  that is at work on its runs. `scancel --name jumprelu` first avoids it; training goes on from its
  last checkpoint.
- on a CPU each run has one thread, on which its bits may depend, and a job works on as many runs at
  once as it asked for cpus.
- submitit hands over function, arguments and result as pickles in the executor's folder. They are
  ours, of names and numbers only, but who can write there can run code as you: keep the folder to
  yourself. One that anyone can write to is refused.
"""

from __future__ import annotations

import functools
import logging
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from jumprelu.corpus import Tokens
from jumprelu.files import cache_root, tensor_digest, write_tensors
from jumprelu.lm import LM, load_lm

from .jobs import Runner, Task, deal, make_job, one_thread, open_store, work
from .sweep import in_processes

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two looks at the jobs; submitit itself asks Slurm far less often."""

PATIENCE = 90.0
"""Seconds that a network file system may take to show what a finished job has written."""


def make_executor(
    folder: str | Path | None = None, cluster: str | None = None, **parameters: Any
) -> Any:
    """A `submitit.AutoExecutor` for :func:`companion.rails.sweep.sweep`.

    folder: for logs and submitit's own files, by default `cache_root()/cluster`; on a file system
    that jobs see, and yours alone. cluster: "slurm", or "local" for processes of this machine, all
    at once; default is what there is. parameters: those of `AutoExecutor.update_parameters`, such
    as timeout_min (240; a job that runs out of it goes on in a new one, up to three times),
    cpus_per_task (1), mem_gb, gpus_per_node, slurm_partition, slurm_account.

    Raises ModuleNotFoundError without submitit, NameError for a parameter that it does not know.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sweeps over a cluster need submitit: pip install submitit", name="submitit"
        ) from error
    folder = Path(folder or cache_root() / "cluster").absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder, cluster)
    parameters = {"name": "jumprelu", "timeout_min": 240, "cpus_per_task": 1} | parameters
    # since Slurm 22.05, srun does not take this number over from the job that it is called in
    cpus = {"slurm_srun_args": [f"--cpus-per-task={parameters['cpus_per_task']}"]}
    executor.update_parameters(**cpus | parameters)
    return executor


@dataclass(frozen=True)
class Worker:
    """What a job calls with its task. It is pickled: places and fingerprints only."""

    lm: Path
    dtype: torch.dtype
    fingerprint: str
    """Of the language model that the runs were submitted with."""
    tokens: Path
    cpus: int

    def __call__(self, task: Task) -> int:
        """Train and score what is not there yet; returns the number of these runs. A GPU is used
        where the job has one.

        Raises ValueError if the model's folder holds another one now, RuntimeError if anything else
        changed since the submission, and what :func:`jumprelu.train` does.
        """
        task = [job for job in task if not job.report.filled]
        if not task:
            return 0
        lm = load_lm(self.lm, dtype=self.dtype)
        if lm.fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.lm} holds a model with fingerprint {lm.fingerprint}, and the runs were "
                f"submitted with {self.fingerprint}: the folder was changed, or is another one on "
                "this machine. Load the model anew and call the sweep again"
            )
        tokens = Tokens(**load_file(self.tokens))
        _check_keys(task, lm, tokens)
        if lm.device.type != "cpu":
            torch.set_num_threads(self.cpus)  # they only feed the GPU
            work(task, lm, tokens)
        elif self.cpus == 1:
            with one_thread():
                work(task, lm, tokens)
        else:
            with tqdm(total=len(task), desc="SAEs", unit="run") as progress:
                in_processes(deal(task, self.cpus), lm, tokens, progress, self.cpus)
        return len(task)

    def checkpoint(self, task: Task) -> Any:
        """What submitit submits in the place of a job that ran out of time: the same again, which
        goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)


def _check_keys(task: Task, lm: LM, tokens: Tokens) -> None:
    """Raise RuntimeError unless the runs would be kept under the keys here, too, that they were
    submitted with."""
    for job in task:
        here = make_job(open_store(job.store), job.config, lm, tokens)
        keys = (here.folder.name, here.report.folder.name)
        if keys != (job.folder.name, job.report.folder.name):
            raise RuntimeError(
                f"this run would be {keys[1]} here, and was submitted as {job.report.folder.name}: "
                "the package's code, torch or NumPy, the activations or the tokens changed since. "
                "Nothing was computed; call the sweep again"
            )


def make_runner(executor: Any) -> Runner:
    """The runner for :func:`companion.rails.sweep.sweep` that submits a job for each task and waits
    for all: :func:`on_cluster` with this executor, of :func:`make_executor`."""
    return functools.partial(on_cluster, executor=executor)


def on_cluster(
    tasks: Sequence[Task], lm: LM, tokens: Tokens, progress: tqdm, executor: Any
) -> None:
    """Submit a job for each of a sweep's tasks and wait for all; `progress` counts the runs that
    are there.

    executor: any of submitit's with one task a job; see :func:`make_executor`. That a job was
    killed before it could say so is known from Slurm's accounting (`sacct`); on a cluster without
    it, this would wait for such a job for ever.

    Raises ValueError, before anything is submitted, for a model that was not read from a folder and
    for an executor whose folder anyone can write to; RuntimeError, after the last job, naming error
    and log of each that failed. What the others computed is kept, and of a failed one its finished
    runs and checkpoints: the same sweep goes on from there.
    """
    if lm.folder is None:
        raise ValueError(
            f"the model {lm.name!r} was made in memory, and jobs read theirs from a folder: write "
            "it with lm.model.save_pretrained(folder), and take jumprelu.load_lm(folder)"
        )
    if executor.folder.is_dir() and executor.folder.stat().st_mode & stat.S_IWOTH:
        raise ValueError(
            f"anyone can write to {executor.folder}, and so have a job run code as you: give the "
            "executor a folder of your own, or take the right away (chmod o-w)"
        )
    held = {"ids": tokens.ids, "document": tokens.document}
    path = (cache_root() / "cluster" / f"tokens-{tensor_digest(held)}.safetensors").absolute()
    if not path.exists():
        write_tensors(path, held)
    worker = Worker(
        lm.folder.absolute(),
        lm.dtype,
        lm.fingerprint,
        path,
        executor.parameters.get("cpus_per_task") or 1,
    )
    waiting = dict(
        zip(executor.map_array(worker, [_anywhere(task) for task in tasks]), tasks, strict=True)
    )
    log.info("%d jobs submitted, with their logs in %s", len(tasks), executor.folder)
    failed, cause = [], None
    while waiting:
        for job in [job for job in waiting if job.done()]:
            task, error = waiting.pop(job), job.exception()
            missing = _missing(task, 0 if error else PATIENCE)
            progress.update(len(task) - missing)
            if missing:  # and not what an earlier submission has finished meanwhile
                cause = cause or error
                failed.append(
                    f"job {job.job_id}, {missing} of {len(task)} runs: {_reason(error, task)}; "
                    f"see {_log_of(job)}"
                )
        time.sleep(POLL if waiting else 0)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(tasks)} jobs failed. What is finished is kept: mend the cause "
            "and call again\n" + "\n".join(failed)
        ) from cause


def _anywhere(task: Task) -> Task:
    """A task whose places do not depend on the folder that a process is in."""
    return [
        job._replace(
            store=job.store.absolute(),
            folder=job.folder.absolute(),
            report=job.report._replace(folder=job.report.folder.absolute()),
        )
        for job in task
    ]


def _missing(task: Task, patience: float) -> int:
    """How many of a task's runs have no result, after waiting `patience` seconds for them to
    show."""
    until = time.monotonic() + patience
    while (missing := sum(not job.report.filled for job in task)) and time.monotonic() < until:
        time.sleep(POLL)
    return missing


def _reason(error: Exception | None, task: Task) -> str:
    """Why a job failed, in a line: its exception, or what became of a job that ended without
    one."""
    if error is None:
        return (
            f"it ended well, but its results do not show in {task[0].report.folder.parent}: is "
            "that on a file system that the jobs share?"
        )
    lines = [line for line in str(error).splitlines() if line.strip("- ")]
    ends = [
        number for number, line in enumerate(lines) if line.startswith("You can check full logs")
    ]
    return lines[ends[0] - 1] if ends else " ".join(lines[:2])


def _log_of(job: Any) -> Path:
    """Where a job wrote its errors: submitit can be told to have them in the file of its output."""
    return job.paths.stderr if job.paths.stderr.exists() else job.paths.stdout
