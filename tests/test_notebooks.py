"""The committed notebooks: run, paired with their sources, and free of what differs from run to
run.

nbval skips whatever has no execution count, so `pytest --nbval` alone could pass and check nothing.
"""

from __future__ import annotations

import pkgutil
import platform
import re
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml
from companion.rails.closure import source_closure
from companion.rails.figures import drawing_functions, read_figure_data
from companion.rails.profiles import DEFAULT_PROFILE, Notebook, check_profile
from companion.rails.running import cells_of, data_files, measured_files
from nbval.plugin import get_sanitize_patterns

from jumprelu.files import digest, sha256

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
FIGURES = sorted((ROOT / "figures").glob("[0-9][0-9]_*.csv"))
DRAWN = drawing_functions(ROOT)
PROFILES = sorted(path.stem for path in (ROOT / "notebooks/profiles").glob("*.yaml"))
ABSOLUTE = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|private)/|[A-Z]:\\\\"
)


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    return request.param


@pytest.fixture
def notebook(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks_and_no_ipynb_without_a_source():
    assert len(SOURCES) >= 3
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))] == [
        path.stem for path in SOURCES
    ]


def test_the_pair_is_equal(source, notebook):
    assert cells_of(notebook) == cells_of(jupytext.read(source)), "run `make reproduce`"


def test_every_cell_ran_in_order_without_an_error(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        output for cell in cells for output in cell.outputs if output.output_type == "error"
    ]


def test_the_outputs_are_checked(notebook):
    tags = [set(cell.metadata.get("tags", [])) for cell in code_cells(notebook)]
    assert sum("nbval-ignore-output" in each or "nbval-skip" in each for each in tags) <= 3
    assert sum("parameters" in each for each in tags) == 1
    assert "facts" in tags[-1] and "nbval-ignore-output" not in tags[-1]
    assert code_cells(notebook)[-1].outputs, "the cell of facts prints them"


def test_no_absolute_path(source, notebook):
    def text_of(output):
        yield output.get("text", "")
        yield from (
            value for kind, value in output.get("data", {}).items() if kind.startswith("text/")
        )

    texts = [
        source.read_text(),
        *(
            text
            for cell in code_cells(notebook)
            for output in cell.outputs
            for text in text_of(output)
        ),
    ]
    assert not [text for text in texts if ABSOLUTE.search(text)]


def test_the_guard_sees_absolute_paths():
    assert (
        ABSOLUTE.search("read /home/me/x")
        and ABSOLUTE.search('"/tmp/x"')
        and ABSOLUTE.search("C:\\\\Users")
    )
    assert not ABSOLUTE.search("https://arxiv.org/abs/1 and 1/2 and a/tmp/b and (train/test)")


def test_nothing_that_differs_from_run_to_run(notebook):
    assert [cell.id for cell in notebook.cells] == [
        digest(index, cell.source) for index, cell in enumerate(notebook.cells)
    ]
    assert set(notebook.metadata) == {"jupytext", "kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


def test_the_manifest_is_of_this_code(source):
    """The committed results were made by the committed code: nothing was edited after the last
    run."""
    manifest = yaml.safe_load((ROOT / f"figures/{source.stem}.manifest.json").read_text())
    notebook = Notebook(source)
    message = f"{source.name} or what it uses was edited after it ran: run `make reproduce`"
    assert manifest["source"] == digest(cells_of(notebook.read())), message
    if manifest["python"] == ".".join(
        platform.python_version_tuple()[:2]
    ):  # source is normalised by Python itself
        assert manifest["code"] == source_closure(notebook.code()), message
    assert manifest["data"] == data_files(), message
    assert manifest["measured"] == measured_files(ROOT, notebook.code()), message
    made = {
        path.stem: sha256(path)[:16] for path in FIGURES if path.name.startswith(notebook.number)
    }
    assert manifest["figures"] == made
    assert (ROOT / f"figures/{notebook.number}_facts.json").exists()


@pytest.mark.parametrize("csv", FIGURES, ids=lambda path: path.stem)
def test_a_figure_can_be_drawn_again_from_its_numbers(csv):
    figure = pkgutil.resolve_name(DRAWN[csv.stem])(read_figure_data(csv))
    figure.canvas.draw()
    assert figure.axes and any(axes.has_data() for axes in figure.axes)
    plt.close("all")
    assert (
        csv.with_suffix(".pdf").stat().st_size > 1000
        and csv.with_suffix(".png").stat().st_size > 1000
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_the_profiles_fit_the_notebooks(profile):
    changed = check_profile(ROOT, profile)
    assert set(changed) == {path.name[:2] for path in SOURCES}
    if profile == DEFAULT_PROFILE:
        assert not any(changed.values())


def test_every_sanitize_pattern_is_read():
    """nbval ignores, without a word, a pair with a blank missing or an empty replacement."""
    text = (ROOT / "tests/nbval_sanitize.cfg").read_text()
    written = len(re.findall(r"^\s*regex", text, re.MULTILINE))
    patterns = get_sanitize_patterns(text)
    assert written == len(patterns) > 0
    assert all(re.compile(pattern) and replacement for pattern, replacement in patterns)
