"""Training the embedded language model, at a size of seconds, in a real process that is really
killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from companion.subject import train_lm as module
from companion.subject.train_lm import (
    LMConfig,
    gemma_config,
    learning_rate,
    make_optimizers,
    train_lm,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jumprelu.files import read_json

ROOT = Path(__file__).resolve().parents[2]


def config(source: Path, tokens: int = 64 * 32 * 4) -> LMConfig:
    return LMConfig(
        vocab_size=320,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        d_mlp=24,
        sliding_window=8,
        context_size=32,
        batch_rows=4,
        tokens=tokens,
        warmup=0.1,
        source=str(source),
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(500):  # enough for each split to get some
        lines = (f"def function_{i}_{j}(x):\n    return x + {j}\n\n" for j in range(20))
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


def test_the_folder_is_what_transformers_loads(source, tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    given = config(source)
    out = train_lm(given, tmp_path / "lm", compiled=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    text = "def function_3_4(x):\n    return x + 4 λ\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), given.vocab_size)

    log, made = pd.read_csv(out / "training.csv"), read_json(out / "training.json")
    assert list(log.columns) == ["step", "tokens", "train_loss", "lr_factor", "heldout_loss"]
    assert log.step.iloc[-1] == 64 and log.tokens.iloc[-1] == given.tokens
    assert log.heldout_loss.iloc[-1] < log.train_loss.iloc[0]  # it has learnt something
    assert (
        made["config"]["d_model"] == 16 and "corpus" not in made
    )  # a streamed source has no fingerprint


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_train_lm import config, train_lm
torch.set_num_threads(1)
train_lm(config(Path({source!r}), {tokens}), Path({out!r}), checkpoint_seconds=0, compiled=False)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(source, tmp_path, monkeypatch):
    tokens = 200 * 32 * 4
    given = config(source, tokens)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "whole"))
        whole = train_lm(given, tmp_path / "lm_whole", compiled=False)

        monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "killed"))
        script = SCRIPT.format(
            tests=str(Path(__file__).parent),
            source=str(source),
            tokens=tokens,
            out=str(tmp_path / "lm_killed"),
        )
        paths = os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE
        ) as process:
            deadline = time.monotonic() + 60
            while not (found := list((tmp_path / "killed/lm").glob("checkpoint-*.pt"))):
                assert process.poll() is None, process.stderr.read().decode()
                assert time.monotonic() < deadline, "no checkpoint within a minute"
                time.sleep(0.005)
            process.kill()
        step = torch.load(found[0], weights_only=True)["step"]
        assert 0 < step < 200 and not (tmp_path / "lm_killed").exists()

        resumed = train_lm(given, tmp_path / "lm_killed", compiled=False)
    finally:
        torch.set_num_threads(threads)
    expected, weights = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    pd.testing.assert_frame_equal(
        pd.read_csv(whole / "training.csv"), pd.read_csv(resumed / "training.csv")
    )


def test_learning_rate_rises_stays_and_falls_to_zero():
    given = LMConfig(warmup=0.1, decay=0.5)
    factors = [learning_rate(progress, given) for progress in (0, 0.05, 0.1, 0.3, 0.5, 0.75, 1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])


def test_every_parameter_is_in_one_optimizer(source):
    model = module.Gemma2ForCausalLM(gemma_config(config(source)))
    groups = [
        group
        for optimizer in make_optimizers(model, config(source))
        for group in optimizer.param_groups
    ]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(source, tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "learning_rate", lambda progress, given: float("nan"))
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 50: lower lr and start again"
    ):
        train_lm(config(source), tmp_path / "out", compiled=False)
    assert not (tmp_path / "out").exists()
