"""What raters said of a blind study: their CSV files checked, the key opened, counts, intervals and
agreement.

- a file is taken whole or refused with its name and line; nothing is repaired. A running checksum
  in every row finds what was changed, moved, left out or added.
- spreadsheets take a cell that begins with = + - @ for a formula. Such cells, and those that begin
  with an apostrophe, carry one more in front (OWASP, "CSV Injection").
- agreement is Krippendorff's alpha = 1 − D_o/D_e for ranks, from the matrix of coincidences
  (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, sections A to D).
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..files import digest, read_json, write_text
from ..intervals import LEVEL

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
KEY = ("format", "salt", "seed", "digest", "items")
RATINGS = ("NO", "MAYBE", "YES")
"""From least to most interpretable."""
COLUMNS = ("study", "item", "rating", "explanation", "rater", "time", "checksum")
GROUPS = ("architecture", "site", "layer", "target", "sae")
"""What counts can be taken by."""
ACTIVE = tuple("=+-@＝＋－＠'\t\r")
"""What a guarded cell does not begin with."""


class Ratings(NamedTuple):
    """One rater's file. ratings: item → one of RATINGS."""

    rater: str
    ratings: dict[str, str]
    explanations: dict[str, str]


class Scored(NamedTuple):
    """A study, opened."""

    items: pd.DataFrame
    """One row an item: its source, the verdict (median of its ratings, the lower of two), each
    rater's rating and explanation."""
    shares: pd.DataFrame
    """Columns of the groups, then rating, count, n (latents), share, low, high (exact 95 %
    interval). Over latents, by their verdicts: several ratings of one are not independent draws."""
    alpha: float
    """Krippendorff's; NaN with one rater, or where all say the same."""
    raters: tuple[str, ...]

    def write(self, path: str | Path) -> None:
        """Write `items` as a CSV that is safe to open in a spreadsheet."""
        frame = self.items.map(lambda cell: guard(cell) if isinstance(cell, str) else cell)
        text = frame.rename(columns=guard).to_csv(index=False, lineterminator="\n")
        write_text(path, text)

    def report(self) -> str:
        """Counts and agreement as a text."""
        shares = self.shares.to_string(index=False, float_format="{:.3f}".format)
        alpha = "not defined for these ratings" if np.isnan(self.alpha) else f"{self.alpha:.3f}"
        return (
            f"{len(self.items)} items, {len(self.raters)} raters. Latents by the median of their "
            f"ratings:\n{shares}\n\nKrippendorff's alpha: {alpha}"
        )


# ---- the key, and raters' files


def study_id(key: dict[str, Any]) -> str:
    """Id of the study that `key` belongs to, 16 hex digits: a digest of everything in it that
    matters, so that a key that was edited fits no rating."""
    return digest(*(key[name] for name in KEY))


def read_key(path: str | Path) -> dict[str, Any]:
    """The key of a study. Raises FileNotFoundError for no such file, ValueError for one that is
    none or was changed."""
    key = read_json(path)
    if not isinstance(key, dict) or not {*KEY, "study"} <= set(key) or key["format"] != FORMAT:
        raise ValueError(
            f"{path} is not the key of a study: expected an object of {', '.join(KEY)} and study, "
            f"format {FORMAT}"
        )
    if study_id(key) != key["study"]:
        raise ValueError(
            f"{path} was changed after the study was made: use the file as it was written"
        )
    return key


