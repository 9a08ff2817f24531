"""From a profile to the command that trains its SAE."""

from __future__ import annotations

import shlex

import pytest
from companion.rails import launch
from companion.rails.launch import main, parameters

from jumprelu.__main__ import main as command
from jumprelu.__main__ import read_config
from jumprelu.sae import SAE


def test_the_parameters_are_those_of_notebook_02(root):
    values, config = parameters(root, "gemma-2-9b")
    assert values["model"] == "google/gemma-2-9b" and values["site"] and values["layer"] > 3
    assert config.batch_size == 4096 and config.betas == (0.0, 0.999)


def test_an_unknown_profile_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--profile", "none", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "no profile 'none'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_that_it_prints_trains(tmp_path, root, monkeypatch, capsys):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    values, config = parameters(root, "smoke")
    monkeypatch.setattr(launch, "parameters", lambda *_: (values | {"train_rows": 8}, config))
    main(["--profile", "smoke", "--out", str(tmp_path / "run")])
    assert read_config(tmp_path / "run/config.yaml", []) == config
    (line,) = [each for each in capsys.readouterr().out.splitlines() if " python -m" in each]
    arguments = shlex.split(line)[3:]
    assert command([*arguments, "--set", "steps=5"]) == 0
    assert SAE.load(tmp_path / "run").origin.layer == values["layer"]
