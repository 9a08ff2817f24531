"""The command line: each command on a tiny model, and what it says to mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from models import D_MODEL, save_tiny

import jumprelu as jr
from jumprelu.__main__ import COMMANDS, main, read_config
from jumprelu.activations import activations_from_tensor
from jumprelu.hub_access import needs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Arguments that name a tiny model and a corpus for it."""
    folder = tmp_path_factory.mktemp("text")
    save_tiny("gemma2", folder / "model", tokenizer=True)
    lines = [json.dumps({"text": f"document {n}: " + "some words " * 9}) for n in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    corpus = folder / "corpus.jsonl"
    return f"--model {folder}/model --corpus {corpus} --context-size 16 --device cpu".split()


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_from_text_to_a_report(text, tmp_path, capsys):
    acts, sae = tmp_path / "acts", tmp_path / "sae"
    harvest = ("harvest", *text, "--rows", 40, "--layer", 1, "--out", acts, "--dtype", "bfloat16")
    assert run(*harvest) == 0
    assert str(acts) in capsys.readouterr().out
    assert len(jr.open_activations(acts)) == 40 * 15  # without <bos>
    (tmp_path / "c.yaml").write_text("d_sae: 24\nsteps: 99\nlr: 1e-2\nbetas: [0, 0.99]\n")
    train = ("train", acts, "--config", tmp_path / "c.yaml", "--set", "steps=12")
    assert run(*train, "--set", "batch_size=64", "--device", "cpu", "--out", sae) == 0
    assert f"written to {sae}" in capsys.readouterr().out
    found = jr.load_sae(sae)
    assert (found.d_in, found.d_sae, found.origin.layer) == (D_MODEL, 24, 1)
    assert found.origin.training["steps"] == 12 and found.origin.training["lr"] == 0.01
    assert run("evaluate", sae, *text, "--rows", 10, "--split", "train") == 0
    shown = capsys.readouterr().out
    assert "delta_loss" in shown and "documents" in shown
    assert run("convert", sae, tmp_path / "there", "--to", "saelens") == 0
    assert torch.equal(jr.load_sae(tmp_path / "there").threshold, found.threshold)
    model = text[1]
    pages = ("pages", sae, model, tmp_path / "page.html", "--corpus", text[3])
    assert run(*pages, "--rows", 10, "--context-size", 16, "--split", "train") == 0
    assert (tmp_path / "page.html").stat().st_size > 1000


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS], ["rate", "make"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: python -m jumprelu", *command]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["d_sea=3"], "no field 'd_sea': did you mean 'd_sae'"),
        (["d_sae"], "--set d_sae: expected NAME=VALUE"),
        (["d_sae=many"], "d_sae = 'many': expected int"),
        (["d_sae=1.5"], "d_sae = 1.5: expected int"),
        (["lr=true"], "lr = True: expected float"),
        (["lr=[1, 2"], "--set lr=.1, 2 is not valid YAML"),
        (["lr=-1"], "lr must be above 0"),
        (["architecture=jump"], "unknown architecture 'jump'"),
    ],
)
def test_a_configuration_that_is_refused(changes, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        read_config(None, changes)
    options = [part for change in changes for part in ("--set", change)]
    assert run("train", tmp_path, "--out", tmp_path / "sae", *options) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_values_of_a_configuration(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert read_config(path, []) == jr.TrainConfig()
    changes = ["lr=1e-3", "sparsity=0", "resample=[0.5]", "data_seed=3", "sparsity_loss=null"]
    expected = jr.TrainConfig(lr=1e-3, sparsity=0.0, resample=(0.5,), data_seed=3)
    assert read_config(path, changes) == expected
    path.write_text("- 1")
    with pytest.raises(ValueError, match="holds a list, expected fields"):
        read_config(path, [])


def test_what_is_missing_is_said(text, tmp_path, capsys):
    assert run("train", tmp_path / "none", "--out", tmp_path / "sae") == 2
    assert "no activations in" in capsys.readouterr().err
    assert run("train", tmp_path, "--out", tmp_path / "sae", "--config", tmp_path / "c.yaml") == 2
    assert "c.yaml" in capsys.readouterr().err
    assert run("evaluate", tmp_path / "none", *text) == 2
    assert "no SAE at" in capsys.readouterr().err
    activations_from_tensor(torch.randn(40, 6), tmp_path / "acts")
    (tmp_path / "bare").mkdir()
    out = tmp_path / "new"
    assert run("harvest", "--model", tmp_path / "bare", "--layer", 1, "--out", out) == 2
    assert "bare" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["harvest", "--out", "acts"])
    assert end.value.code == 2 and "--layer" in capsys.readouterr().err


def test_a_missing_package_names_its_extra():
    message = r'no_such_package is not installed: run pip install "jumprelu\[lm\]"'
    with pytest.raises(ImportError, match=message), needs("lm"):
        import no_such_package  # noqa: F401
