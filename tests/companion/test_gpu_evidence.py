"""What is measured on a GPU, at tiny sizes: numbers that fit together, references that notice a
fault, files that resume."""

import dataclasses
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from companion.speed import gpu_clock, gpu_evidence
from companion.speed.gpu_clock import floor_ms, in_turns, peak_gb, stopwatch
from companion.speed.gpu_evidence import PARTS, machine, main
from companion.speed.gpu_kernels import measure_kernels, relative
from companion.speed.gpu_pipeline import (
    flops_a_token,
    measure_harvest,
    measure_run,
    random_gemma,
    random_tokens,
)
from companion.speed.gpu_sizes import FULL, GEMMA_2_9B, TINY
from companion.speed.gpu_step import WAYS, entries_of, matmuls, measure_step, planted

from jumprelu import kernels, sparse, support
from jumprelu.files import read_json
from jumprelu.recipe import TrainConfig
from jumprelu.sparse import SparsePolicy
from jumprelu.state import Inputs, TrainState
from jumprelu.support import DENSE

CPU = torch.device("cpu")
SMALLEST = dataclasses.replace(TINY, d_sae=48, widths=(48,), batch=16, l0=4, repeats=1)


@pytest.fixture(scope="module")
def lm():
    return random_gemma(TINY, CPU)


@pytest.fixture
def interpreted():
    """What tells the parts to use the kernels in Triton's interpreter."""
    pytest.importorskip("triton", minversion="3.8")  # older interpreters fail on NumPy 2.4
    if torch.cuda.is_available():
        pytest.skip("Triton was imported to compile")
    return {"triton": True}


# ---- the model, on paper


def test_gemma_2_9b_has_the_parameters_that_were_published():
    """Gemma 2's report: 8,324,201,984 besides embeddings; 9.24·10⁹ in all."""
    model = random_gemma(FULL, torch.device("meta")).model
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (
        total - GEMMA_2_9B["vocab_size"] * GEMMA_2_9B["hidden_size"] == 8_324_201_984
        and round(total / 1e7) == 924
    )
    assert (
        model.dtype == torch.bfloat16
        and model.config.attn_logit_softcapping == 50
        and model.config.layer_types[:2] == ["sliding_attention", "full_attention"]
    )


def test_flops_by_hand(lm):
    d, heads, head, inner = 32, 4, 16, 64
    weights = (
        d * heads * head * 2 + d * 2 * head * 2 + 3 * d * inner
    )  # q and o, k and v of 2 heads, MLP
    assert flops_a_token(lm, 3, 32) == 3 * (2 * weights + 4 * 32 * heads * head)


def test_the_floor_by_hand():
    weights = 2 * 3 * 5 + 2 * 5 + 3
    assert floor_ms(3, 5, 7, matmul_flops_s=10.0, copy_bytes_s=4.0) == pytest.approx(
        1e3 * (21 + 6 * weights)
    )
    at_9b = floor_ms(3584, 131_072, 4096, 790e12, 4.3e12)
    assert at_9b == pytest.approx(
        4.87 + 5.25, abs=0.02
    )  # 24 bytes a weight: between the 19 and the 26 GB of other accounts


# ---- measuring


def test_relative_by_hand():
    one, other = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.2])
    assert relative([one], [one.double()]) == 0 and relative([one[:1]], [one]) == float("inf")
    assert relative([one.int(), other], [one.int(), one]) == pytest.approx(0.05)
    assert relative([one * torch.nan, one], [one, one]) != relative(
        [one, one], [one, one]
    )  # NaN is not lost
    assert relative([one, one * torch.nan], [one, one]) != 0


class Clock:
    """Stands still but where it is told to go on."""

    def __init__(self, monkeypatch):
        self.seconds = 100.0
        monkeypatch.setattr(gpu_clock, "now", lambda device: self.seconds)

    def sleep(self, seconds):
        self.seconds += seconds


def test_in_turns_is_a_median_of_all_but_the_first(monkeypatch):
    clock, order, naps = Clock(monkeypatch), [], iter([9.0, 0.3, 0.1, 0.2, 5.0])

    def nap():
        order.append("nap")
        clock.sleep(next(naps))

    found = in_turns({"nap": nap, "nothing": lambda: order.append("nothing")}, 4, CPU)
    assert order == ["nap", "nothing"] * 5
    assert (
        found["nap"][0] == pytest.approx(250) and found["nothing"][0] == 0 and found["nap"][1] > 0
    )