def guard(text: str) -> str:
    """`text` as a cell that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(ACTIVE) else text


def checksum(start: int, fields: Sequence[str]) -> int:
    """Running CRC-32 of a row, from that of the row before; `fields` as they are without the
    guard."""
    return zlib.crc32("\x1f".join(fields).encode(), start)


def read_ratings(path: str | Path, key: dict[str, Any]) -> Ratings:
    """A rater's file, checked against the key of the study.

    Raises FileNotFoundError for no such file, ValueError naming file and line for anything that the
    page would not have written.
    """
    found, crc = Ratings("", {}, {}), zlib.crc32((key["study"] + key["digest"]).encode())
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            if tuple(header := next(reader, [])) != COLUMNS:
                raise ValueError(f"the columns are {header}; expected {', '.join(COLUMNS)}")
            for cells in reader:
                if len(cells) != len(COLUMNS):
                    raise ValueError(f"{len(cells)} cells, expected {len(COLUMNS)}")
                *fields, given = (cell.removeprefix("'") for cell in cells)
                study, item, rating, explanation, rater, _ = fields
                crc = checksum(crc, fields)
                if study != key["study"]:
                    raise ValueError(f"it is of study {study!r}, not {key['study']!r}")
                if given != f"{crc:08x}" or rating not in RATINGS:
                    raise ValueError("this row or one above was changed, moved, left out or added")
                found.ratings[item] = rating
                found.explanations[item] = explanation
            if not found.ratings:
                raise ValueError("it holds no rating")
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{path}, line {max(1, reader.line_num)}: {error}. Hand in the file as the page "
                "exported it, not saved from a spreadsheet"
            ) from error
    return found._replace(rater=rater)


# ---- counts and agreement


def score(
    key: dict[str, Any],
    paths: Sequence[str | Path],
    by: Sequence[str] = ("architecture",),
    partial: bool = False,
) -> Scored:
    """Counts, intervals and agreement of a study, from its key and the raters' files.

    by: what to count by, of GROUPS. partial: accept raters who left items out; items that nobody
    rated are not counted.

    Raises ValueError for a file that :func:`read_ratings` refuses, a rater who is there twice, or
    missing ratings.
    """
    import pandas as pd
    from scipy import stats

    if not paths:
        raise ValueError("no ratings given: expected at least one CSV file")
    files: dict[str, Ratings] = {}
    order = [item["item"] for item in key["items"]]
    for path in paths:
        own = read_ratings(path, key)
        if own.rater in files:
            raise ValueError(f"{path} is a second file of {own.rater!r}: give one file a rater")
        if not partial and len(own.ratings) < len(order):
            raise ValueError(
                f"{path} has {len(own.ratings)} of {len(order)} items: let {own.rater} finish, or "
                "allow it with --partial"
            )
        files[own.rater] = own
    ranks = {rating: float(rank) for rank, rating in enumerate(RATINGS)}
    table = np.array(
        [[ranks.get(own.ratings.get(item, ""), np.nan) for item in order] for own in files.values()]
    )
    items = pd.DataFrame(key["items"])
    items["verdict"] = [_median(column[~np.isnan(column)]) for column in table.T]
    for rater, own in files.items():
        items[f"rating: {rater}"] = [own.ratings.get(item, "") for item in order]
        items[f"explanation: {rater}"] = [own.explanations.get(item, "") for item in order]
    rows = []
    for group, part in items[items.verdict != ""].groupby(list(by)):
        for rating in reversed(RATINGS):
            count = int((part.verdict == rating).sum())
            share = stats.binomtest(count, len(part))
            ends = share.proportion_ci(LEVEL, method="exact")
            rows.append((*group, rating, count, len(part), share.statistic, *ends))
    shares = pd.DataFrame(rows, columns=[*by, "rating", "count", "n", "share", "low", "high"])
    return Scored(items, shares, krippendorff_alpha(table), tuple(files))


def _median(ranks: np.ndarray) -> str:
    """The rating in the middle, the lower one of two; "" for none."""
    return RATINGS[int(np.sort(ranks)[(len(ranks) - 1) // 2])] if len(ranks) else ""


def krippendorff_alpha(ratings: np.ndarray) -> float:
    """Alpha of `ratings`, float [raters, items], greater numbers for higher ranks; NaN: not rated.
    1 is full agreement, 0 what chance gives. Items with one rating are left out.

    NaN where it is not defined: no item with two ratings, or one value for all.
    """
    ratings = np.asarray(ratings, dtype=float)
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0)  # [items, values]
    counts = counts[counts.sum(1) > 1]
    weight = 1 / (counts.sum(1) - 1)
    coincidences = (counts * weight[:, None]).T @ counts - np.diag(weight @ counts)
    total = coincidences.sum(1)  # of each value, the ratings that have a partner
    # of two values, the square of the ratings between them, both ends counted half
    middle = np.cumsum(total) - total / 2
    distance = np.square(middle[:, None] - middle)
    expected = (np.outer(total, total) * distance).sum() / (total.sum() - 1) if len(counts) else 0.0
    return float("nan") if expected == 0 else float(1 - (coincidences * distance).sum() / expected)
