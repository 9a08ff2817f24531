"""Which notebooks `make test` runs, and what it says of them; a toy project, under real nbval."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from companion.rails import checks
from companion.rails.profiles import Notebook, find_notebooks
from companion.rails.running import processor

from jumprelu.files import write_json

NAMES = ("00_first", "01_second", "02_third")


def notebook(name: str) -> Notebook:
    return Notebook(Path(f"notebooks/{name}.py"))


def test_those_at_hand_and_one_from_nothing():
    first, second, third = notebooks = [notebook(name) for name in NAMES]
    assert checks.choose(notebooks, set()) == ([], [second], [first, third])
    assert checks.choose(notebooks, {third}) == ([third], [second], [first])
    assert checks.choose(notebooks, set(notebooks)) == ([first, third], [second], [])
    assert checks.choose([first, third], {third}) == ([third], [first], [])


@pytest.fixture
def project(tmp_path, monkeypatch, root):
    """Three committed notebooks, each of which prints the folder of its cache's results, if any."""
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "notebooks")]))
    folder = tmp_path / "project"
    (folder / "notebooks/profiles").mkdir(parents=True)
    (folder / "tests").mkdir()
    shutil.copy(root / "tests/nbval_sanitize.cfg", folder / "tests")
    shutil.copy(root / "requirements.lock", folder)
    (folder / "notebooks/profiles/laptop.yaml").write_text("{}\n")
    for name in NAMES:
        write(folder, name, "print('same')", "same\n")
    return folder


def write(folder: Path, name: str, code: str, printed: str) -> None:
    (folder / f"notebooks/{name}.py").write_text(f"# %%\n{code}\n")
    cell = nbformat.v4.new_code_cell(code, execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
    written = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(written, folder / f"notebooks/{name}.ipynb")


def test_the_choice_is_said_and_run(project, capfd):
    write(project, "00_first", "1 / 0", "never run")
    assert [each.name for each in find_notebooks(project)] == list(NAMES)
    assert checks.main([], project) == 0
    printed = capfd.readouterr().out
    assert "notebooks at hand: none\nnotebooks from nothing: 01_second\n" in printed
    assert "notebooks left out: 00_first, 02_third\n" in printed and "1 passed" in printed


@pytest.mark.slow
def test_a_changed_output_fails_and_all_are_run_if_asked(project, capfd):
    write(project, "02_third", "print('same')", "other\n")
    assert checks.main(["--all"], project) == 1
    printed = capfd.readouterr().out
    assert printed.count("1 passed") == 2 and "1 failed" in printed and "02_third" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [
        (None, "print('same')", 1),
        ("another", "print('same')", 0),
        ("another", "1 / 0", 1),
    ],
)
def test_outputs_of_another_processor_are_not_compared(project, capfd, kind, code, status):
    write(project, "01_second", code, "other\n")
    made_on = {"processor": kind or processor()}
    write_json(project / "figures/01_second.manifest.json", made_on)
    assert checks.main([], project) == status
    assert ("run, but not compared" in capfd.readouterr().out) == (kind is not None)


def test_no_notebook_is_begun_after_the_time_is_up(project, capfd):
    write(project, "01_second", "1 / 0", "never run")
    assert checks.main(["--all", "--minutes", "1e-9"], project) == 0
    printed = capfd.readouterr().out
    assert (
        "notebooks left out: 00_first, 01_second, 02_third" in printed and "passed" not in printed
    )


@pytest.mark.parametrize("filled", [False, True])
def test_from_nothing_means_an_empty_cache(project, tmp_path, filled):
    """A cache with results is left alone; an empty one is used, for what comes after to profit."""
    if filled:
        (tmp_path / "cache/results/table-0").mkdir(parents=True)
    code = (
        "import os, pathlib\n"
        "made = pathlib.Path(os.environ['JUMPRELU_CACHE'], 'results', 'made')\n"
        "made.mkdir(parents=True)\nprint(len(list(made.parent.iterdir())))"
    )
    write(project, "01_second", code, "1\n")
    assert checks.main([], project) == 0
    assert (tmp_path / "cache/results/made").exists() is not filled
