"""Sweeps over a cluster: jobs compute what a sweep on one machine does; what fails is named, and
nothing else is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from companion.rails import cluster
from companion.rails.jobs import Job, make_job
from companion.rails.sweep import sweep
from models import random_ids, save_tiny, tiny_lm
from tqdm import tqdm

import jumprelu as jr
from jumprelu.files import cache_root, write_tensors

pytest.importorskip("submitit")

CONFIG = jr.TrainConfig(d_sae=24, steps=20, batch_size=32)
CONFIGS = [
    dataclasses.replace(CONFIG, seed=seed, sparsity=price)
    for seed in (0, 1)
    for price in (1e-3, 1e-2)
]
BAD = dataclasses.replace(CONFIG, lr=1e30)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    lm = jr.load_lm(save_tiny("gemma2", folder / "model"))
    tokens = jr.Tokens(random_ids(30, 16), torch.arange(30) // 2)
    return lm, tokens, jr.harvest(lm, tokens, site="resid_post", layer=1, out=folder / "acts")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jobs_of(setting, configs):
    """What a sweep makes of these runs."""
    lm, tokens, store = setting
    return [make_job(store, config, lm, tokens) for config in configs]


def worker_of(setting, **changes):
    lm, tokens, _ = setting
    path = cache_root() / "tokens.safetensors"
    write_tensors(path, {"ids": tokens.ids, "document": tokens.document})
    told = {
        "lm": lm.folder,
        "dtype": lm.dtype,
        "fingerprint": lm.fingerprint,
        "tokens": path,
        "cpus": 1,
    }
    return cluster.Worker(**told | changes)


def bytes_of(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "results").rglob("*")
        if path.is_file() and path.name != ".lock"
    }


class Finished(NamedTuple):
    cache: Path
    jobs: dict[jr.TrainConfig, Job]
    counted: int
    error: RuntimeError


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    """Three jobs on this machine: two of two runs each, and one of a run that fails."""
    lm, tokens, _ = setting
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JUMPRELU_CACHE", str(tmp_path_factory.mktemp("finished")))
        jobs = jobs_of(setting, [BAD, *CONFIGS])
        executor = cluster.make_executor(cluster="local", timeout_min=5)
        with (
            tqdm(file=io.StringIO(), disable=False) as progress,
            pytest.raises(RuntimeError) as raised,
        ):
            cluster.on_cluster([jobs[:1], jobs[1:3], jobs[3:]], lm, tokens, progress, executor)
        return Finished(cache_root(), {job.config: job for job in jobs}, progress.n, raised.value)


@pytest.mark.slow
def test_jobs_leave_the_very_files_of_a_sweep_on_one_machine(setting, finished, cache, monkeypatch):
    lm, tokens, store = setting
    runs = [(store, config) for config in CONFIGS]
    alone = sweep(runs, lm, tokens, workers=1)
    monkeypatch.setenv("JUMPRELU_CACHE", str(finished.cache))
    found = sweep(runs, lm, tokens, run=lambda *_: pytest.fail("something is left to do"))
    assert [one.config for one in found] == CONFIGS
    assert all(
        torch.equal(one.sae().W_enc, other.sae().W_enc)
        for one, other in zip(found, alone, strict=True)
    )
    assert len(bytes_of(cache)) >= 5 * len(CONFIGS)
    assert bytes_of(cache) == bytes_of(finished.cache)


def test_a_failed_job_names_its_error_and_log_and_loses_nothing_of_the_others(finished):
    summary, line = str(finished.error).splitlines()
    assert summary.startswith("1 of 3 jobs failed. What is finished is kept")
    assert (
        "1 of 1 runs: FloatingPointError" in line
        and "diverged before step" in line
        and "Lower lr" in line
    )
    log = Path(line.rsplit("; see ")[1])
    assert log.parent == finished.cache / "cluster" and "FloatingPointError" in log.read_text()
    assert "Traceback" in str(finished.error.__cause__)
    assert finished.counted == len(CONFIGS)
    assert {config for config, job in finished.jobs.items() if job.report.filled} == set(CONFIGS)


def test_neither_model_nor_tokens_are_pickled(finished):
    submitted = list((finished.cache / "cluster").glob("*_submitted.pkl"))
    assert len(submitted) == 3 and max(path.stat().st_size for path in submitted) < 8_000


@pytest.mark.slow
def test_two_cpus_work_on_two_runs_with_the_bits_of_one(setting, finished, cache):
    assert worker_of(setting, cpus=2)(jobs_of(setting, CONFIGS)) == len(CONFIGS)
    assert bytes_of(cache) == bytes_of(finished.cache)


def test_a_job_leaves_out_what_is_finished_and_its_successor_goes_on(setting, cache):
    jobs, worker, threads = (
        jobs_of(setting, CONFIGS[:2]),
        worker_of(setting),
        torch.get_num_threads(),
    )
    assert worker(jobs[:1]) == 1
    before = {
        path: path.stat().st_mtime_ns for path in (cache / "results").rglob("*") if path.is_file()
    }
    assert worker.checkpoint(jobs).result() == 1  # what submitit would submit when the time is over
    assert before == {path: path.stat().st_mtime_ns for path in before} and all(
        job.report.filled for job in jobs
    )
    assert torch.get_num_threads() == threads
    assert (
        worker_of(setting, lm=Path("nowhere"))(jobs) == 0
    )  # nothing to do: not even the model is read


def test_a_model_that_is_not_the_one_of_the_submission_is_refused(setting, cache, tmp_path):
    task = jobs_of(setting, CONFIGS[:1])
    other = save_tiny("gemma2", tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=rf"other holds a model with fingerprint {jr.load_lm(other).fingerprint}"
    ):
        worker_of(setting, lm=other)(task)
    with pytest.raises(ValueError, match="the runs were submitted with"):
        worker_of(setting, dtype=torch.bfloat16)(
            task
        )  # the weights are the same, what they compute is not
    assert not (cache / "results").exists()


def test_code_or_tokens_that_changed_since_the_submission_are_refused(setting, cache):
    task = jobs_of(setting, CONFIGS[:1])
    lm, tokens, store = setting
    (other,) = jobs_of((lm, tokens[:-1], store), CONFIGS[:1])
    for edited in (
        task[0]._replace(folder=task[0].folder.with_name("train-0123456789abcdef")),
        other,
    ):
        with pytest.raises(
            RuntimeError, match="changed since. Nothing was computed; call the sweep again"
        ):
            worker_of(setting)([edited])
    assert not (cache / "results").exists()


def test_nothing_is_submitted_for_a_model_in_memory_or_to_a_folder_of_all(setting, cache):
    lm, tokens, _ = setting
    tasks, executor = [jobs_of(setting, CONFIGS)], cluster.make_executor(cluster="local")
    with tqdm(disable=True) as progress:
        with pytest.raises(ValueError, match="'tiny-gemma2' was made in memory.*save_pretrained"):
            cluster.on_cluster(tasks, tiny_lm(), tokens, progress, executor)
        (cache / "cluster").chmod(0o777)
        with pytest.raises(ValueError, match="anyone can write to .*chmod o-w"):
            cluster.on_cluster(tasks, lm, tokens, progress, executor)
    assert not list(cache.rglob("*.pkl"))


def test_results_that_do_not_show_are_said_to_be_so(setting):
    task = jobs_of(setting, CONFIGS[:1])
    assert cluster._missing(task, patience=0) == 1
    assert "ended well, but its results do not show in " in cluster._reason(None, task)


def test_an_executor_asks_slurm_for_what_it_was_told(cache, tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    executor = cluster.make_executor(cpus_per_task=6, slurm_partition="gpu")
    script = executor._executor._make_submission_file_text("true", "")
    for line in ("--cpus-per-task=6", "--partition=gpu", "--job-name=jumprelu", "--time=240"):
        assert f"#SBATCH {line}\n" in script
    assert (
        "srun" in script and script.count("--cpus-per-task=6") == 2
    )  # the job's, and that of the srun in it
    assert executor.folder == cache / "cluster" and executor.folder.stat().st_mode & 0o077 == 0


def test_without_submitit_there_is_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match="pip install submitit"):
        cluster.make_executor(cluster="local")
