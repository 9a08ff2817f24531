"""README and the pages beside it: code runs as written, links lead somewhere, tables are whole."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from companion.rails.figures import drawing_functions
from companion.rails.results_pages import described, titles

import jumprelu as jr

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "figures/README.md",
    "figures/LEDGER.md",
    "notebooks/profiles/README.md",
]


def test_it_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 20_000
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_code_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    names: dict = {}
    exec(BLOCKS[0], names)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("l0", "fvu", "delta_loss", "±"))
    assert names["sae"].d_sae == 512 and (tmp_path / "my_sae" / "cfg.json").exists()
    exec(BLOCKS[1], names)
    assert names["threshold"].grad.abs().max() > 0


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    found = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    links = [link for link in found if not link.startswith("http")]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "notebooks/profiles/README.md"])
def test_files_that_are_named_exist(page):
    """`jumprelu/kernels.py`, `tests/test_house.py`, …: a moved file moves here, too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:jumprelu|notebooks|tests|figures)/[\w./-]+)`", text)
    named = [name for name in named if "NN_" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_picture_of_the_house_has_every_room():
    picture = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    words = set(re.findall(r"\w+", picture))
    core = {path.stem for path in (ROOT / "jumprelu").glob("*.py")} - {"__init__"}
    rooms = [
        path.parent.name
        for package in ("jumprelu", "notebooks/companion")
        for path in (ROOT / package).glob("*/__init__.py")
    ]
    assert (core | set(rooms)) - words == set()


def test_every_notebook_is_listed():
    table = README.split("<!-- notebooks -->")[1].split("<!-- /notebooks -->")[0]
    listed = re.findall(r"\(notebooks/(\w+)\.ipynb\)", table)
    assert listed == [stem for stem, _ in titles(ROOT).values()]


def test_every_figure_is_drawn_by_a_function_that_says_what_it_shows():
    drawn = drawing_functions(ROOT)
    assert sorted(drawn) == sorted(path.stem for path in (ROOT / "figures").glob("*.png"))
    page = (ROOT / "figures/README.md").read_text(encoding="utf-8")
    for name, function in drawn.items():
        assert callable(pkgutil.resolve_name(function))
        module, _, plot = function.partition(":")
        path = ROOT / "notebooks" / Path(*module.split(".")).with_suffix(".py")
        shows, paper = described(path, plot)
        assert shows and paper, f"{function} needs a docstring with a line 'Paper: …' (or none)"
        assert f"| [{name}]({name}.png) | " in page


def test_the_api_table_names_the_api():
    table = README.split("| name | what it does |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)
    shown = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert shown == set(jr.__all__)


def test_every_profile_has_its_cost():
    page = (ROOT / "notebooks/profiles/README.md").read_text(encoding="utf-8")
    profiles = {path.stem for path in (ROOT / "notebooks/profiles").glob("*.yaml")}
    rows = re.findall(
        r"^\| `([\w.-]+)`[^|]* \|.*(?:measured|derived).*\|$", page, flags=re.MULTILINE
    )
    assert sorted(rows) == sorted(profiles)


def test_the_citation_can_be_read():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["version"] == jr.__version__
    cited = {reference["url"].rpartition("/")[2] for reference in found["references"]}
    assert cited == {"2407.14435", "2408.05147", "2410.14670"}
    assert all(f"arxiv.org/abs/{number}" in README for number in cited)