def test_the_stopwatch_counts_a_call_within_another_once(monkeypatch):
    clock = Clock(monkeypatch)

    class Thing:
        def outer(self, seconds):
            clock.sleep(seconds)
            return self.inner(1) + self.inner(to=2) + self.untimed()

        def inner(self, to):
            clock.sleep(to)
            return to

        def untimed(self):
            clock.sleep(10)
            return 0

    before = Thing.outer
    with stopwatch(CPU, [("outer", Thing, "outer"), ("inner", Thing, "inner")]) as seconds:
        assert Thing().outer(4) == 3 and Thing().inner(100) == 100
    assert seconds == pytest.approx({"outer": 14, "inner": 103}) and Thing.outer is before


def test_peak_memory_of_a_gpu_begins_anew(monkeypatch):
    used = [3e9]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used[0])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: used.__setitem__(0, 1e9)
    )
    assert [peak_gb(torch.device("cuda")) for _ in range(2)] == [3.0, 1.0]


def test_the_precision_of_matmuls_comes_back():
    with pytest.raises(KeyError), matmuls("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_dense_ways_are_dense_and_without_kernels():
    config, inputs = TrainConfig(d_sae=64, threshold_init=0.5), Inputs(1.0, torch.zeros(32))
    state = TrainState(SimpleNamespace(d_in=32), config, CPU, inputs)
    x = planted(state.trainee, 20, 4)
    assert state.trainee.layout(x, 0.02, WAYS["ours"][0]) is not DENSE
    for way in ("dense", "dense, TF32"):
        policy = WAYS[way][0]
        assert state.trainee.layout(x, 0.02, policy) is DENSE and policy.triton is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_entries_are_those_of_dense_arithmetic(dtype):
    policy = SparsePolicy(dense_above=1.0, bf16_below=1.0)
    config = TrainConfig(d_sae=64, bandwidth=0.1, encoder_dtype=dtype)
    inputs = Inputs(1.0, torch.zeros(32))
    trainee = TrainState(SimpleNamespace(d_in=32), config, CPU, inputs).trainee
    x = planted(trainee, 256, 4)
    assert x.square().sum(-1).mean().item() == pytest.approx(1, rel=1e-5)
    with torch.no_grad():
        pre, theta = x @ trainee.W_enc, trainee.threshold
    l0, entries, candidates = entries_of(trainee, x, config.bandwidth, policy)
    assert (pre > theta).sum().item() / 256 == pytest.approx(
        4, abs=0.005
    )  # the entry that θ was set by, or not
    assert l0 == pytest.approx((pre > theta).sum().item() / 256, abs=0.005)
    assert entries == pytest.approx((pre > theta - 0.05).sum().item() / 256, abs=0.005)
    assert l0 < entries and (
        entries < candidates < 64 if dtype == "bfloat16" else entries == candidates
    )


# ---- the parts


def test_every_kernel_is_near_its_reference(interpreted):
    table, _ = measure_kernels(SMALLEST, CPU, **interpreted)
    public = {
        name
        for name, value in vars(kernels).items()
        if callable(value) and value.__module__ == kernels.__name__
    }
    exact = table[table.kernel.isin(["compact", "transposed"])]
    assert set(table.kernel) == {name for name in public if name.islower() and name[0] != "_"} - {
        "serves",
        "jit",
    }
    assert (
        (exact.error == 0).all()
        and len(exact) == 3
        and table.error.between(0, 1e-6).all()
        and (table.ms > 0).all()
    )


@pytest.mark.parametrize("name", ["compact", "transposed", "dots", "bag", "totals", "adam"])
def test_a_wrong_kernel_is_noticed(name, interpreted, monkeypatch):
    right = getattr(kernels, name)

    def wrong(*arguments):
        if name == "adam":  # twice the learning rate
            return right(*arguments[:4], 2 * arguments[4], *arguments[5:])
        found = right(*arguments)
        return (*found[:2], found[2].flip(0)) if isinstance(found, tuple) else found * 1.001

    monkeypatch.setattr(kernels, name, wrong)
    smaller = dataclasses.replace(SMALLEST, d_sae=24, batch=8, repeats=1)
    table, _ = measure_kernels(smaller, CPU, **interpreted)
    touched = table.kernel == name
    assert (table[touched].error > 5e-4).all() and (table[~touched].error < 1e-6).all()


def test_without_kernels_there_is_nothing_to_check():
    table, facts = measure_kernels(TINY, CPU)
    assert (
        list(table.columns) == ["kernel", "size", "error", "ms"]
        and table.empty
        and facts == {"rows": 0}
    )


def check_step(table, size):
    assert (table.tokens_s * table.ms).to_numpy() == pytest.approx(1e3 * size.batch)
    assert list(table.d_sae.unique()) == list(size.widths) and (table.batch == size.batch).all()
    assert table.drop(columns="peak_gb").notna().all(axis=None) and (table.ms > 0).all()
    for _, rows in table.groupby("d_sae"):
        ms = rows.set_index("way").ms
        assert (rows.ratio_to_floor * ms["floor"]).to_numpy() == pytest.approx(rows.ms.to_numpy())
        assert set(WAYS) < set(ms.index) and (rows[rows.way.isin(WAYS)].peak_gb > 0).all()
        assert {
            "ours: search: matmul",
            "ours: search: compaction",
            "ours: sums",
            "ours: Adam",
            "ours: all else",
        } < set(ms.index)
    assert (table.l0 / size.l0).between(0.7, 1.4).all() and (table.entries >= table.l0).all()
    assert (table.candidates >= table.entries).all()


def test_a_step_is_timed_in_every_way():
    before = sparse.screen, support.dots, torch.mm
    table, facts = measure_step(TINY, CPU)
    check_step(table, TINY)
    assert before == (sparse.screen, support.dots, torch.mm)
    for d_sae in TINY.widths:
        floor = table[(table.way == "floor") & (table.d_sae == d_sae)].ms.item()
        assert floor == floor_ms(32, d_sae, TINY.batch, **facts[f"rates at {d_sae}"])


def test_a_step_is_timed_with_kernels(interpreted):
    table, _ = measure_step(SMALLEST, CPU, **interpreted)
    check_step(table, SMALLEST)
    ms = table.set_index("way").ms
    assert (
        ms["ours"] > 10 * ms["dense"]
    )  # the interpreter is slow: so it was the kernels that ran, and only in ours


def test_a_harvest_is_timed(lm):
    table, facts = measure_harvest(TINY, CPU, lambda: lm)
    (row,) = table.itertuples()
    assert (
        row.layers == "1 2 3"
        and row.tokens == 16 * 32
        and row.tokens_s * row.seconds == pytest.approx(row.tokens)
    )
    assert row.forward_s > 0 and row.fingerprint_s > 0 and row.peak_gb > 0
    assert row.forward_s + row.lost_s == pytest.approx(row.seconds)
    assert (
        3 * 2 * 32 * 16 * 31 < row.gb * 1e9 < 2 * 3 * 2 * 32 * 16 * 31
    )  # three sites, 2 bytes, no BOS; and ids and headers
    assert facts["flops"] == flops_a_token(lm, 4, 32) * row.tokens  # blocks 0 to 3
    assert row.roofline_share == pytest.approx(
        facts["flops"] / row.seconds / facts["matmul_flops_s"]
    )


def test_a_run_goes_from_end_to_end(lm):
    table, facts = measure_run(TINY, CPU, lambda: lm)
    assert table.stage.tolist() == ["harvest", "train", "evaluate"] and table.tokens.tolist() == [
        16 * 32,
        5 * 64,
        2 * 32,
    ]
    assert (table.seconds > 0).all() and (
        table.tokens_s * table.seconds
    ).to_numpy() == pytest.approx(table.tokens.to_numpy())
    assert (
        0 < facts["waiting_for_data_s"] < table.seconds[1]
        and 0 < facts["l0"] < 256
        and facts["fvu"] > 0
    )


def test_tokens_are_ordinary_ones_after_bos(lm):
    ids = random_tokens(TINY, 40, 0)
    assert (
        ids.shape == (40, 32)
        and (ids[:, 0] == 2).all()
        and not torch.isin(ids[:, 1:], torch.tensor(lm.special_ids)).any()
    )
    assert ids.max() < 300 and not torch.equal(ids, random_tokens(TINY, 40, 1))


# ---- files, and the command line


def test_all_of_it_and_again(tmp_path, capsys, monkeypatch):
    command = ["--device", "cpu", "--size", "tiny", "--out", str(tmp_path)]
    assert main(command) == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"gpu_evidence.json", *(f"gpu_{part}.csv" for part in PARTS)}
    records, cpu = read_json(tmp_path / "gpu_evidence.json"), f"CPU, {platform.machine()}"
    for part in PARTS:
        table, record = pd.read_csv(tmp_path / f"gpu_{part}.csv"), records[part]
        assert (table.device == cpu).all() and (len(table) > 0) == (part != "kernels")
        assert (
            record["device"] == cpu
            and record["size"] == str(TINY)
            and record["torch"] == torch.__version__
        )
    shown = capsys.readouterr().out
    assert all(f"{part}: {cpu}" in shown for part in PARTS)

    def never(*arguments):
        raise AssertionError("it is there")

    with monkeypatch.context() as without:
        for part in PARTS:
            without.setitem(PARTS, part, never)
        assert main(command) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert f"step: {cpu}" in capsys.readouterr().out  # shown all the same


