"""Training: learns a planted dictionary, is a function of its inputs, survives SIGKILL bit for
bit."""

import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import safe_open
from tqdm import tqdm

from jumprelu.activations import Activations, activations_from_tensor
from jumprelu.architectures import Trainee
from jumprelu.recipe import SPARSITY_LOSSES, TrainConfig
from jumprelu.sae import SAE, Transcoder
from jumprelu.state import Inputs, TrainState, train_step
from jumprelu.support import DENSE
from jumprelu.train import BLOCK, TrainResult, run_identity, train, train_many

module = sys.modules["jumprelu.train"]  # `jumprelu.train` is the function


def planted(n=20_000, d_in=16, features=24, seed=0):
    """Sparse combinations of unit directions: [n, d_in] and the directions [features, d_in]."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d_in, generator=g), dim=-1)
    on = torch.rand(n, features, generator=g) < 0.06
    return (on * (1 + torch.rand(n, features, generator=g))) @ directions * 20 + 5, directions


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    return activations_from_tensor(planted()[0], tmp_path_factory.mktemp("acts"))


SMALL = TrainConfig(d_sae=48, steps=60, batch_size=128, k=3, dead_after=2_000, sparsity=3e-3)


def test_recovers_planted_directions(acts):
    sae, log = train(acts, dataclasses.replace(SMALL, steps=1500, sparsity=0.1), device="cpu")
    similarity = (planted()[1] @ sae.W_dec.T).max(-1).values
    assert (similarity > 0.95).float().mean() > 0.9
    assert log.fvu.iloc[-1] < 0.1 < log.fvu.iloc[0]
    l0 = (sae.encode(planted()[0][:5000]) > 0).sum(-1).float().mean().item()
    assert l0 == pytest.approx(24 * 0.06, rel=0.15)  # what was planted


@pytest.mark.parametrize(
    "architecture, loss", [(a, loss) for a, known in SPARSITY_LOSSES.items() for loss in known]
)
def test_every_architecture_learns(acts, architecture, loss):
    config = dataclasses.replace(
        SMALL, architecture=architecture, sparsity_loss=loss, steps=200, l0_target=3.0
    )
    sae, log = train(acts, config, device="cpu")
    assert log.fvu.iloc[-1] < 0.5 * log.fvu.iloc[0]
    assert {"step", "tokens", "sparsity", "loss_reconstruction", "l0", "fvu", "dead"} <= set(
        log.columns
    )
    assert ("window_share" in log.columns) == (architecture == "jumprelu")
    assert sae.origin.architecture == architecture and sae.origin.site == acts.site


def test_same_inputs_same_bits(acts):
    first, again = train(acts, SMALL, device="cpu"), train(acts, SMALL, device="cpu")
    other = train(acts, dataclasses.replace(SMALL, seed=1), device="cpu")
    assert first.sae.fingerprint == again.sae.fingerprint != other.sae.fingerprint
    assert first.log.equals(again.log)


def test_the_input_scale_does_not_matter(acts, tmp_path):
    """E‖x‖² = 1 is estimated once, so activations ten times as large give the same SAE in their own
    units."""
    scaled = activations_from_tensor(10 * planted()[0], tmp_path / "acts")
    small, large = train(acts, SMALL, device="cpu").sae, train(scaled, SMALL, device="cpu").sae
    assert large.input_scale == pytest.approx(10 * small.input_scale, rel=1e-5)
    torch.testing.assert_close(large.threshold, 10 * small.threshold, rtol=0.02, atol=0)


@pytest.mark.parametrize("loss", SPARSITY_LOSSES["jumprelu"])
def test_diagnostics_split_the_gradient_of_the_threshold(loss):
    """Against finite differences of nothing but the closed form: ∂/∂θ of each term by the chain
    rule, for every loss."""
    torch.manual_seed(0)
    config, epsilon, price = (
        dataclasses.replace(SMALL, sparsity_loss=loss, l0_target=5.0),
        0.3,
        1e-2,
    )
    trainee = Trainee(16, config).double()
    x, dead = torch.randn(256, 16, dtype=torch.float64) / 4, torch.zeros(48, dtype=torch.bool)
    out = trainee(x, epsilon, DENSE)
    seen = trainee.diagnose(out, trainee.loss(x, out, price, epsilon, dead), epsilon)
    theta, pre = trainee.threshold.detach(), out.pre.detach()
    K = ((pre - theta).abs() < epsilon / 2).double() / epsilon
    assert seen["window_share"].mean().item() == pytest.approx((K > 0).double().mean().item())
    to_acts = 2 * (out.x_hat - x).detach() @ trainee.W_dec.detach().T / len(x)
    assert seen["reconstruction_push"].abs().mean().item() == pytest.approx(
        (-theta * to_acts * K).sum(0).abs().mean().item(), rel=1e-6
    )
    l0, frequency = (pre > theta).sum(-1).double(), (pre > theta).double().mean(0)
    per_activation = {  # derivative of the penalty by the step H(π − θ), or by f if it acts on f
        "l0": torch.ones(256, 48).double(),
        "l0_target": (2 * (l0 / 5 - 1) / 5)[:, None].expand(256, 48),
        "l0_target_batch": (2 * (l0.mean() / 5 - 1) / 5).expand(256, 48),
        "frequency": (1 + 2 * frequency / config.frequency_reference).expand(256, 48),
        "l1": theta.expand(256, 48),
    }[loss]
    if loss == "l1":  # RI-L1: free norms weigh the activations
        per_activation = per_activation * trainee.W_dec.detach().norm(dim=-1)
    assert seen["sparsity_push"].abs().mean().item() == pytest.approx(
        (price * per_activation * K).mean(0).abs().mean().item(), rel=1e-5
    )


def test_approximate_topk_learns_and_its_sae_is_exact(acts):
    config = dataclasses.replace(SMALL, architecture="topk", steps=200, topk_buckets=20)
    sae, log = train(acts, config, device="cpu")
    exact = train(acts, dataclasses.replace(config, topk_buckets=None), device="cpu")
    assert log.fvu.iloc[-1] < 0.5 * log.fvu.iloc[0]
    assert not torch.equal(sae.W_dec, exact.sae.W_dec)
    x = planted(300)[0]
    pre = (x @ sae.W_enc + sae.b_enc).relu()
    assert torch.equal((sae.encode(x) > 0).sum(-1), (pre > 0).sum(-1).clamp_max(3)) and sae.k == 3
    top = pre.topk(3).values
    torch.testing.assert_close(sae.encode(x).sum(-1), top.sum(-1))


# ---- dead latents


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_resampling_revives_dead_latents(acts, architecture):
    state = TrainState(
        acts, dataclasses.replace(SMALL, architecture=architecture), torch.device("cpu")
    )
    trainee, x = state.trainee, planted(256)[0] / state.input_scale
    dead = torch.zeros(48, dtype=torch.bool)
    dead[5:9] = True
    trainee.b_enc.data[dead] = -100
    if architecture == "gated":
        trainee.b_mag.data[dead] = -3
    else:
        trainee.threshold_parameter.data[dead] = 5.0
    before = trainee.W_dec.detach().clone()
    assert not (trainee(x, 0.1, DENSE).acts[:, dead] > 0).any()
    replaced = trainee.resample(x, dead, 0.1, state.generator)
    assert replaced.tolist() == [5, 6, 7, 8]
    assert (trainee(x, 0.1, DENSE).acts[:, dead] > 0).any(0).all()
    assert torch.equal(before[~dead], trainee.W_dec[~dead])


def test_resampling_while_training(acts):
    config = dataclasses.replace(
        SMALL, architecture="gated", resample=(0.5,), batch_size=4, dead_after=4
    )
    without = train(acts, dataclasses.replace(config, resample=()), device="cpu")
    resampled = train(acts, config, device="cpu")
    assert without.log.dead.iloc[30] > 0.1 and not torch.equal(
        without.sae.W_dec, resampled.sae.W_dec
    )
    first_half = without.log.step < 30
    assert resampled.log[first_half].equals(without.log[first_half])


def test_saturated_sparsity_is_named(acts):
    config = dataclasses.replace(SMALL, steps=200, sparsity=100.0, sparsity_warmup=0.1)
    with pytest.warns(UserWarning, match=r"sparsity = 100.0 is saturated.*Raise threshold_lr"):
        train(acts, config, device="cpu")
    train(acts, dataclasses.replace(config, sparsity=0.03), device="cpu")  # felt: no warning


def test_out_folder(acts, tmp_path):
    sae, log = train(acts, SMALL, out=tmp_path / "run", device="cpu")
    again = train(acts, SMALL, out=tmp_path / "run", device="cpu")
    assert again.sae.fingerprint == sae.fingerprint and again.log.equals(log)
    assert SAE.load(tmp_path / "run").origin == sae.origin
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    with pytest.raises(ValueError, match="another configuration"):
        train(acts, dataclasses.replace(SMALL, seed=5), out=tmp_path / "run", device="cpu")
    assert SAE.load(tmp_path / "run").fingerprint == sae.fingerprint


RUN = """
import importlib, os, sys, time, torch
torch.set_num_threads(1)
from jumprelu.activations import open_activations
from jumprelu.recipe import TrainConfig
module = importlib.import_module("jumprelu.train")  # `jumprelu.train` is the function
advance, acts = module.train_step, open_activations(sys.argv[1])

