"""A toy project through the whole of `python -m companion.rails.reproduce`: real kernels, real
files."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from companion.rails import costs, display
from companion.rails.profiles import find_notebooks
from companion.rails.reproduce import main, reproduce
from companion.rails.running import Cost, cells_of
from rich.console import Console

from jumprelu.files import cache_root, read_json, sha256, write_json

HEADER = """# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
"""
TOY = (
    HEADER
    + """
# %% [markdown]
# # A toy

# %%
import pandas as pd
import toyplots
from companion.rails.figures import show_facts, save_figure

# %% tags=["parameters"]
steps: int = 3  # points
scale: float = 1.0
kinds: list[str] = ["a"]
threads: int = 1

# %%
data = pd.DataFrame({"x": [scale * i for i in range(steps)]})
save_figure("00", toyplots.line, data)

# %%
import os, sys
print("a"), print("b"), print("warned", file=sys.stderr)
names = ("TQDM_DISABLE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONHASHSEED", "MPLBACKEND")
[os.environ.get(name) for name in names], os.getcwd()[-9:]

# %% tags=["facts"]
show_facts("00", {"last": float(data["x"].iloc[-1]), "kinds": "".join(kinds)})
"""
)
LIGHT = (
    HEADER
    + """
# %% tags=["parameters"]
mode: str = "good"

# %%
print(mode)

# %%
if mode == "bad":
    raise KeyError("on purpose")
"""
)
PLOTS = """
import matplotlib.pyplot as plt

def line(data):
    fig, ax = plt.subplots()
    ax.plot(data["x"])
    return fig
"""


@pytest.fixture
def project(tmp_path, monkeypatch, root):
    """A folder like the repository, with a cache of its own."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "toyplots.py").write_text(PLOTS)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(library), str(root), str(root / "notebooks")])
    )
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    (folder / "notebooks/profiles").mkdir(parents=True)
    shutil.copy(root / "requirements.lock", folder)
    (folder / "notebooks/profiles/laptop.yaml").write_text('"00": {}\n')
    return folder


@pytest.fixture
def light(project):
    """The same with a notebook that starts quickly."""
    (project / "notebooks/05_light.py").write_text(LIGHT)
    return project


def profile(project: Path, text: str, name: str = "smoke") -> None:
    (project / f"notebooks/profiles/{name}.yaml").write_text(text)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_notebook_end_to_end(project, capsys):
    source = project / "notebooks/00_toy.py"
    source.write_text(TOY)
    assert main([], project) == 0
    printed = capsys.readouterr().out
    assert "00_toy: done" in printed and "last" in printed and "2.0" in printed
    first = tree(project)
    figures = {"00_line.csv", "00_line.pdf", "00_line.png", "00_facts.json", "00_toy.manifest.json"}
    assert set(first) >= {f"figures/{name}" for name in figures} | {"notebooks/00_toy.ipynb"}

    executed = nbformat.reads(first["notebooks/00_toy.ipynb"].decode(), as_version=4)
    nbformat.validate(executed)
    assert cells_of(executed) == cells_of(jupytext.read(source))
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    images = [output for output in code[2].outputs if "image/png" in output.get("data", {})]
    assert len(images) == len(code[2].outputs) == 1  # shown, and once
    assert code[3].outputs[0].text == "a\nb\n"
    assert (
        "(['1', '1', 'PASSIVE', '0', 'module://matplotlib_inline.backend_inline'], 'notebooks')"
        in " ".join(code[3].outputs[-1].data["text/plain"].split())
    )
    text = first["notebooks/00_toy.ipynb"].decode()
    assert "papermill" not in text and str(project) not in text and "iopub" not in text

    manifest = json.loads(first["figures/00_toy.manifest.json"])
    assert manifest["parameters"] == {"steps": 3, "scale": 1.0, "kinds": ["a"], "threads": 1}
    assert (
        manifest["threads"] == 1
        and manifest["packages"]["torch"]
        and list(manifest["figures"]) == ["00_line"]
    )
    cost = json.loads((cache_root() / "timings.json").read_text())["laptop/00_toy"]
    assert cost["seconds"] > 0 and cost["peak_mb"] > 50

    assert main([], project) == 0
    assert "00_toy: up to date" in capsys.readouterr().out
    assert tree(project) == first

    (project / "figures/00_gone.csv").write_text("of a figure that is no longer made")
    (project / "figures/00_line.csv").unlink()  # an output is missing: not up to date
    assert main([], project) == 0
    assert "00_toy: done" in capsys.readouterr().out
    assert tree(project) == first

    profile(project, '"00":\n  steps: 5\n  scale: 1e-1\n')
    assert main(["--profile", "smoke"], project) == 0
    assert {name: data for name, data in tree(project).items() if "smoke" not in name} == first
    other = cache_root() / "profiles/smoke"
    assert json.loads((other / "figures/00_facts.json").read_text())["last"] == 0.4
    assert (other / "notebooks/00_toy.ipynb").exists() and (other / "figures/00_line.pdf").exists()


