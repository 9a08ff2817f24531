"""The ledger of claims: what the papers say, what was measured here, and the verdict.

Notable here:
- nobody writes a verdict: it follows from an interval and the region in which the claim holds, and
  an interval that reaches over the edge of the region decides nothing.
- each notebook writes its part, `claims_NN.csv`, beside its figures; `figures/claims.csv` and the
  pages (`results_pages.py`) are made of the parts, at the end of `make reproduce` and by `python -m
  companion.rails.claims`; `--check` only compares.
- numbers keep four significant digits.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from jumprelu.files import write_text
from jumprelu.intervals import Interval

from .figures import ROOT, figures_folder

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided"
OUT_OF_REACH = "out of reach at this scale"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDECIDED, OUT_OF_REACH)


class Claim(NamedTuple):
    """One line of the ledger; :func:`claim` makes it, because the verdict follows from the
    numbers."""

    id: str
    """Short tag, such as J1."""
    paper: str
    """Who claims it: "JumpReLU", "Gemma Scope", "Dark matter", "ours"."""
    claim: str
    """One sentence."""
    quantity: str
    """What is measured, with its unit."""
    value: float
    low: float
    high: float
    verdict: str
    reason: str
    """Why it is out of reach, or a comment, or ''."""
    figure: str
    """The figure that shows it, such as 03_pareto; '' if nothing was measured."""


NUMBERS = ["value", "low", "high"]
COLUMNS = ["id", "paper", "claim", "quantity", *NUMBERS, "verdict", "reason", "figure"]
"""Columns of a notebook's part, and the order in which a notebook shows them."""

# ---- one claim


def verdict_of(interval: Interval | None, holds: tuple[float, float]) -> str:
    """The verdict on a claim that is true where the measured quantity lies in `holds`, whose ends
    belong to it.

    An interval inside the region: "reproduced"; one without a point in common with it: "not
    reproduced"; any other: "undecided". No interval, or one with NaN in it, such as that of a
    single seed: "out of reach at this scale".
    """
    if interval is None or any(map(math.isnan, interval)):
        return OUT_OF_REACH
    if holds[0] <= interval.low and interval.high <= holds[1]:
        return REPRODUCED
    return NOT_REPRODUCED if interval.high < holds[0] or holds[1] < interval.low else UNDECIDED


def claim(
    id: str,
    paper: str,
    sentence: str,
    quantity: str,
    interval: Interval | None,
    holds: tuple[float, float],
    figure: str,
    reason: str = "",
    missing: str = "",
) -> Claim:
    """A claim with the verdict that the measurement gives it.

    id: short tag, such as "J1"; paper: who claims it; sentence: the claim; quantity: what was
    measured, with its unit; interval: the measurement, floats, None if there is none; holds: (low,
    high), the region of the quantity in which the claim is true, its ends included, -inf or inf for
    an open side; figure: the figure that shows it, such as "03_pareto" ('' only where nothing could
    be measured); reason: a comment, kept whatever the verdict; missing: what it would take to
    measure it, kept only if it is out of reach at this scale. Then one of the two is needed.

    Raises ValueError for an empty or broken text, a region or an interval that is none, and a
    missing reason.
    """
    if not re.fullmatch(r"\w[\w.-]*", id):
        raise ValueError(f"id must be a short tag of letters and digits, such as 'J1', got {id!r}")
    for name, text in {"paper": paper, "sentence": sentence, "quantity": quantity}.items():
        if not text.strip():
            raise ValueError(
                f"{id}: {name} is empty; write it out, because the ledger is read without the "
                "notebook"
            )
    for name, text in {
        "paper": paper,
        "sentence": sentence,
        "quantity": quantity,
        "reason": reason,
        "missing": missing,
    }.items():
        if "\n" in text or "<!--" in text:
            raise ValueError(
                f"{id}: {name} must be one line without an HTML comment, because it becomes part "
                f"of a row of a table, got {text!r}"
            )
    low, high = map(float, holds)
    if not low < high:
        raise ValueError(
            f"{id}: holds must be (low, high) with low < high, -inf or inf for an open side, got "
            f"{holds}"
        )
    if interval is not None:
        if any(map(np.ndim, interval)):
            raise ValueError(
                f"{id}: the interval must hold three numbers, got arrays: one claim is about one "
                "quantity"
            )
        interval = Interval(*map(float, interval))
        if interval.low > interval.mean or interval.mean > interval.high:
            raise ValueError(
                f"{id}: the interval must be Interval(mean, low, high) with low ≤ mean ≤ high, got "
                f"{interval}"
            )
    verdict = verdict_of(interval, (low, high))
    if verdict == OUT_OF_REACH:
        reason = "; ".join(filter(None, (reason, missing)))
    if verdict == OUT_OF_REACH and not reason.strip():
        raise ValueError(
            f"{id} is out of reach at this scale, since there is no interval without NaN: "
            "give `missing`, what it would take to measure it"
        )
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", figure) and not (
        verdict == OUT_OF_REACH and figure == ""
    ):
        raise ValueError(
            f"{id}: figure must be the notebook's number and the figure's name, such as "
            f"'03_pareto', got {figure!r}"
        )
    numbers = interval or Interval(math.nan, math.nan, math.nan)
    return Claim(id, paper, sentence, quantity, *numbers, verdict, reason, figure)


# ---- a notebook's part, and the whole


