"""The ledger of claims: verdicts by hand, tables that come back, pages, and what is committed."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from companion.rails import claims, results_pages
from companion.rails.claims import (
    VERDICTS,
    claim,
    collect,
    ledger,
    main,
    read_claims,
    stale,
    write_ledger,
)
from companion.rails.profiles import find_notebooks
from companion.rails.publish import finished
from companion.rails.repeats import mean_interval

from jumprelu.intervals import Interval

ROOT = Path(__file__).resolve().parents[2]
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


SIZE = Interval(2.0, 1.0, 3.0)


def one(id="J1", interval=SIZE, holds=(0, INF), **changed):
    given = {
        "paper": "JumpReLU",
        "sentence": "It is positive.",
        "quantity": "size, units",
        "figure": "03_size",
    } | changed
    return claim(id, interval=interval, holds=holds, **given)


def part(folder, monkeypatch, notebook, *ids, **changed):
    monkeypatch.setenv("JUMPRELU_FIGURES", str(folder))
    return ledger(notebook, [one(id, **changed) for id in ids])


@pytest.mark.parametrize(
    ("ends", "holds", "verdict"),
    [
        ((1, 3), (0, 4), "reproduced"),
        ((1, 3), (1, 3), "reproduced"),  # the region's ends belong to it
        ((1, 3), (-INF, 3), "reproduced"),
        ((1, 3), (1, INF), "reproduced"),
        ((2, 2), (0, INF), "reproduced"),  # known exactly
        ((1, 3), (4, 5), "not reproduced"),
        ((1, 3), (-INF, 0.5), "not reproduced"),
        ((1, 3), (3.001, INF), "not reproduced"),
        ((1, 3), (3, INF), "undecided"),  # one point in common
        ((1, 3), (-INF, 1), "undecided"),
        ((1, 3), (2, INF), "undecided"),
        ((1, 3), (-INF, 2), "undecided"),
        ((1, 3), (1.5, 2.5), "undecided"),  # wider than the region
        ((-INF, 3), (0, INF), "undecided"),  # bounded on one side only
        ((-INF, 3), (-INF, 4), "reproduced"),
        ((NAN, NAN), (0, INF), "out of reach at this scale"),
        ((NAN, 3), (0, INF), "out of reach at this scale"),
        ((1, NAN), (0, INF), "out of reach at this scale"),
    ],
)
def test_the_verdict_follows_from_the_interval(ends, holds, verdict):
    found = one(
        interval=Interval(2.0, *map(float, ends)),
        holds=holds,
        reason="only one seed" if math.nan in ends else "",
    )
    reason = "" if "out of" not in verdict else "only one seed"
    assert (found.verdict, found.value, found.reason) == (verdict, 2.0, reason)


def test_the_verdict_is_of_the_numbers_before_they_are_rounded(folder):
    close = one(interval=Interval(1.5, 0.99999, 2.0), holds=(1, INF))
    assert close.verdict == "undecided"
    assert ledger("03", [close]).loc[0, ["low", "verdict"]].tolist() == [1.0, "undecided"]


def test_what_is_not_measured_needs_a_reason():
    with pytest.raises(ValueError, match="J1 is out of reach.*give `missing`"):
        one(interval=None)
    with pytest.raises(ValueError, match="J1 is out of reach"):
        one(interval=mean_interval([0.5]))  # one seed has no interval
    with pytest.raises(ValueError, match="J1 is out of reach"):
        one(interval=None, reason=" ")
    found = one(interval=None, reason="needs 9 billion parameters", figure="")
    assert (
        found.verdict == "out of reach at this scale"
        and all(map(math.isnan, found[4:7]))
        and found.figure == ""
    )
    assert one(interval=mean_interval([0.5]), reason="one seed").value == 0.5
    kept = one(interval=None, reason="a comment", missing="needs a GPU").reason
    assert (
        kept == "a comment; needs a GPU"
        and one(reason="a comment", missing="needs a GPU").reason == "a comment"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holds": (1, 1)}, "low < high"),
        ({"holds": (INF, -INF)}, "low < high"),
        ({"holds": (NAN, 1)}, "low < high"),
        ({"sentence": " "}, "sentence is empty"),
        ({"quantity": ""}, "quantity is empty"),
        ({"paper": ""}, "paper is empty"),
        ({"sentence": "two\nlines"}, "one line"),
        ({"reason": "<!-- /claims -->"}, "without an HTML comment"),
        ({"id": "J 1"}, "short tag"),
        ({"figure": "size"}, "03_pareto"),
        ({"figure": ""}, "03_pareto"),  # what was measured can be shown
        ({"interval": Interval(1.0, 2.0, 3.0)}, "low ≤ mean ≤ high"),
        ({"interval": mean_interval([[1.0, 2.0], [3.0, 5.0]])}, "got arrays"),
    ],
)
def test_what_is_no_claim_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        one(**change)


def test_a_part_comes_back_as_it_was_returned(folder):
    odd = one(
        "J2",
        sentence='Commas, "quotes" | bars',
        interval=Interval(123456.7, 1e-9 / 3, 2e7 / 3),
        reason="a, b",
    )
    missing = one(
        "NA", interval=None, reason="too large", figure=""
    )  # not to be read as a missing value
    shown = ledger("03", [one(), odd, missing])
    assert list(shown.columns) == claims.COLUMNS and list(shown.id) == ["J1", "J2", "NA"]
    assert shown.loc[1, ["value", "low", "high"]].tolist() == [123500.0, 3.333e-10, 6667000.0]
    assert [path.name for path in folder.iterdir()] == ["claims_03.csv"]
    pd.testing.assert_frame_equal(read_claims(folder / "claims_03.csv"), shown, check_exact=True)
    first = (folder / "claims_03.csv").read_bytes()
    assert b"123500," in first and b"\r" not in first
    ledger("03", [one(), odd, missing])
    assert (folder / "claims_03.csv").read_bytes() == first
    only_missing = ledger("04", [missing])
    pd.testing.assert_frame_equal(
        read_claims(folder / "claims_04.csv"), only_missing, check_exact=True
    )


def test_a_part_that_is_none_is_refused(folder):
    with pytest.raises(ValueError, match="J1 is there more than once"):
        ledger("03", [one("J1"), one("J2"), one("J1")])
    with pytest.raises(ValueError, match="its number"):
        ledger("3", [one()])
    with pytest.raises(ValueError, match="no claims"):
        ledger("03", [])
    assert not folder.exists()
    folder.mkdir()
    (folder / "claims_03.csv").write_text("id,value\nJ1,2\n")
    with pytest.raises(ValueError, match="claims_03.csv has the columns id, value"):
        collect(folder)


def test_claims_are_in_the_order_of_notebook_profile_and_part(folder, monkeypatch):
    part(folder / "thorough", monkeypatch, "02", "B2", "A2")
    part(folder / "gpu", monkeypatch, "02", "B2")
    part(folder, monkeypatch, "10", "C1")
    part(folder, monkeypatch, "02", "B2", "A2")
    part(folder / "gpu", monkeypatch, "00", "D1")
    (folder / "claims.csv").write_text("of an earlier run")
    (folder / "02_claims.csv").write_text("a figure's")
    found = collect(folder)
    assert list(found.columns) == [*claims.COLUMNS, "notebook", "profile"]
    assert list(zip(found.notebook, found.profile, found.id, strict=True)) == [
        ("00", "gpu", "D1"),
        ("02", "laptop", "B2"),
        ("02", "laptop", "A2"),
        ("02", "gpu", "B2"),
        ("02", "thorough", "B2"),
        ("02", "thorough", "A2"),
        ("10", "laptop", "C1"),
    ]
    assert list(found.index) == list(range(7))


# ---- pages

HEADLINES = """
claims:
  J1:
  J2: In other words.