def test_up_to_date_follows_cells_parameters_and_lock(light, capsys):
    def states(*arguments: str) -> str:
        assert main(list(arguments), light) == 0
        out = capsys.readouterr().out
        return (
            "done"
            if "05_light: done" in out
            else "up to date"
            if "05_light: up to date" in out
            else out
        )

    source, lock = light / "notebooks/05_light.py", light / "requirements.lock"
    profile(light, '"05": {mode: other}\n')
    assert [states(), states()] == ["done", "up to date"]
    lock.write_text(lock.read_text() + "# a comment\n")
    assert states() == "up to date"
    lock.write_text(lock.read_text() + "another-package==1.0\n")
    assert states() == "done"
    source.write_text(LIGHT.replace("print(mode)", "print(mode, 1)"))
    assert [states(), states("--force")] == ["done", "done"]
    assert [states("--profile", "smoke"), states("--profile", "smoke")] == ["done", "up to date"]


@pytest.mark.slow
def test_a_failing_cell_leaves_the_tree_and_says_where(light, capsys):
    assert main([], light) == 0
    (light / "notebooks/05_light.py").write_text(LIGHT.replace('"good"', '"bad"'))
    before = tree(light)
    capsys.readouterr()
    assert main([], light) == 1
    printed = capsys.readouterr().out
    assert (
        "05_light: FAILED in the cell [3]" in printed and 'raise KeyError("on purpose")' in printed
    )
    assert "KeyError: 'on purpose'" in printed and "\x1b[" not in printed
    assert tree(light) == before
    kept = cache_root() / "failed/05_light.ipynb"
    assert str(kept) in printed and "on purpose" in kept.read_text()


@pytest.mark.slow
def test_a_kernel_that_dies_is_reported_with_its_cell(light, capsys):
    (light / "notebooks/05_light.py").write_text(
        LIGHT.replace("print(mode)", "import os; os._exit(9)")
    )
    assert main([], light) == 1
    printed = capsys.readouterr().out
    assert (
        "the kernel died in this cell" in printed
        and "os._exit(9)" in printed
        and "PROFILE=smoke" in printed
    )


def test_figures_of_another_number_are_refused(light, capsys):
    writes = "import os, pathlib; pathlib.Path(os.environ['JUMPRELU_FIGURES'], '04_x.csv').touch()"
    (light / "notebooks/05_light.py").write_text(LIGHT.replace("print(mode)", writes))
    assert main([], light) == 1
    assert "it wrote 04_x.csv" in capsys.readouterr().out
    assert not (light / "figures").exists() and not list(light.glob(".figures-*"))


CLAIM = """from companion.rails.claims import claim, ledger
from jumprelu.intervals import Interval
seen = Interval(2.0, 1.0, 3.0)
size = claim("J1", "ours", "It is positive.", "size", seen, (0, float("inf")), "05_size")
ledger("05", [size])"""


