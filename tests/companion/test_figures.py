"""Figures that are the same bytes twice, and numbers that come back."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from companion.rails import figures
from companion.rails.closure import source_closure
from companion.rails.figures import (
    drawing_functions,
    read_figure_data,
    save_figure,
    show_facts,
)
from companion.rails.profiles import find_notebooks

ROOT = Path(__file__).resolve().parents[2]


LINES = """
import matplotlib.pyplot as plt


def lines(data):
    fig, ax = plt.subplots()
    for name in data["name"].unique():
        rows = data[data["name"] == name]
        ax.plot(rows["x"], rows["y"], label=name)
    ax.set_title("T $\\\\theta$")
    ax.legend()
    return fig
"""
"""A module with a function from data to figure, as those of the companion."""


@pytest.fixture
def lines(tmp_path, monkeypatch):
    (tmp_path / "drawn_here.py").write_text(LINES)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("drawn_here").lines
    del sys.modules["drawn_here"]


@pytest.fixture
def data():
    x = np.linspace(0, 1, 7)
    return pd.DataFrame(
        {"x": np.tile(x, 2), "y": np.r_[x / 3, x**2], "name": ["None"] * 7 + ["b"] * 7}
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_figure_is_the_same_bytes(folder, lines, data):
    fig = save_figure("07", lines, data)
    assert not plt.fignum_exists(fig.number)  # closed, so that a notebook shows it once
    first = written(folder)
    assert set(first) == {"07_lines.pdf", "07_lines.png", "07_lines.csv"}
    save_figure("07", lines, data)
    assert written(folder) == first
    save_figure("07", lines, read_figure_data(folder / "07_lines.csv"))
    again = written(folder)
    assert again["07_lines.csv"] == first["07_lines.csv"]
    assert b"CreationDate" not in again["07_lines.pdf"] and b"Software" not in again["07_lines.png"]


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_process(tmp_path, lines):
    code = "import pandas as pd; from companion.rails.figures import save_figure; "
    code += "from drawn_here import lines; "
    code += "data = pd.DataFrame({'x': [0, 1], 'y': [0, .5], 'name': ['a', 'a']}); "
    code += "save_figure('07', lines, data)"
    seen = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        settings = os.environ | {
            "PYTHONHASHSEED": seed,
            "JUMPRELU_FIGURES": str(folder),
            "MPLBACKEND": "Agg",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        subprocess.run([sys.executable, "-c", code], env=settings, check=True)
        seen.append(written(folder))
    assert seen[0] == seen[1]


def test_the_csv_holds_six_digits_and_its_provenance(folder, lines, data):
    save_figure("07", lines, data)
    path = folder / "07_lines.csv"
    assert path.read_text().startswith("# jumprelu data=")
    pd.testing.assert_frame_equal(read_figure_data(path), data, rtol=1e-5)
    assert pd.read_csv(path, comment="#").shape == data.shape
    path.write_text(path.read_text().replace("0.333333", "0.4"))
    with pytest.raises(ValueError, match="make reproduce"):
        read_figure_data(path)


@pytest.mark.parametrize(
    ("notebook", "change", "message"),
    [
        ("lines", lambda d: d, "must be its number"),
        ("07", lambda d: d.set_index("x"), "reset_index"),
        ("07", lambda d: d.assign(name="#1"), "must not contain '#'"),
    ],
)
def test_what_a_csv_cannot_hold_is_refused(folder, lines, data, notebook, change, message):
    with pytest.raises(ValueError, match=message):
        save_figure(notebook, lines, change(data))
    assert not folder.exists()


def test_what_could_not_be_drawn_again_is_refused(folder, data):
    with pytest.raises(TypeError, match="lambdas|top level"):
        save_figure("07", lambda data: plt.figure(), data)
    assert not folder.exists()


def test_facts_are_printed_and_written(folder, capsys):
    show_facts(
        "07", {"loss": np.float64(1.5), "rows": np.int64(3), "holds": np.bool_(True), "name": "x"}
    )
    assert capsys.readouterr().out.splitlines() == [
        "loss   1.5",
        "rows   3",
        "holds  True",
        "name   x",
    ]
    assert json.loads((folder / "07_facts.json").read_text()) == {
        "loss": 1.5,
        "rows": 3,
        "holds": True,
        "name": "x",
    }
    with pytest.raises(TypeError, match="'t' is a ndarray"):
        show_facts("07", {"t": np.zeros(3)})
    with pytest.raises(ValueError, match="its number"):
        show_facts("7", {})


def test_style_embeds_fonts_and_tells_lines_apart_twice():
    figures.use_style()
    cycle = list(plt.rcParams["axes.prop_cycle"])
    assert plt.rcParams["pdf.fonttype"] == 42
    assert [entry["color"] for entry in cycle] == [
        "#" + c if not c.startswith("#") else c for c in petroff10()
    ]
    assert all(a["linestyle"] != b["linestyle"] for a, b in zip(cycle, cycle[1:], strict=False))


def petroff10():
    with plt.style.context("petroff10"):
        return [entry["color"] for entry in plt.rcParams["axes.prop_cycle"]]


def test_figures_go_to_the_checkout_by_default(monkeypatch):
    monkeypatch.delenv("JUMPRELU_FIGURES")
    assert (
        figures.figures_folder().name == "figures"
        and (figures.figures_folder().parent / "jumprelu").is_dir()
    )


def test_what_the_benchmark_measured_is_read_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_FIGURES", str(tmp_path / "of a run in progress"))
    monkeypatch.setattr(figures, "MEASURED", tmp_path)
    with pytest.raises(FileNotFoundError, match="make benchmark"):
        figures.read_measured("benchmark.csv")
    (tmp_path / "benchmark.csv").write_text("a,b\n1,2\n")
    (tmp_path / "benchmark.json").write_text('{"threads": 2}')
    assert figures.read_measured("benchmark.csv").b.tolist() == [2] and figures.read_measured(
        "benchmark.json"
    ) == {"threads": 2}


# ---- which function draws which figure


def test_a_notebook_says_what_draws_its_figures(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/07_light.py").write_text(
        "from companion.room import tables, plots\n"
        "from companion.room.drawn import bars as other\n"
        "import helpers\n"
        'save_figure("07", plots.size, data)\n'
        'shown = save_figure("07", other.bars, data)\n'
        'save_figure("07", helpers.size, data)\n'
        "plots.size(data)\n"
    )
    assert drawing_functions(tmp_path) == {
        "07_size": "companion.room.plots:size",
        "07_bars": "companion.room.drawn.bars:bars",
    }


def test_a_figure_is_drawn_in_the_room_of_its_notebook():
    drawn = drawing_functions(ROOT)
    assert sorted(drawn) == sorted(path.stem for path in (ROOT / "figures").glob("*.png"))
    notebooks = {}
    for name, function in drawn.items():
        module, _, plot = function.partition(":")
        assert re.fullmatch(r"companion\.\w+\.plots(\.\w+)?", module), name
        assert pkgutil.resolve_name(function).__module__ == module, f"{plot} is defined elsewhere"
        notebooks.setdefault(module, set()).add(name[:2])
    assert all(len(each) == 1 for each in notebooks.values()), notebooks


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """changed(file, old, new): the notebooks whose code is another one after an edit in a copy of
    the companion."""
    package = "edited_companion"
    folder = tmp_path / package
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "notebooks/companion", folder, ignore=ignored)
    monkeypatch.syspath_prepend(tmp_path)
    codes = {
        each.number: re.sub(r"\bcompanion\b", package, each.code()) for each in find_notebooks(ROOT)
    }

    def closures():
        return {
            number: source_closure(code, frozenset({package})) for number, code in codes.items()
        }

    before = closures()

    def after(file, old, new):
        path = folder / file
        source = path.read_text(encoding="utf-8")
        assert source.count(old) == 1
        path.write_text(source.replace(old, new), encoding="utf-8")
        now = closures()
        path.write_text(source, encoding="utf-8")
        return {number for number in codes if now[number] != before[number]}

    yield after
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def test_an_edited_figure_concerns_the_notebooks_that_show_it_and_no_other(changed):
    drawn = drawing_functions(ROOT)
    last = {function.partition(":")[0]: name for name, function in drawn.items()}
    for module, name in last.items():  # one figure a module: each takes a second
        file = "/".join(module.split(".")[1:]) + ".py"
        assert changed(file, f"def {name[3:]}(", f"def {name[3:]}(edited=True, *, ") == {name[:2]}


def test_the_style_concerns_every_figure_and_a_shared_part_those_that_use_it(changed):
    with_figures = {name[:2] for name in drawing_functions(ROOT)}
    assert changed("rails/figures.py", "plt.style.use(", "plt.style.use(*[], ") >= with_figures
    users = changed("rails/looks.py", "ax.margins(x=0.25)", "ax.margins(x=0.2)")
    assert "02" in users and not users & {"00", "01", "10"}