def run(out, pause):
    # time to be killed in; same arithmetic
    module.train_step = lambda *a, **k: (time.sleep(pause), advance(*a, **k))[1]
    for architecture, resample in (("jumprelu", ()), ("gated", (0.4, 0.7)), ("batchtopk", ())):
        config = TrainConfig(
            architecture, 48, 100, batch_size=128, k=3, dead_after=1000, sparsity=3e-3,
            resample=resample,
        )
        folder = f"{out}/{architecture}"
        module.train(acts, config, out=folder, device="cpu", checkpoint_seconds=0.0)
    sweep = [
        TrainConfig(architecture, 48, steps, batch_size=128, k=3, seed=steps, data_seed=0)
        for architecture, steps in (("jumprelu", 90), ("batchtopk", 20), ("gated", 70))
    ]
    module.train_many(acts, sweep, out=f"{out}/many", device="cpu", checkpoint_seconds=0.0)

# importing takes seconds, so each order is carried out by a fork of this process
for line in sys.stdin:
    out, pause = line.split()
    child = os.fork()
    if child == 0:
        run(out, float(pause))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_bits(acts, tmp_path):
    """Real processes, killed while each of three architectures trains, at different steps, and in a
    sweep of three."""
    server = subprocess.Popen(
        [sys.executable, "-c", RUN, str(acts.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:

        def start(out, pause=0.0):
            server.stdin.write(f"{tmp_path / out} {pause}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        def ended():
            return int(server.stdout.readline())

        start("whole")
        assert ended() == 0
        steps = []
        for run, after in (
            ("jumprelu", 0.2),
            ("jumprelu", 0.4),
            ("gated", 0.5),
            ("batchtopk", 0.3),
            ("many/jumprelu-*", 0.3),
            ("many/gated-*", 0.3),
        ):
            checkpoints = functools.partial(
                (tmp_path / "killed").glob, f"{run}/checkpoint.safetensors"
            )
            process, deadline = start("killed", pause=0.02), time.monotonic() + 120
            while not any(checkpoints()) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
            assert ended() == -signal.SIGKILL, "the run was over before it could be killed"
            for checkpoint in checkpoints():
                with safe_open(checkpoint, "pt") as f:
                    steps.append(json.loads(f.metadata()["state"])["step"])
        assert len([step for step in steps if 0 < step < 100]) >= 5
        start("killed")
        assert ended() == 0
        server.stdin.close()
    files = sorted(
        path.relative_to(tmp_path / "whole")
        for path in (tmp_path / "whole").rglob("*")
        if path.is_file() and path.name != ".lock"
    )
    assert len(files) == 6 * 4
    for file in files:  # weights, configuration, log
        assert (tmp_path / "killed" / file).read_bytes() == (
            tmp_path / "whole" / file
        ).read_bytes(), file


@pytest.mark.parametrize("step", [1, 30, 59])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "batchtopk"},
        {"architecture": "topk", "topk_buckets": 20},
        {
            "resample": (0.3, 0.7),
            "dead_after": 300,
            "bandwidth_end": 0.03,
        },
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_a_checkpoint_of_any_step_is_gone_on_from(acts, tmp_path, changes, step):
    config = dataclasses.replace(SMALL, **changes)
    whole = train(acts, config, device="cpu")
    state = TrainState(acts, config, torch.device("cpu"))
    batches = acts.batches(config.batch_size, seed=config.seed)
    for _ in range(step):
        row = train_step(state, next(batches) / state.input_scale, log=True)
        state.log.append(row)  # 60 steps, 100 log rows: every step is logged
    state.save(
        tmp_path / "checkpoint.safetensors",
        run_identity([acts], config, 100),
    )
    resumed = train(acts, config, out=tmp_path, device="cpu")
    assert resumed.sae.fingerprint == whole.sae.fingerprint and resumed.log.equals(whole.log)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "batchtopk"},
        {"architecture": "gated", "resample": (0.2, 0.5, 0.8), "dead_after": 300},
        {
            "resample": (0.3, 0.7),
            "dead_after": 300,
            "bandwidth_end": 0.03,
        },
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_a_run_stopped_half_way_has_the_bits_of_the_whole_run(acts, tmp_path, changes):
    """Weights are held against the whole run's own state after 30 of its 60 steps, the log against
    its first rows."""
    config = dataclasses.replace(SMALL, **changes)
    half = dataclasses.replace(config, stop_after=0.5)
    state = TrainState(acts, config, torch.device("cpu"))
    batches = acts.batches(config.batch_size, seed=config.seed)
    for number in range(30):
        train_step(state, next(batches) / state.input_scale)
        if number == 16:
            state.save(
                tmp_path / "checkpoint.safetensors",
                run_identity([acts], half, 7),
            )
    expected = state.trainee.eval().fold(state.input_scale)
    stopped = train(acts, half, device="cpu", log_rows=7)
    for name, weight in expected.named_parameters():
        assert torch.equal(weight, getattr(stopped.sae, name)), name
    whole = train(acts, config, device="cpu")
    assert stopped.log.step.tolist() == [0, 8, 16, 24, 29]  # every eighth of 60, and the last
    assert stopped.log.equals(
        whole.log[whole.log.step.isin(stopped.log.step)].reset_index(drop=True)
    )
    assert not torch.equal(stopped.sae.W_dec, whole.sae.W_dec)
    resumed = train(acts, half, out=tmp_path, device="cpu", log_rows=7)  # from step 17
    assert resumed.sae.fingerprint == stopped.sae.fingerprint == SAE.load(tmp_path).fingerprint
    assert (
        train(acts, half, out=tmp_path, device="cpu", log_rows=7).sae.fingerprint
        == stopped.sae.fingerprint
    )


def test_damaged_and_foreign_checkpoints(acts, tmp_path):
    state = TrainState(acts, SMALL, torch.device("cpu"))
    checkpoint = tmp_path / "checkpoint.safetensors"
    state.save(checkpoint, "another identity")
    with pytest.raises(ValueError, match="belongs to a run with other activations"):
        train(acts, SMALL, out=tmp_path, device="cpu")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        train(acts, SMALL, out=tmp_path, device="cpu")
    assert checkpoint.exists()


def test_divergence_is_an_error_and_never_saved(acts, tmp_path):
    diverging = dataclasses.replace(SMALL, architecture="relu", lr=1e30, unit_norm=False)
    with pytest.raises(FloatingPointError, match="diverged before step"):
        train(acts, diverging, out=tmp_path, device="cpu", checkpoint_seconds=0.0, log_rows=1)
    assert not (tmp_path / "run.json").exists()
    if (tmp_path / "checkpoint.safetensors").exists():  # of a step at which all was well
        with safe_open(tmp_path / "checkpoint.safetensors", "pt") as f:
            names = [name for name in f.keys() if name.startswith("trainee.")]  # noqa: SIM118
            assert names and all(torch.isfinite(f.get_tensor(name)).all() for name in names)


# ---- several runs

SWEEP = [
    dataclasses.replace(SMALL, data_seed=7, **changes)
    for changes in (
        {"steps": 100, "seed": 1},
        {"steps": 40, "architecture": "gated", "resample": (0.5,), "d_sae": 40},
        {"steps": 77, "seed": 2, "sparsity": 1e-2, "bandwidth_end": 0.03},
        {"steps": 20, "architecture": "batchtopk", "seed": 3},
        {"steps": 33, "architecture": "topk", "batch_size": 64},
    )
]


@pytest.fixture(scope="module")
def alone(acts) -> list[TrainResult]:
    """Each run of the sweep trained by itself."""
    return [train(acts, config, device="cpu") for config in SWEEP]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The calls of the reader, which are made all the same."""
    made = []

    def watch(name):
        method = getattr(Activations, name)
        monkeypatch.setattr(
            Activations, name, lambda *a, **k: (made.append(name), method(*a, **k))[1]
        )

    watch("rows")
    watch("batches")
    return made


def assert_same(results, expected):
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert result.sae.fingerprint == other.sae.fingerprint and result.log.equals(other.log)


def test_runs_together_have_the_bits_of_runs_alone(acts, alone, calls):
    assert max(config.steps for config in SWEEP) > 2 * BLOCK  # several turns each
    assert_same(train_many(acts, SWEEP, device="cpu"), alone)
    assert calls == ["rows", "batches", "batches"]  # two batch sizes, two passes
    assert train_many(acts, [], device="cpu") == []


def test_a_stopped_run_travels_with_others(acts, alone):
    """Three looks at one run on its way, the longest not the last, beside a run that is longer than
    all of them."""
    looks = [dataclasses.replace(SWEEP[2], stop_after=share) for share in (0.25, 0.8, 0.5)]
    together = train_many(acts, [looks[0], SWEEP[0], *looks[1:]], device="cpu")
    assert_same([together[1]], [alone[0]])
    assert_same([together[0], *together[2:]], [train(acts, look, device="cpu") for look in looks])
    assert [result.log.step.iloc[-1] for result in together] == [
        18,
        99,
        61,
        37,
    ]  # of 77: 19.25, all of 100, 61.6, 38.5


def test_blocks_of_any_size_give_the_same_bits(acts, alone, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)  # less than a batch
    assert_same(train_many(acts, SWEEP, device="cpu"), alone)


def test_the_order_of_the_data_has_a_seed_of_its_own(acts):
    one, other = dataclasses.replace(SMALL, seed=1), dataclasses.replace(SMALL, seed=1, data_seed=0)
    states = [TrainState(acts, config, torch.device("cpu")) for config in (one, other)]
    assert torch.equal(states[0].trainee.W_dec, states[1].trainee.W_dec)
    short = dataclasses.replace(SMALL, steps=5)
    trained = [
        train(acts, dataclasses.replace(short, data_seed=seed), device="cpu")
        for seed in (None, 0, 1)
    ]
    assert torch.equal(trained[0].sae.W_enc, trained[1].sae.W_enc) and trained[0].log.equals(
        trained[1].log
    )
    assert not torch.equal(trained[0].sae.W_enc, trained[2].sae.W_enc)


def interrupted(monkeypatch, after, *args, **kwargs):
    """train_many, stopped from outside after so many steps of all runs."""
    left = iter(range(after))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            module,
            "train_step",
            lambda *a, **k: train_step(*a, **k) if next(left, None) is not None else stop(),
        )
        train_many(*args, **kwargs)


def stop():
    raise KeyboardInterrupt


def checkpoints(folder):
    """Steps of the checkpoints in the sub-folders."""
    found = []
    for path in folder.glob("*/checkpoint.safetensors"):
        with safe_open(path, "pt") as f:
            found.append(json.loads(f.metadata()["state"])["step"])
    return sorted(found)


def test_a_sweep_goes_on_from_runs_at_different_steps(acts, alone, calls, monkeypatch, tmp_path):
    options = {"out": tmp_path, "device": "cpu", "checkpoint_seconds": 0.0}
    interrupted(monkeypatch, 95, acts, SWEEP[:1], **options)  # further than most of the others go
    interrupted(
        monkeypatch, 32, acts, SWEEP[1:3], **options
    )  # now stopped at the first step of the second
    assert checkpoints(tmp_path) == [32, 95]
    interrupted(
        monkeypatch, 8 + 32 + 20 + 32, acts, SWEEP[:4][::-1], **options
    )  # in another order, with a new one
    assert checkpoints(tmp_path) == [64, 95] and len(list(tmp_path.glob("*/run.json"))) == 2
    calls.clear()
    assert_same(train_many(acts, SWEEP[:4], **options), alone[:4])
    assert calls == ["rows", "batches"]
    assert_same(train_many(acts, SWEEP, **options), alone)
    assert calls == ["rows", "batches"] * 2 and checkpoints(tmp_path) == []
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(name.split("-")[0] for name in names) == [
        "batchtopk",
        "gated",
        "jumprelu",
        "jumprelu",
        "topk",
    ]
    assert train(acts, SWEEP[1], out=next(tmp_path.glob("gated-*"))).log.equals(
        alone[1].log
    )  # the very same run


def test_a_sweep_never_overwrites_another(acts, tmp_path):
    short = [dataclasses.replace(SMALL, steps=3, seed=seed) for seed in (0, 1)]
    train_many(acts, short, out=tmp_path, device="cpu")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match="holds a finished run with other activations, another configuration"
    ):
        train_many(
            activations_from_tensor(planted(seed=1)[0], tmp_path / "other acts"),
            short,
            out=tmp_path,
            device="cpu",
        )
    train_many(acts, [short[1], dataclasses.replace(short[0], lr=1e-3)], out=tmp_path, device="cpu")
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(ValueError, match=r"configs\[0\] and configs\[2\] are the same"):
        train_many(acts, [short[0], short[1], short[0]], device="cpu")


def test_one_that_diverges_is_named_and_costs_the_others_nothing(acts, alone, tmp_path):
    diverging = dataclasses.replace(SWEEP[0], architecture="relu", lr=1e30, unit_norm=False)
    with pytest.raises(
        FloatingPointError,
        match=r"run 2 of 3, relu diverged before step \d+: .*Lower lr \(now 1e\+30\)",
    ):
        train_many(acts, [SWEEP[0], diverging, SWEEP[2]], out=tmp_path, device="cpu")
    assert checkpoints(tmp_path) == [BLOCK]  # of the first run's first turn
    assert_same(
        train_many(acts, [SWEEP[0], SWEEP[2]], out=tmp_path, device="cpu"), [alone[0], alone[2]]
    )


def test_the_progress_bar_says_which_run_is_at_work(acts, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        module, "tqdm", lambda **options: tqdm(file=shown, disable=False, ncols=300, **options)
    )
    train_many(acts, SWEEP[:2], device="cpu")
    last = shown.getvalue().split("\r")[-1]
    assert (
        "run 1 of 2, jumprelu: " in shown.getvalue() and "run 2 of 2, gated: " in shown.getvalue()
    )
    assert "140/140" in last and all(
        f"{name}=" in last for name in ("L0", "FVU", "dead", "tokens_s", "waiting")
    )
    train(acts, SWEEP[3], device="cpu")
    assert "training batchtopk: 100%" in shown.getvalue().split("\r")[-1]


WAITS = """
import logging, sys, importlib
from jumprelu.activations import open_activations
from jumprelu.recipe import TrainConfig
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
train = importlib.import_module("jumprelu.train")
taken, step = [], train.train_step
train.train_step = lambda *a, **k: (taken.append(1), step(*a, **k))[1]
config = TrainConfig(d_sae=48, steps=60, batch_size=128, k=3, dead_after=2_000, sparsity=3e-3)
sae, log = train.train(open_activations(sys.argv[1]), config, out=sys.argv[2], device="cpu")
print(len(taken), sae.fingerprint)
"""


@pytest.mark.slow
def test_a_second_process_waits_and_reads_the_result(acts, tmp_path, monkeypatch):
    command = [sys.executable, "-c", WAITS, str(acts.folder), str(tmp_path / "run")]
    other = []

    def start_the_other(*args, **options):
        if not other:
            other.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert "another process trains" in other[0].stdout.readline()
        return train_step(*args, **options)

    monkeypatch.setattr(module, "train_step", start_the_other)
    sae, _ = train(acts, SMALL, out=tmp_path / "run", device="cpu")
    output, _ = other[0].communicate(timeout=120)
    assert output.split() == ["0", sae.fingerprint] and other[0].returncode == 0


def test_no_thread_is_left(acts, tmp_path):
    before = threading.enumerate()
    train(acts, dataclasses.replace(SMALL, steps=3), device="cpu")
    assert threading.enumerate() == before
    with pytest.raises(FloatingPointError):
        train(
            acts,
            dataclasses.replace(SMALL, architecture="relu", lr=1e30, unit_norm=False),
            device="cpu",
        )
    assert threading.enumerate() == before


# ---- transcoders


@pytest.mark.parametrize("architecture", SPARSITY_LOSSES)
def test_a_transcoder_predicts_its_targets(tmp_path, acts, architecture):
    g = torch.Generator().manual_seed(0)
    x = torch.cat([shard.activations for shard in acts.shards()])
    y = ((x - 5) @ torch.randn(16, 16, generator=g)).relu() * 0.3 - 2
    targets = activations_from_tensor(y, tmp_path / "targets")
    config = dataclasses.replace(SMALL, architecture=architecture, steps=400, sparsity=0.01, k=6)
    sae, log = train(acts, config, tmp_path / "run", device="cpu", targets=targets)
    error = (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert isinstance(sae, Transcoder) and error < 0.75 * log.fvu.iloc[0]
    assert error.item() == pytest.approx(
        log.fvu.iloc[-1], rel=0.25
    )  # of the last batch, in training's units
    again = SAE.load(tmp_path / "run")
    assert isinstance(again, Transcoder) and torch.equal(again(x), sae(x))
    if architecture != "topk":
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(48))


@pytest.mark.parametrize("architecture", SPARSITY_LOSSES)
def test_a_folded_transcoder_is_the_trained_one(tmp_path, acts, architecture):
    x = acts.rows(200)
    inputs, outputs = Inputs(20.0, x.mean(0)), Inputs(3.0, torch.arange(16.0))
    state = TrainState(
        acts,
        dataclasses.replace(SMALL, architecture=architecture),
        torch.device("cpu"),
        inputs,
        outputs,
    )
    trainee = state.trainee.eval()
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
        if architecture == "batchtopk":
            trainee.batch_threshold.fill_(0.05)
            expected = trainee(x / 20, 0.1, DENSE)
            acts_of = expected.pre.relu() * (expected.pre > 0.05)
            expected = acts_of @ trainee.W_dec + trainee.b_dec
        else:
            expected = trainee(x / 20, 0.1, DENSE).x_hat
        torch.testing.assert_close(state.fold(acts)(x), 3 * expected, rtol=1e-4, atol=1e-4)


def test_a_transcoder_resumes_bit_for_bit_and_a_sweep_gives_the_same(tmp_path, acts):
    targets = activations_from_tensor(
        torch.cat([shard.activations for shard in acts.shards()]).relu(), tmp_path / "targets"
    )
    config = dataclasses.replace(SMALL, stop_after=1.0)
    whole = train(acts, config, device="cpu", targets=targets)
    many = train_many(
        acts, [config, dataclasses.replace(config, lr=1e-3)], device="cpu", targets=targets
    )
    assert torch.equal(many[0].sae.W_dec, whole.sae.W_dec) and many[0].log.equals(whole.log)


def test_targets_of_other_tokens_are_refused(tmp_path, acts):
    few = activations_from_tensor(torch.randn(100, 16), tmp_path / "few")
    narrow = activations_from_tensor(torch.randn(len(acts), 8), tmp_path / "narrow")
    with pytest.raises(ValueError, match="do not belong together.*rows.*Harvest both"):
        train(acts, SMALL, device="cpu", targets=few)
    with pytest.raises(ValueError, match="have 16, the targets 8"):
        train(acts, SMALL, device="cpu", targets=narrow)
    with pytest.raises(ValueError, match="resample"):
        train(acts, dataclasses.replace(SMALL, resample=(0.5,)), device="cpu", targets=acts)


@pytest.mark.parametrize(
    "sites, layers, message",
    [
        (("mlp_in", "resid_post"), (1, 1), "not resid_post of layer 1 from mlp_in"),
        (("mlp_in", "mlp_out"), (1, 0), "layer 0 from"),
        (("resid_post", "mlp_out"), (1, 1), "from resid_post"),
    ],
)
def test_only_an_mlp_has_transcoders(tmp_path, sites, layers, message):
    from jumprelu.corpus import Tokens
    from jumprelu.harvest import harvest
    from tests.models import random_ids, tiny_lm

    lm, tokens = tiny_lm(), Tokens(random_ids(6, 8), torch.arange(6))
    stores = [
        harvest(lm, tokens, site=site, layer=layer, out=tmp_path / f"{n}")
        for n, (site, layer) in enumerate(zip(sites, layers, strict=True))
    ]
    with pytest.raises(ValueError, match=message):
        train(stores[0], SMALL, device="cpu", targets=stores[1])