@pytest.mark.slow
def test_claims_travel_with_the_figures_and_other_profiles_can_be_published(light, capsys):
    source, page = light / "notebooks/05_light.py", light / "figures/LEDGER.md"
    (light / "pyproject.toml").touch()  # a checkout
    profile(light, '"05": {mode: other}\n')
    assert main(["--publish", "--profile", "smoke"], light) == 2
    assert (
        "no finished run of any notebook: first `make reproduce PROFILE=smoke`"
        in capsys.readouterr().err
    )
    assert main(["--publish"], light) == 2 and "choose another profile" in capsys.readouterr().err

    source.write_text(LIGHT.replace("print(mode)", CLAIM))
    assert main([], light) == 0
    assert "LEDGER.md: written again" in capsys.readouterr().out
    manifest = json.loads((light / "figures/05_light.manifest.json").read_text())
    assert (
        manifest["figures"] == {}
        and manifest["claims"] == sha256(light / "figures/claims_05.csv")[:16]
    )
    first = tree(light)
    assert {"figures/claims_05.csv", "figures/claims.csv"} < set(first) and page.read_text().count(
        "| J1 |"
    ) == 1
    page.write_text(page.read_text().replace("| J1 |", "| J2 |"))
    assert main([], light) == 0
    printed = capsys.readouterr().out
    assert (
        "05_light: up to date" in printed
        and "LEDGER.md: written again" in printed
        and tree(light) == first
    )

    assert main(["--profile", "smoke"], light) == 0
    cached = cache_root() / "profiles/smoke/figures"
    assert (cached / "claims_05.csv").exists() and tree(light) == first
    (cached / "05_x.pdf").touch()
    target = light / "figures/smoke"
    target.mkdir()
    (target / "05_gone.png").touch()
    (target / "04_other.png").touch()
    assert main(["--publish", "--profile", "smoke", "--notebook", "05"], light) == 0
    assert "05_light: published\n" in capsys.readouterr().out
    published = {"04_other.png", "05_light.manifest.json", "claims_05.csv", "costs.json"}
    assert {path.name for path in target.iterdir()} == published
    cost = json.loads((target / "costs.json").read_text())["05_light"]
    assert cost["threads"] == 2 and cost["device"] and cost["seconds"] > 0 and cost["peak_mb"] > 50
    assert (
        page.read_text().count("| J1 |") == 2
        and "(smoke/05_size.png) | smoke |" in page.read_text()
    )

    source.write_text(LIGHT)  # it claims nothing any more
    assert main(["--publish", "--profile", "smoke"], light) == 0
    assert "its source, code changed since it ran" in capsys.readouterr().out
    assert main([], light) == 0
    assert not (light / "figures/claims_05.csv").exists() and page.read_text().count("| J1 |") == 1
    (cached / "claims_05.csv").write_text("edited by hand")
    assert main(["--publish", "--profile", "smoke"], light) == 2
    assert not list(light.glob(".figures-*"))


def test_a_failing_run_leaves_the_ledger(light, capsys):
    (light / "pyproject.toml").touch()
    writes = (
        "import os, pathlib; pathlib.Path(os.environ['JUMPRELU_FIGURES'], 'claims_04.csv').touch()"
    )
    (light / "notebooks/05_light.py").write_text(LIGHT.replace("print(mode)", writes))
    assert main([], light) == 1
    assert "it wrote claims_04.csv" in capsys.readouterr().out
    assert not (light / "figures").exists()


