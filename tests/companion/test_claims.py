"""The ledger of claims: verdicts by hand, tables that come back, and what is committed."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from companion.rails import claims
from companion.rails.claims import (
    BEGIN,
    END,
    claim,
    collect,
    ledger,
    main,
    read_claims,
    readme_table,
    stale,
    with_table,
    write_ledger,
)
from companion.rails.profiles import find_notebooks
from companion.rails.reproduce import finished

from jumprelu.intervals import Interval, mean_interval

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
        ({"reason": END}, "without an HTML comment"),
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


def test_the_table_of_readme(folder, monkeypatch):
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
    assert readme_table(collect(folder)).splitlines() == [
        "| id | paper | claim | measured: value [interval] | verdict | figure | profile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| J1 | JumpReLU | a\\|b holds | size, units: 0.1235 [0.1, 12350] | reproduced | "
        "[03_size](figures/03_size.png) | laptop |",
        "| J1 | JumpReLU | It is positive. | size, units: 2 [1, 3] | reproduced: a comment | "
        "[03_size](figures/gpu/03_size.png) | gpu |",
        "| J2 | JumpReLU | It is positive. | size, units: 0.5, without an interval | out of reach at this scale: one seed | "
        "[03_size](figures/03_size.png) | laptop |",
        "| J3 | JumpReLU | It is positive. | size, units: not measured | out of reach at this scale: too large |  | laptop |",
    ]


def test_only_what_is_between_the_markers_changes():
    readme = f"# Title\n\n{BEGIN}\nedited by hand\n{END}\n\nmore\n"
    once = with_table(readme, "| a |")
    assert once == f"# Title\n\n{BEGIN}\n\n| a |\n\n{END}\n\nmore\n"
    assert with_table(once, "| a |") == once
    assert with_table(with_table(once, "| b |\n| c |"), "| a |") == once
    assert (
        with_table(once, "")
        == f"# Title\n\n{BEGIN}\n{END}\n\nmore\n"
        == with_table(with_table(once, ""), "")
    )
    assert with_table("no markers\n", "") == "no markers\n"


@pytest.mark.parametrize(
    "readme",
    [
        "none",
        BEGIN,
        END,
        f"{END} {BEGIN}",
        f"{BEGIN} {BEGIN} {END}",
        f"{BEGIN} {END} {END}",
        f"{END} {BEGIN} {END}",
    ],
)
def test_markers_must_be_there_once_and_in_order(readme):
    with pytest.raises(ValueError, match="each once and in this order"):
        with_table(readme, "| a |")


def test_the_command_writes_checks_and_says_what_is_missing(tmp_path, folder, monkeypatch, capsys):
    readme, table = tmp_path / "README.md", folder / "claims.csv"
    readme.write_text("# Title\n")
    assert (
        main(["--check"], tmp_path) == main(["--readme"], tmp_path) == main([], tmp_path) == 0
    )  # no parts, no markers
    assert readme.read_text() == "# Title\n" and not table.exists()

    part(folder, monkeypatch, "03", "J1")
    capsys.readouterr()
    assert main(["--check"], tmp_path) == main(["--readme"], tmp_path) == 2
    assert (
        "README.md must have the lines <!-- claims -->" in capsys.readouterr().err
        and not table.exists()
    )
    readme.write_text(f"# Title\n{BEGIN}\n{END}\n")
    assert main(["--check"], tmp_path) == 1
    assert not table.exists() and "| J1 |" not in readme.read_text()
    assert main([], tmp_path) == 0
    assert (
        table.exists() and "| J1 |" not in readme.read_text() and main(["--check"], tmp_path) == 1
    )
    assert main(["--readme"], tmp_path) == main(["--check"], tmp_path) == 0
    assert "| J1 |" in readme.read_text() and pd.read_csv(table).profile.tolist() == ["laptop"]
    assert write_ledger(tmp_path, readme=True) == []

    table.write_text(table.read_text().replace("reproduced", "not reproduced"))  # by hand
    readme.write_text(readme.read_text().replace("2 [1, 3]", "2 [1, 4]"))
    capsys.readouterr()
    assert main(["--check"], tmp_path) == 1
    assert re.findall(r"^(\S+) is not", capsys.readouterr().out, re.MULTILINE) == [
        "figures/claims.csv",
        "README.md",
    ]
    assert set(write_ledger(tmp_path, readme=True)) == {table, readme} and stale(tmp_path) == []

    (folder / "claims_03.csv").unlink()
    assert (
        main(["--readme"], tmp_path) == 0
        and not table.exists()
        and readme.read_text() == f"# Title\n{BEGIN}\n{END}\n"
    )


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
    assert "--readme" in shown.stdout and shown.stderr == ""


def test_the_committed_ledger_is_what_the_parts_give():
    assert stale(ROOT) == [], "run `python -m companion.rails.claims --readme`"


MANIFESTS = sorted(ROOT.glob("figures/**/*.manifest.json"))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_tables_and_claims_are_those_of_their_run(manifest):
    notebook = find_notebooks(ROOT, manifest.name.removesuffix(".manifest.json"))[0]
    assert finished(manifest.parent, notebook), (
        f"a table of {notebook.name} was edited, added or lost after it ran"
    )