def small_part(size, device, lm):
    return pd.DataFrame({"n": [size.batch]}), {"more": 1}


def test_what_counts_as_there(tmp_path, monkeypatch):
    calls = []
    for part in PARTS:
        monkeypatch.setitem(
            PARTS, part, lambda *given, part=part: calls.append(part) or small_part(*given)
        )
    command = ["--device", "cpu", "--size", "tiny", "--out", str(tmp_path), "--parts"]

    def measured(*more):
        calls.clear()
        assert main([*command, *more]) == 0
        return calls.copy()

    assert (
        measured("step,run") == ["step", "run"]
        and measured("step,harvest") == ["harvest"]
        and measured("step") == []
    )
    assert measured("step", "--again") == ["step"]
    (tmp_path / "gpu_run.csv").unlink()
    assert measured("run,step") == ["run"]
    with monkeypatch.context() as other:
        other.setattr(gpu_evidence, "TINY", SMALLEST)
        assert measured("step") == ["step"]
    assert measured("step") == ["step"] and measured("step") == []
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert (
        measured("step") == ["step"]
        and pd.read_csv(tmp_path / "gpu_step.csv").device.item() == "CPU, another"
    )
    (tmp_path / "gpu_evidence.json").unlink()
    assert measured("step") == ["step"]


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(*given):
        raise RuntimeError("out of memory, for example")

    monkeypatch.setitem(PARTS, "step", broken)
    monkeypatch.setitem(PARTS, "run", small_part)
    assert (
        main(["--device", "cpu", "--size", "tiny", "--out", str(tmp_path), "--parts", "step,run"])
        == 1
    )
    assert "out of memory, for example" in capsys.readouterr().out
    assert (
        list(read_json(tmp_path / "gpu_evidence.json")) == ["run"]
        and not (tmp_path / "gpu_step.csv").exists()
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (["--device", "cpu", "--size", "tiny"], "another folder than figures"),
        (["--device", "cpu", "--out", "elsewhere"], "give --size tiny"),
        (
            ["--device", "cpu", "--size", "tiny", "--out", "elsewhere", "--parts", "step,walk"],
            "no part 'walk'",
        ),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_what_is_refused(given, message, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (root / "figures").glob("gpu_*")}
    assert main(given) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in (root / "figures").glob("gpu_*")} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs(capsys):
    assert main([]) == 2
    assert "PyTorch sees no GPU: --device cpu --size tiny --out FOLDER" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_the_driver_is_asked(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\necho "580.1, 1980 MHz, 3201 MHz, 700.00 W"\necho "580.1, 1 MHz, 2 MHz, 3 W"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine(CPU)
    assert (
        found["driver_version"] == "580.1"
        and found["clocks.max.sm"] == "1980 MHz"
        and found["power.limit"] == "700.00 W"
    )
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "driver_version" not in machine(CPU)
    tool.unlink()
    assert machine(CPU).keys() == {"device", "torch", "cuda", "transformers", "triton"}


@pytest.mark.slow
def test_python_m_runs_it_without_jupyter():
    code = """
import runpy, sys
for name in ("IPython", "ipykernel", "jupytext", "nbformat", "nbclient", "papermill"):
    sys.modules[name] = None
sys.argv = ["gpu_evidence", "--help"]
runpy.run_module("companion.speed.gpu_evidence", run_name="__main__")
"""
    shown = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "--parts" in shown.stdout, shown.stderr