@pytest.mark.slow
def test_a_kernel_that_does_not_start_gets_a_second_chance(light, capsys, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    tries = tmp_path / "tries"
    tries.touch()
    start = (
        f"import os, sys, pathlib; p = pathlib.Path({str(tries)!r}); n = len(p.read_text()); "
        "p.write_text('x' * (n + 1)); "
    )
    run = "os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', *sys.argv[1:]])"
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    def install(condition: str) -> None:
        argv = [
            sys.executable,
            "-c",
            f"{start}sys.exit(3) if {condition} else {run}",
            "-f",
            "{connection_file}",
        ]
        (spec / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"})
        )

    install("n == 0")
    assert main([], light) == 0
    assert "trying once more" in capsys.readouterr().out and tries.read_text() == "xx"
    install("True")
    assert main(["--force"], light) == 1
    assert "the kernel did not start" in capsys.readouterr().out and tries.read_text() == "xxxx"


@pytest.mark.slow
def test_long_cells_are_reported(light, monkeypatch):
    monkeypatch.setattr(display, "HEARTBEAT_SECONDS", 0.2)
    (light / "notebooks/05_light.py").write_text(
        LIGHT.replace("print(mode)", "import time; time.sleep(1)")
    )
    plain = Console(file=io.StringIO(), record=True, width=200)
    assert reproduce(light, console=plain)
    assert "05_light: cell 2 of 3" in plain.export_text()
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    assert reproduce(light, force=True, console=terminal)
    shown = terminal.file.getvalue()
    assert "running, cell 2 of 3" in shown and "1 of 1 left, about 0:0" in shown


@pytest.mark.slow
def test_expected_times_come_from_this_machine_or_scaled_from_the_committed_ones(light, capsys):
    source = light / "notebooks/05_light.py"
    (light / "notebooks/06_more.py").write_text(LIGHT)
    (light / "notebooks/07_new.py").write_text(LIGHT)
    here = costs.calibration()
    assert 0 < here == costs.calibration()
    committed = {"smoke": {"calibration": here / 2, "seconds": {"05_light": 50, "06_more": 50}}}
    write_json(light / "notebooks/profiles/costs.json", committed)
    notebooks = find_notebooks(light)
    costs.keep_cost("smoke", notebooks[0], Cost(7.0, 100))
    known = {
        notebook.name: s
        for notebook, s in costs.expected_seconds(light, "smoke", notebooks).items()
    }
    assert known == {"05_light": 7.0, "06_more": pytest.approx(100)}
    assert costs.expected_seconds(light, "laptop", notebooks) == {}

    assert main(["--notebook", "05", "--record-costs"], light) == 2
    assert "no run of 06_more, 07_new in the profile laptop was timed" in capsys.readouterr().err
    for name in ("06_more", "07_new"):
        (light / f"notebooks/{name}.py").unlink()
    assert main(["--record-costs"], light) == 0
    written = read_json(light / "notebooks/profiles/costs.json")
    assert written["smoke"] == committed["smoke"] and written["laptop"]["calibration"] == here
    assert list(written["laptop"]["seconds"]) == [source.stem]


def test_the_plan_is_shown_first(light):
    notebooks = find_notebooks(light)
    plain = Console(file=io.StringIO(), record=True, width=200)
    with display.Display(plain, "laptop", {notebooks[0]: False}, {notebooks[0]: 245.0}) as shown:
        first = plain.export_text(clear=False)
        assert "05_light: to run, expected time about 4:05" in first
        assert "1 of 1 left, about 4:05" in first
        shown.start(notebooks[0])
        shown.done(notebooks[0], Cost(200.0, 300))
    assert "05_light: done in 3:20; nothing left" in plain.export_text()


@pytest.mark.slow
def test_a_second_run_waits_for_the_first(light, tmp_path):
    """Two processes: the second one starts while the first is in a cell, which waits for it."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    cell = (
        f"import os, time; open({str(begun)!r}, 'a').write('x')\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.1)"
    )
    (light / "notebooks/05_light.py").write_text(LIGHT.replace("print(mode)", cell))
    code = "import sys, pathlib; from companion.rails.reproduce import main; "
    code += f"sys.exit(main([], pathlib.Path({str(light)!r})))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as first:
        while not begun.exists() and first.poll() is None:
            time.sleep(0.1)
        with subprocess.Popen([sys.executable, "-u", "-c", code], **pipes) as second:
            lines = iter(second.stdout.readline, "")
            assert any("another `make reproduce` is at work" in line for line in lines)
            go.touch()
            assert "05_light: up to date" in second.stdout.read()
        assert "05_light: done" in first.stdout.read()
    assert (first.returncode, second.returncode) == (0, 0) and begun.read_text() == "x"
