"""The benchmark at a size of seconds. Tests of other libraries' adapters run where those are
installed (`make benchmark`)."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec

import pandas as pd
import pytest
import torch
from companion.speed import benchmark, quality, trainers
from companion.speed.benchmark import COLUMNS
from companion.speed.neighbour import neighbour_table
from companion.speed.peers import DISTRIBUTIONS, in_our_form, peer_trainer, version
from companion.speed.quality import OURS, fvu, synthetic_activations
from companion.speed.trainers import BASELINE, FLOOR, QUICK_SIZES, Pool, Size, System

from jumprelu.architectures import Trainee
from jumprelu.files import read_json
from jumprelu.recipe import TrainConfig

MODULES = {
    "SAELens": "sae_lens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
}
INSTALLED = [peer for peer, module in MODULES.items() if find_spec(module)]
SIZE = Size(16, 64, 32, 5, "synthetic")


@pytest.fixture(autouse=True)
def kept(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path_factory.getbasetemp() / "benchmark-cache"))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool():
    return Pool(3 * synthetic_activations(16 * 32, 16) + 0.1)


# ---- data and ours


def test_synthetic_activations_have_the_stated_make_up():
    x = synthetic_activations(4096, 64)
    assert x.square().sum(-1).mean() == pytest.approx(1, abs=0.05)
    assert x.mean(0).square().sum() == pytest.approx(0.35, abs=0.05)
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    assert 2 < spectrum[0] / spectrum[31] < 100  # neither flat nor of low rank
    assert torch.equal(x, synthetic_activations(4096, 64)) and not torch.equal(
        x, synthetic_activations(4096, 64, seed=1)
    )


@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "gated"])
def test_set_l0(architecture, pool):
    x = pool.x / pool.x.square().sum(-1).mean().sqrt()
    trainee = Trainee(16, TrainConfig(architecture, 64), torch.Generator().manual_seed(0))
    for target in (20, 5):
        trainers.set_l0(trainee, x, target)
        assert (
            trainee(x, 0.1).layout.per_token((trainee(x, 0.1).acts > 0).float())
        ).mean() == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_timed_steps_leave_the_state_as_it_is(dtype, pool):
    trainer = trainers.our_trainer(pool, SIZE, "jumprelu", dtype)
    before, entries = trainer.finish().sae, trainer.entries(pool.x[:32])
    for x in pool.x.split(32):
        trainer.step(x)
    after = trainer.finish().sae
    assert not torch.equal(before.W_dec, after.W_dec)  # they are real steps
    assert (
        torch.allclose(before.W_dec, after.W_dec, atol=1e-6)
        and trainer.entries(pool.x[:32]) == entries
    )
    l0 = (after.encode(pool.x) > 0).sum(-1).float().mean()
    assert l0 == pytest.approx(SIZE.l0, rel=0.2) and l0 <= entries <= 64


# ---- measuring


def test_turns_are_interleaved_on_the_same_batches():
    seen = []
    calls = {name: lambda x, name=name: seen.append((name, int(x))) for name in "ab"}
    seconds = benchmark.interleaved(calls, torch.arange(3), rounds=3, turn=2)
    rounds = [(0, 1), (2, 0), (1, 2)]
    assert seen == [(name, number) for batches in rounds for name in "ab" for number in batches]
    assert [len(each) for each in seconds.values()] == [3, 3] and all(
        t > 0 for each in seconds.values() for t in each
    )


def test_the_floor_is_the_product_alone():
    product = trainers.encoder_product(SIZE, "bfloat16")
    out = product(None)
    assert (
        out.shape == (32, 64)
        and out.dtype == torch.bfloat16
        and product(None).data_ptr() == out.data_ptr()
    )


@pytest.mark.filterwarnings("ignore")
def test_speed_table(pool):
    table = benchmark.speed_table(SIZE, pool, rounds=3, turn=1, memory=False)
    assert tuple(table.columns) == COLUMNS
    training = table[table.task == "train"].set_index(["system", "architecture", "dtype"])
    assert set(trainers.systems()) == {System(*key) for key in training.index if key[0] != FLOOR}
    ran = table[table.tokens_per_s.notna()]
    assert (ran.tokens_per_s_q1 <= ran.tokens_per_s).all() and (
        ran.tokens_per_s <= ran.tokens_per_s_q3
    ).all()
    assert set(ran.system) == {OURS, FLOOR, *INSTALLED} and ran.error.isna().all()
    missing = table[~table.index.isin(ran.index)]
    assert set(missing.system) == set(DISTRIBUTIONS) - set(INSTALLED)
    assert all("not installed" in error for error in missing.error)  # the row is there and says why
    speed = training.tokens_per_s
    assert training.ours_over_this[BASELINE] == 1
    assert speed[FLOOR, "one product", "float32"] == pytest.approx(
        5 * speed[FLOOR, "five products", "float32"]
    )
    ours = training.loc[BASELINE]
    assert ours.times_floor1 == pytest.approx(
        speed[FLOOR, "one product", "float32"] / ours.tokens_per_s
    )
    assert ours.times_floor2 == pytest.approx(ours.times_floor1 / 5)
    assert training.l0[OURS, "topk", "float32"] == SIZE.l0


@pytest.mark.slow
def test_memory_is_that_of_the_steps(tmp_path):
    size = Size(64, 16384, 64, 8, "synthetic")
    pool = Pool(synthetic_activations(256, 64))
    trainers.warmed(pool, size, "jumprelu")
    row = System(OURS, "jumprelu")
    used = benchmark.peak_memory([row], size, pool)[row]
    weights = 2 * 64 * 16384 * 4 / 2**20  # MiB; at least the moments come on top
    assert 2 * weights < used < 40 * weights


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_tables_and_the_machine(tmp_path, capsys):
    arguments = [
        "--quick",
        "--only",
        "speed",
        "--rounds",
        "2",
        "--turn",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    benchmark.main(arguments)
    table = pd.read_csv(tmp_path / "benchmark.csv")
    assert tuple(table.columns) == COLUMNS and (table.d_sae == QUICK_SIZES[0].d_sae).all()
    ours = table[(table.task == "train") & (table.system == OURS)]
    assert (
        ours.peak_mb.notna() == (ours["dtype"] == "float32")
    ).all()  # one a system and architecture
    assert set(pd.read_csv(tmp_path / "benchmark_profile.csv").search) == {"float32", "bfloat16"}
    facts = read_json(tmp_path / "benchmark.json")
    assert (
        facts["threads"] == 1 and facts["torch"] == torch.__version__.split("+")[0] and facts["cpu"]
    )
    assert {peer for peer, there in facts["peers"].items() if there} == set(INSTALLED)
    assert "times_floor1" in capsys.readouterr().out


def test_rows_of_other_machines_are_kept(tmp_path):
    path = tmp_path / "table.csv"
    for machine, ms in (("a", 1), ("b", 2), ("a", 3)):
        benchmark.add_rows(path, pd.DataFrame({"ms": [ms, ms], "machine": machine}))
    table = pd.read_csv(path)
    assert table.machine.tolist() == ["b", "b", "a", "a"] and table.ms.tolist() == [2, 2, 3, 3]


@pytest.mark.filterwarnings("ignore")
def test_density_alone(tmp_path):
    benchmark.main(["--quick", "--only", "density", "--threads", "1", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "benchmark_density.csv")
    assert table.density.between(0, 1).all() and table.machine.str.startswith("1 threads").all()


@pytest.mark.slow
def test_both_ways_of_waiting_are_timed_with_and_without_a_neighbour():
    table = neighbour_table(QUICK_SIZES[0], threads=1, rounds=2, steps=1)
    assert len(table) == 6 and not table.duplicated(["waiting", "neighbour"]).any()
    assert (table.ms > 0).all() and (table.q1 <= table.q3).all()
    assert set(table.waiting) == {"spin", "spin briefly", "sleep"}


# ---- quality


@pytest.mark.filterwarnings("ignore")
def test_quality_goes_on_where_it_stopped(tmp_path, capsys):
    benchmark.main(["--quick", "--only", "quality", "--out", str(tmp_path)])
    first = pd.read_csv(tmp_path / "benchmark_quality.csv")
    assert list(first.columns) == list(quality.COLUMNS)
    assert set(first.system) == {OURS, "SAELens", "dictionary_learning"}
    ran = first[first.l0.notna()]
    assert set(ran.system) == {OURS, *INSTALLED} - {"sparsify"}
    assert ran.l0.between(0, 64).all() and (ran.fvu > 0).all() and (ran.tokens == 2048).all()
    again = quality.quality_table(quality.make_plan(quality.SETTINGS, quick=True))
    # the runs themselves are not repeated: their seconds would differ
    assert again.seconds.dropna().tolist() == pytest.approx(ran.seconds.tolist(), rel=1e-4)


def test_the_scan_changes_one_setting_at_a_time():
    base = {each.system: each for each in quality.SETTINGS if each.name in ("default", "adapted")}
    scanned = quality.scan_settings()
    assert (
        len({(each.system, each.name) for each in scanned})
        == len(scanned)
        == 1 + sum(map(len, quality.GRID.values()))
    )
    for each in scanned:
        changed = dict(each.options.items() - base[each.system].options.items())
        if each.batch_size != base[each.system].batch_size:
            changed["batch_size"] = each.batch_size
        assert each.system == OURS or changed in quality.GRID[each.system]


def test_shares_of_the_run_become_steps():
    given = {"lr_warm_up_steps": 0.05, "decay_start": 0.8, "lr": 0.5, "target_l0": 20.0}
    assert quality.in_steps(given, 200) == {
        "lr_warm_up_steps": 10,
        "decay_start": 160,
        "lr": 0.5,
        "target_l0": 20.0,
    }


# ---- other libraries


@pytest.mark.parametrize("k", [None, 3])
def test_in_our_form(k):
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec, x = (
        torch.randn(shape, generator=generator) for shape in ((4, 9), (9, 4), (50, 4))
    )
    b_enc, b_dec, b_in, threshold = (torch.randn(n, generator=generator) for n in (9, 4, 4, 9))
    threshold = threshold.abs() if k is None else torch.zeros(9)
    sae = in_our_form("jumprelu", W_enc, b_enc, W_dec, b_dec, b_in, threshold, scale=2.5, k=k)
    pre = (x / 2.5 - b_in) @ W_enc + b_enc
    acts = pre.relu() * (pre > threshold)
    if k is not None:
        acts *= acts >= acts.topk(k).values[:, -1:]
    assert torch.allclose(sae(x), 2.5 * (acts @ W_dec + b_dec), atol=1e-5)
    assert torch.equal(sae.encode(x) > 0, acts > 0) and sae.origin.input_scale == 2.5


@pytest.mark.skipif(len(INSTALLED) == len(MODULES), reason="all are installed")
def test_a_peer_that_is_not_there_is_named():
    with pytest.raises(ModuleNotFoundError, match="make benchmark"):
        version(next(peer for peer in MODULES if peer not in INSTALLED))


CASES = [
    ("SAELens", "jumprelu", {"l0_coefficient": 0.5, "pre_act_loss_coefficient": 3e-6, "lr": 1e-2}),
    (
        "SAELens",
        "jumprelu",
        {"normalize_activations": "none", "l0_coefficient": 1e-3, "lr": 1e-2, "b_dec_init": "mean"},
    ),
    ("SAELens", "relu", {"lr": 1e-2}),
    ("SAELens", "topk", {"k": 4, "lr": 1e-2}),
    (
        "dictionary_learning",
        "jumprelu",
        {"warmup_steps": 2, "sparsity_warmup_steps": 2, "lr": 1e-2, "threshold_init": 0.1},
    ),
    (
        "dictionary_learning",
        "relu",
        {"warmup_steps": 2, "sparsity_warmup_steps": 2, "lr": 1e-2, "l1_penalty": 0.01},
    ),
    ("dictionary_learning", "topk", {"k": 4, "warmup_steps": 2, "lr": 1e-2}),
    ("sparsify", "topk", {"k": 4}),
]


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    ("peer", "architecture", "options"),
    [pytest.param(*case, id="-".join(case[:2])) for case in CASES],
)
def test_adapter(peer, architecture, options, pool):
    """It learns, and what it learned is the same SAE in our form."""
    if peer not in INSTALLED:
        pytest.skip("not installed")
    trainer = peer_trainer(peer, architecture, 64, 100, 32, pool.x, **options)
    start = trainer.finish().sae
    for step in range(100):
        trainer.step(pool.x[32 * (step % 16) :][:32])
    with torch.no_grad():
        theirs, sae = trainer.finish()
        reconstruction = theirs(pool.x)
        error = (sae(pool.x) - reconstruction).norm(dim=-1) / reconstruction.norm(dim=-1)
        assert error.max() < 1e-5
        assert fvu(pool.x, reconstruction) < fvu(pool.x, start(pool.x))
    if architecture == "topk":
        assert ((sae.encode(pool.x) > 0).sum(-1) <= 4).all()
    again = peer_trainer(peer, architecture, 64, 100, 32, pool.x, **options)
    assert torch.equal(again.finish().sae.W_enc, start.W_enc)  # the seed fixes it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", INSTALLED)
def test_adapter_names_what_it_has(peer, pool):
    with pytest.raises(
        ValueError, match=f"{peer} has no trainer for 'gated' here: expected one of .*topk"
    ):
        peer_trainer(peer, "gated", 64, 100, 32, pool.x)


# ---- the environment


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}


def test_the_lock_of_the_peers_adds_to_the_lock(root):
    peers, ours = pins(root / "requirements-peers.lock"), pins(root / "requirements.lock")
    assert set(DISTRIBUTIONS.values()) <= peers and "torchvision" not in peers
    assert not peers & ours  # torch above all is one pin


def test_the_environment_of_the_peers_is_not_the_users(root):
    def ignored(path):
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=root).returncode == 0

    command = [
        "make",
        "-n",
        "benchmark",
        f"PYTHON={sys.executable}",
        "PIP_ARGS=--some-option",
        "ARGS=--only speed",
    ]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "--some-option --no-deps -r requirements-peers.lock" in shown
    assert ".venv-peers/bin/python -m companion.speed.benchmark --only speed" in shown
    assert (
        ignored(".venv-peers/bin/python")
        and ignored(".venv/bin/python")
        and not ignored("requirements-peers.lock")
    )
