"""Runs on a team of processes, with gloo: the run of one process within rounding, on every mesh,
also after a kill."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from jumprelu.activations import activations_from_tensor, open_activations
from jumprelu.distributed import ALONE, Team, latent_dim, start
from jumprelu.files import read_json
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE, Transcoder
from jumprelu.train import train

BASE = {
    "d_sae": 64,
    "steps": 40,
    "batch_size": 128,
    "lr": 1e-3,
    "dead_after": 1_000,
    "sparsity": 3e-3,
    "seed": 1,
}
RUNS = {
    "jumprelu": {},
    "annealed, raw θ, target": {
        "bandwidth_end": 0.02,
        "log_threshold": False,
        "sparsity_loss": "l0_target",
        "l0_target": 5.0,
    },
    "gated": {"architecture": "gated", "sparsity": 0.05},
    "relu, Adam with a first moment": {
        "architecture": "relu",
        "sparsity": 0.05,
        "betas": (0.9, 0.999),
    },
}
ONLY_DATA = {
    "topk": {"architecture": "topk", "k": 4, "dead_after": 300},
    "frequency": {"sparsity_loss": "frequency"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    on = torch.rand(20_000, 24, generator=g) < 0.08
    x = (on * (1 + torch.rand(20_000, 24, generator=g))) @ torch.randn(24, 16, generator=g) + 1
    return activations_from_tensor(x, tmp_path_factory.mktemp("store"), shard_rows=4_096)


@pytest.fixture(scope="module")
def targets(store, tmp_path_factory):
    x = torch.cat([shard.activations for shard in store.shards()])
    return activations_from_tensor(
        x.relu() @ torch.randn(16, 16, generator=torch.Generator().manual_seed(1)),
        tmp_path_factory.mktemp("targets"),
        shard_rows=4_096,
    )


def torchrun(processes, latents, jobs, folder, *options):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *options,
        str(Path(__file__).parents[1] / "team.py"),
        str(folder / "jobs.json"),
        str(latents),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "default",
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def same(mine, theirs, tolerance):
    (sae, log), (other, other_log) = mine, theirs
    assert list(log.columns) == list(other_log.columns)
    # "computed" is left out: a process decides by its own part of a batch whether that is dense
    for name in log.columns.drop("computed"):
        np.testing.assert_allclose(
            log[name], other_log[name], rtol=tolerance, atol=tolerance, err_msg=name
        )
    for name, parameter in sae.named_parameters():
        expected = dict(other.named_parameters())[name]
        assert (parameter - expected).norm() <= tolerance * expected.norm().clamp_min(1), name


@pytest.mark.slow
@pytest.mark.parametrize("processes, latents", [(2, 2), (4, 2), (4, 1)])
def test_a_team_ends_where_one_process_does(store, targets, tmp_path, processes, latents):
    runs = RUNS | ({} if latents > 1 else ONLY_DATA)
    jobs = [
        {"store": str(store.folder), "config": BASE | run, "out": str(tmp_path / name)}
        for name, run in runs.items()
    ]
    jobs.append({**jobs[0], "targets": str(targets.folder), "out": str(tmp_path / "transcoder")})
    finish(torchrun(processes, latents, jobs, tmp_path))
    for job in jobs:
        paired = open_activations(job["targets"]) if "targets" in job else None
        config = TrainConfig(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in job["config"].items()}
        )
        alone = train(store, config, device="cpu", log_rows=10, targets=paired)
        again = train(
            store, config, job["out"], "cpu", log_rows=10, targets=paired
        )  # reads what the team has written
        same(again, alone, 1e-5)
        assert isinstance(again.sae, Transcoder) == ("targets" in job)


@pytest.mark.slow
def test_a_run_killed_on_four_goes_on_on_two_and_on_one(store, tmp_path):
    config = TrainConfig(**BASE | {"steps": 2_000})
    whole = train(store, config, device="cpu", log_rows=10)
    job = {
        "store": str(store.folder),
        "config": dataclasses.asdict(config),
        "out": str(tmp_path / "run"),
        "checkpoint_seconds": 0.1,
    }
    process = torchrun(4, 2, [job], tmp_path)
    checkpoint = tmp_path / "run/checkpoint.safetensors"
    wait_for(checkpoint, process)
    psutil.Process(process.pid).children(recursive=True)[-1].kill()
    process.communicate(timeout=120)
    assert (
        process.returncode != 0 and checkpoint.exists() and not (tmp_path / "run/run.json").exists()
    )
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    finish(torchrun(2, 2, [job | {"out": str(tmp_path / "two")}], tmp_path))
    one = train(store, config, tmp_path / "run", "cpu", log_rows=10)
    two = train(store, config, tmp_path / "two", "cpu", log_rows=10)
    for result in (
        one,
        two,
    ):  # after so many steps rounding has grown, and what was learned is the same
        assert result.log.fvu.iloc[-1] == pytest.approx(whole.log.fvu.iloc[-1], rel=0.02)
        assert result.log.l0.iloc[-1] == pytest.approx(whole.log.l0.iloc[-1], rel=0.02)
        assert list(result.log.step) == list(whole.log.step)


@pytest.mark.slow
def test_torchrun_restarts_a_worker_that_was_killed(store, tmp_path):
    job = {
        "store": str(store.folder),
        "config": BASE | {"steps": 2_000},
        "out": str(tmp_path / "run"),
        "checkpoint_seconds": 0.1,
    }
    process = torchrun(2, 1, [job], tmp_path, "--max-restarts", "1")
    wait_for(tmp_path / "run/checkpoint.safetensors", process)
    psutil.Process(process.pid).children(recursive=True)[0].kill()
    finish(process)
    assert read_json(tmp_path / "run/run.json")["config"]["steps"] == 2_000
    assert SAE.load(tmp_path / "run").d_sae == 64


def wait_for(path, process):
    began = time.monotonic()
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < 120
        time.sleep(0.02)


def test_alone_everything_stays_as_it_is():
    x = torch.arange(6.0).view(2, 3)
    assert ALONE.alone and ALONE.first and (ALONE.data, ALONE.latents) == (1, 1)
    assert all(f(x) is x for f in (ALONE.local_rows, ALONE.mean, ALONE.sum_latents))
    assert ALONE.gather("W_enc", x) is x and ALONE.local_latents("W_dec", x) is x
    assert start(1) == ALONE


@pytest.mark.parametrize(
    "name, dim",
    [
        ("trainee.W_enc", 1),
        ("adam.exp_avg_sq.W_dec", 0),
        ("silent", 0),
        ("trainee.b_dec", None),
        ("generator", None),
        ("trainee.b_in", None),
    ],
)
def test_a_name_says_where_latents_are(name, dim):
    assert latent_dim(name) == dim


class OfSize(Team):
    """The checks of a mesh need its sizes alone."""

    sizes = {}

    def size(self, which):
        return self.sizes[which]

    alone = property(lambda self: False)


@pytest.mark.parametrize(
    "data, latents, change, message",
    [
        (1, 2, {"architecture": "topk"}, "ranks the latents"),
        (1, 2, {"sparsity_loss": "frequency"}, "expected one of l1"),
        (1, 3, {}, "d_sae = 64.*multiple of 3"),
        (3, 1, {}, "batch_size = 128.*multiple of 3"),
        (2, 1, {"architecture": "batchtopk"}, "need a whole batch"),
        (2, 1, {"sparsity_loss": "l0_target_batch"}, "need a whole batch"),
        (2, 1, {"resample": (0.5,)}, "resample"),
    ],
)
def test_what_a_mesh_cannot_train_is_refused(data, latents, change, message):
    team = OfSize()
    OfSize.sizes = {"data": data, "latents": latents}
    with pytest.raises(ValueError, match=message):
        team.check(TrainConfig(**BASE | change))


def test_processes_must_fill_the_mesh(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes cannot be dealt into 3"):
        start(3)


def test_a_team_needs_a_folder(store):
    OfSize.sizes = {"data": 2, "latents": 1}
    with pytest.raises(ValueError, match="give train"):
        train(store, TrainConfig(**BASE), team=OfSize())