def _csv(frame: pd.DataFrame) -> str:
    # four digits are in the frame already; six here, so that 12340 is not written as 1.234e+04
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def ledger(notebook: str, claims: list[Claim]) -> pd.DataFrame:
    """Write a notebook's claims to `claims_NN.csv` in the figures folder and return them as a
    table, for the cell to show.

    notebook: its number, such as "03". Raises ValueError for no claim, and for two with one id.
    """
    if not re.fullmatch(r"\d\d", notebook):
        raise ValueError(f"notebook must be its number, such as '03', got {notebook!r}")
    if not claims:
        raise ValueError(f"notebook {notebook} has no claims: leave the call of ledger out")
    ids = [each.id for each in claims]
    if len(set(ids)) < len(ids):
        twice = sorted({each for each in ids if ids.count(each) > 1})
        raise ValueError(
            f"each claim needs an id of its own, {', '.join(twice)} is there more than once"
        )
    frame = pd.DataFrame(claims, columns=COLUMNS)
    frame[NUMBERS] = frame[NUMBERS].astype(float).map(lambda number: float(f"{number:.4g}"))
    write_text(figures_folder() / f"claims_{notebook}.csv", _csv(frame))
    return frame


def read_claims(path: str | Path) -> pd.DataFrame:
    """A notebook's part, as :func:`ledger` returned it. Raises ValueError for a file with other
    columns."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(frame.columns) != COLUMNS:
        raise ValueError(
            f"{path} has the columns {', '.join(frame.columns)}; expected {', '.join(COLUMNS)}: "
            "delete it, and `make reproduce` writes it again"
        )
    return frame.assign(
        **{name: [float(text or "nan") for text in frame[name]] for name in NUMBERS}
    )


def collect(folder: str | Path) -> pd.DataFrame:
    """All claims of a figures folder: `claims_NN.csv` in it are of the default profile, in
    `<profile>/` of that one.

    Columns: those of a part, notebook, profile. By notebook, then by profile with the default
    first, then as in the part.
    """
    from .profiles import (
        DEFAULT_PROFILE,  # here, because it brings jupytext, which no notebook needs
    )

    folder = Path(folder)
    paths = [*folder.glob("claims_[0-9][0-9].csv"), *folder.glob("*/claims_[0-9][0-9].csv")]
    parts = [
        (path.stem[-2:], DEFAULT_PROFILE if path.parent == folder else path.parent.name, path)
        for path in paths
    ]
    parts.sort(key=lambda part: (part[0], part[1] != DEFAULT_PROFILE, part[1]))
    frames = [
        read_claims(path).assign(notebook=notebook, profile=profile)
        for notebook, profile, path in parts
    ]
    return (
        pd.concat(frames, ignore_index=True)
        if frames
        else pd.DataFrame(columns=[*COLUMNS, "notebook", "profile"])
    )


# ---- writing, and the command line


def _changes(root: Path) -> dict[Path, str | None]:
    """Path → the text that the parts ask for, None for no such file; only what is not so
    already."""
    from . import results_pages as pages  # here, because it brings jupytext

    frame = collect(root / "figures")
    wanted: dict[Path, str | None] = {
        root / "figures/claims.csv": None if frame.empty else _csv(frame),
        root / "figures/LEDGER.md": None
        if frame.empty
        else pages.ledger_page(root, frame, VERDICTS),
    }
    wanted[root / "figures/README.md"] = pages.figures_page(root) or None
    headlines = pages.read_headlines(root)
    if headlines:
        path = root / "README.md"
        text = path.read_text(encoding="utf-8")
        table = pages.notebook_table(root, frame, headlines)
        text = pages.with_block(text, "notebooks", table)
        wanted[path] = pages.with_block(text, "claims", pages.headline_table(frame, headlines))
    there = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in wanted}
    return {path: text for path, text in wanted.items() if text != there[path]}


def stale(root: Path) -> list[Path]:
    """Which of `figures/claims.csv`, figures/LEDGER.md, figures/README.md and README.md below
    `root` are not as the parts ask for."""
    return list(_changes(root))


def write_ledger(root: Path | None = None) -> list[Path]:
    """Write `figures/claims.csv`, figures/LEDGER.md, figures/README.md and README's blocks, where
    they are not as the parts ask for.

    root: the checkout, by default that of this package. Returns what was changed. Without any part
    there is neither `claims.csv` nor LEDGER.md. Raises ValueError, before anything is written, if
    README has no place for a block, or `headlines.yaml` names a claim or a fact that is not there.
    """
    changes = _changes(root or ROOT)
    for path, text in changes.items():
        if text is None:
            path.unlink()
        else:
            write_text(path, text)
    return list(changes)


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 if --check found something, or 2 for an
    error."""
    root = root or ROOT
    purpose = (
        "Make figures/claims.csv, figures/LEDGER.md, figures/README.md and README's tables of what "
        "the notebooks left in figures/."
    )
    parser = argparse.ArgumentParser(prog="python -m companion.rails.claims", description=purpose)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if any is not what would be written",
    )
    given = parser.parse_args(arguments)
    try:
        changed = stale(root) if given.check else write_ledger(root)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in changed:
        name = path.relative_to(root).as_posix()
        print(
            f"{name} is not what the results ask for: python -m companion.rails.claims"
            if given.check
            else f"{name}: written"
        )
    if not changed:
        print("up to date")
    return 1 if given.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