notebooks:
  "03":
    question: How large?
    answer: "{J1} at {fact: rows} rows"
"""
README = """# Title
<!-- notebooks -->
<!-- /notebooks -->
<!-- claims -->
by hand
<!-- /claims -->
"""
PLOTS = '''
def size(data):
    """How large it is.

    Paper: JumpReLU, Figure 2.

    data: columns a, b.
    """
'''


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one notebook, its plot and facts, headlines and a README; no claims yet."""
    texts = {
        "README.md": README,
        results_pages.HEADLINES: HEADLINES,
        "figures/03_facts.json": '{"rows": 7}',
        "notebooks/companion/room/plots.py": PLOTS,
        "notebooks/03_sizes.py": "# # Sizes\n"
        "from companion.room import other, plots\n"
        "from elsewhere import more\n"
        'save_figure("03", plots.size, data)\n'
        'save_figure("03", more.of_it, data)\n',
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_ledger_page_has_every_claim_by_notebook(folder, monkeypatch):
    part(
        folder,
        monkeypatch,
        "03",
        "J1",
        sentence="a|b holds",
        interval=Interval(0.123456, 0.1, 12345.6),
    )
    part(folder / "gpu", monkeypatch, "03", "J1", reason="a comment")
    part(folder, monkeypatch, "04", "J2", interval=mean_interval([0.5]), reason="one seed")
    part(folder, monkeypatch, "05", "J3", interval=None, reason="too large", figure="")
    page = results_pages.ledger_page(folder.parent, collect(folder), VERDICTS).splitlines()
    rows = [line for line in page if line.startswith("| J")]
    missing = "out of reach at this scale"
    assert rows == [
        "| J1 | JumpReLU | a\\|b holds | size, units: 0.1235 [0.1, 12350] | reproduced | "
        "[03_size](03_size.png) | laptop |",
        "| J1 | JumpReLU | It is positive. | size, units: 2 [1, 3] | reproduced: a comment | "
        "[03_size](gpu/03_size.png) | gpu |",
        "| J2 | JumpReLU | It is positive. | size, units: 0.5, without an interval | "
        f"{missing}: one seed | [03_size](03_size.png) | laptop |",
        "| J3 | JumpReLU | It is positive. | size, units: not measured | "
        f"{missing}: too large |  | laptop |",
    ]
    assert page[page.index(rows[2]) - 4].startswith("## 04 ")
    counted = [line for line in page if re.match(r"\| (\d\d|all) \| (laptop|gpu|) \|", line)]
    assert counted == [
        "| 03 | laptop | 1 | 0 | 0 | 0 | 1 |",
        "| 04 | laptop | 0 | 0 | 0 | 1 | 1 |",
        "| 05 | laptop | 0 | 0 | 0 | 1 | 1 |",
        "| 03 | gpu | 1 | 0 | 0 | 0 | 1 |",
        "| all |  | 2 | 0 | 0 | 2 | 4 |",
    ]


def test_only_what_is_between_the_markers_changes():
    once = results_pages.with_block(README, "claims", "| a |")
    assert once == README.replace("by hand", "\n| a |\n")
    assert results_pages.with_block(once, "claims", "| a |") == once
    twice = results_pages.with_block(once, "claims", "| b |\n| c |")
    assert results_pages.with_block(twice, "claims", "| a |") == once


@pytest.mark.parametrize("text", ["none", "B", "E", "E B", "B B E", "B E E", "E B E"])
def test_markers_must_be_there_once_and_in_order(text):
    text = text.replace("B", "<!-- claims -->").replace("E", "<!-- /claims -->")
    with pytest.raises(ValueError, match="each once and in this order"):
        results_pages.with_block(text, "claims", "| a |")


def test_readme_and_the_page_of_figures_are_made_of_results(checkout, folder, monkeypatch):
    part(folder, monkeypatch, "03", "J1", "J2", interval=Interval(2.0, 1.2341, 3.0))
    assert {path.name for path in write_ledger(checkout)} == {
        "README.md",
        "LEDGER.md",
        "claims.csv",
    }
    readme = (checkout / "README.md").read_text()
    assert "| [03 Sizes](notebooks/03_sizes.ipynb) | How large? | 2 [1.23, 3] at 7 rows |" in readme
    rest = "size, units: 2 [1.23, 3] | reproduced | [03_size](figures/03_size.png) |"
    assert f"| J1 | JumpReLU | It is positive. | {rest}" in readme
    assert f"| J2 | JumpReLU | In other words. | {rest}" in readme and "by hand" not in readme
    figures = (folder / "README.md").read_text()
    assert (
        figures.count(".png") == 1
        and (
            "| [03_size](03_size.png) | How large it is | "
            "[`room.plots.size`](../notebooks/companion/room/plots.py) | [csv](03_size.csv) | "
            "JumpReLU, Figure 2 |"
        )
        in figures
    )
    (folder / "gpu").mkdir()
    (folder / "gpu/03_facts.json").touch()
    (folder / "gpu/03_size.png").touch()
    assert write_ledger(checkout) == [folder / "README.md"]
    assert "Of the profile gpu: [03_size](gpu/03_size.png)." in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  J1:", "  J9:", "the claim J9, which is in the ledger of the default profile 0 times"),
        ("{J1}", "{J8}", "the claim J8"),
        ("fact: rows", "fact: columns", "the fact 'columns'; the notebook's facts are rows"),
        ('"03"', '"04"', "no question and answer for notebook 03"),
        ("question:", "why:", "must have `claims`"),
        ("claims:", "claim:", "must have `claims`"),
    ],
)
def test_headlines_that_results_do_not_have_are_refused(
    checkout, folder, monkeypatch, old, new, message
):
    part(folder, monkeypatch, "03", "J1", "J2")
    path = checkout / results_pages.HEADLINES
    assert HEADLINES.count(old) == 1
    path.write_text(HEADLINES.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        write_ledger(checkout)
    assert not (folder / "claims.csv").exists()


def test_the_command_writes_checks_and_says_what_is_missing(checkout, folder, monkeypatch, capsys):
    readme, table = checkout / "README.md", folder / "claims.csv"
    part(folder, monkeypatch, "03", "J1", "J2")
    readme.write_text("# Title\n")
    capsys.readouterr()
    assert main(["--check"], checkout) == main([], checkout) == 2
    assert "README.md must have the lines <!-- notebooks -->" in capsys.readouterr().err
    assert not table.exists()
    readme.write_text(README)
    assert main(["--check"], checkout) == 1
    assert not table.exists() and readme.read_text() == README
    assert main([], checkout) == main(["--check"], checkout) == 0
    assert "| J1 |" in readme.read_text() and pd.read_csv(table).profile.tolist() == ["laptop"] * 2
    assert write_ledger(checkout) == []

    ledger_page = folder / "LEDGER.md"
    for path in (table, ledger_page, readme):  # by hand
        path.write_text(path.read_text().replace("reproduced", "not reproduced"))
    capsys.readouterr()
    assert main(["--check"], checkout) == 1
    found = re.findall(r"^(\S+) is not", capsys.readouterr().out, re.MULTILINE)
    assert found == ["figures/claims.csv", "figures/LEDGER.md", "README.md"]
    assert set(write_ledger(checkout)) == {table, ledger_page, readme} and stale(checkout) == []

    (folder / "claims_03.csv").unlink()
    (checkout / results_pages.HEADLINES).unlink()
    assert main([], checkout) == 0
    assert not table.exists() and not ledger_page.exists()


def test_python_m_runs_it_without_a_warning():
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "companion.rails.claims",
        "--help",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--check" in shown.stdout and shown.stderr == ""


def test_the_committed_ledger_is_what_the_parts_give():
    assert stale(ROOT) == [], "run `python -m companion.rails.claims`"


MANIFESTS = sorted(ROOT.glob("figures/**/*.manifest.json"))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_tables_and_claims_are_those_of_their_run(manifest):
    notebook = find_notebooks(ROOT, manifest.name.removesuffix(".manifest.json"))[0]
    assert finished(manifest.parent, notebook), (
        f"a table of {notebook.name} was edited, added or lost after it ran"
    )
