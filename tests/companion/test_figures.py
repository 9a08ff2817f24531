"""Figures that are the same bytes twice, and numbers that come back."""

from __future__ import annotations

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
from companion.PLOTS import plots
from companion.rails import figures
from companion.rails.closure import source_closure
from companion.rails.figures import read_figure_data, save_figure, show_facts
from companion.rails.profiles import find_notebooks

ROOT = Path(__file__).resolve().parents[2]


def lines(data: pd.DataFrame) -> plt.Figure:
    """A function from data to figure, as those of plots."""
    fig, ax = plt.subplots()
    for name in data["name"].unique():
        rows = data[data["name"] == name]
        ax.plot(rows["x"], rows["y"], label=name)
    ax.set_title("T $\\theta$")
    ax.legend()
    return fig


@pytest.fixture
def data():
    x = np.linspace(0, 1, 7)
    return pd.DataFrame(
        {"x": np.tile(x, 2), "y": np.r_[x / 3, x**2], "name": ["None"] * 7 + ["b"] * 7}
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(plots, "lines", lines, raising=False)
    return tmp_path / "figures"


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_figure_is_the_same_bytes(folder, data):
    fig = lines(data)
    assert save_figure(fig, "07_lines", data) is fig
    assert not plt.fignum_exists(fig.number)  # closed, so that a notebook shows it once
    first = written(folder)
    assert set(first) == {"07_lines.pdf", "07_lines.png", "07_lines.csv"}
    save_figure(lines(data), "07_lines", data)
    assert written(folder) == first
    save_figure(
        lines(read_figure_data(folder / "07_lines.csv")),
        "07_lines",
        read_figure_data(folder / "07_lines.csv"),
    )
    again = written(folder)
    assert again["07_lines.csv"] == first["07_lines.csv"]
    assert b"CreationDate" not in again["07_lines.pdf"] and b"Software" not in again["07_lines.png"]


def test_the_bytes_do_not_depend_on_the_process(tmp_path):
    code = "import test_figures as t, pandas as pd; from jumprelu import plots; plots.lines = t.lines; "
    code += "d = pd.DataFrame({'x': [0, 1], 'y': [0, .5], 'name': ['a', 'a']}); t.save_figure(t.lines(d), '07_lines', d)"
    seen = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
        settings = os.environ | {
            "PYTHONHASHSEED": seed,
            "JUMPRELU_FIGURES": str(folder),
            "MPLBACKEND": "Agg",
            "PYTHONPATH": path,
        }
        subprocess.run([sys.executable, "-c", code], env=settings, check=True)
        seen.append(written(folder))
    assert seen[0] == seen[1]


def test_the_csv_holds_six_digits_and_its_provenance(folder, data):
    save_figure(lines(data), "07_lines", data)
    path = folder / "07_lines.csv"
    assert path.read_text().startswith("# jumprelu data=")
    pd.testing.assert_frame_equal(read_figure_data(path), data, rtol=1e-5)
    assert pd.read_csv(path, comment="#").shape == data.shape
    path.write_text(path.read_text().replace("0.333333", "0.4"))
    with pytest.raises(ValueError, match="make reproduce"):
        read_figure_data(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lines", lambda d: d, "the notebook's number"),
        ("07_nothing_draws_this", lambda d: d, "no function jumprelu.plots.nothing_draws_this"),
        ("07_lines", lambda d: d.set_index("x"), "reset_index"),
        ("07_lines", lambda d: d.assign(name="#1"), "must not contain '#'"),
    ],
)
def test_what_could_not_be_drawn_again_is_refused(folder, data, name, change, message):
    with pytest.raises(ValueError, match=message):
        save_figure(lines(data), name, change(data))
    plt.close("all")
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


# ---- the package plots ----


def test_a_figure_is_in_the_file_of_its_notebook():
    files = {file.name for file in pkgutil.iter_modules(plots.__path__)}
    assert not files & set(plots.__all__)  # a file would stand in the way of the function
    for csv in sorted((ROOT / "figures").glob("[0-9][0-9]_*.csv")):
        number, name = csv.stem.split("_", 1)
        module = getattr(plots, name).__module__
        assert name in plots.__all__ and module.startswith(f"jumprelu.plots.n{number}_"), (
            f"{csv.stem} is drawn in {module}"
        )


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """changed(file, old, new): the notebooks whose code is another one after an edit in a copy of
    the package."""
    package = "companion"
    folder = tmp_path / package
    shutil.copytree(ROOT / "jumprelu", folder, ignore=shutil.ignore_patterns("__pycache__", "lm"))
    monkeypatch.syspath_prepend(tmp_path)
    codes = {
        each.number: re.sub(r"\bjumprelu\b", package, each.code()) for each in find_notebooks(ROOT)
    }

    def closures():
        return {number: source_closure(code, package) for number, code in codes.items()}

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
    shown = {
        each.number: set(re.findall(r"\bplots\.(\w+)", each.code()))
        for each in find_notebooks(ROOT)
    }
    for name in plots.__all__:
        file = f"plots/{getattr(plots, name).__module__.rpartition('.')[2]}.py"
        users = {number for number, names in shown.items() if name in names}
        assert users and changed(file, f"def {name}(", f"def {name}(edited=True, *, ") == users, (
            name
        )


def test_the_style_concerns_every_figure_and_a_shared_part_those_that_use_it(changed):
    with_figures = {each.number for each in find_notebooks(ROOT) if "plots." in each.code()}
    assert changed("figures.py", "plt.style.use(", "plt.style.use(*[], ") >= with_figures
    users = changed("plots/common.py", "ax.margins(x=0.25)", "ax.margins(x=0.2)")
    assert "02" in users and not users & {"00", "01", "10"}
