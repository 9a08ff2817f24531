"""What raters said of a blind study: their CSV files checked, the key opened, counts, intervals and
agreement.

Notable here:
- a file is taken whole or refused with its name and line: unknown or repeated items, another
  study's id, a rating that is none, columns that lack, a checksum that does not fit. Nothing is
  repaired.
- the key is checked first: a study's id is a digest of what its key says, so a key that was edited
  fits no rating.
- spreadsheets take a cell that begins with = + - @ for a formula. Such cells carry an apostrophe in
  front, here and in the raters' files (OWASP, "CSV Injection"); so does a cell that begins with an
  apostrophe, so that reading takes one away for sure.
"""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..files import digest, read_json, write_text
from ..intervals import share_interval
from .agreement import LEVELS, krippendorff_alpha, pairwise_agreement

FORMAT = 1
RATINGS = ("NO", "MAYBE", "YES")
"""From least to most interpretable."""
COLUMNS = ("study", "item", "rating", "explanation", "rater", "time", "checksum")
GROUPS = ("architecture", "site", "layer", "target", "sae")
"""What counts can be taken by."""
ACTIVE = tuple("=+-@＝＋－＠'\t\r")
"""What a guarded cell does not begin with."""


class Ratings(NamedTuple):
    """One rater's file."""

    rater: str
    ratings: dict[str, str]
    """Item → one of RATINGS."""
    explanations: dict[str, str]


class Scored(NamedTuple):
    """A study, opened."""

    items: pd.DataFrame
    """One row an item: its source, the verdict (median of its ratings, the lower of two), each
    rater's rating and explanation."""
    shares: pd.DataFrame
    """Columns of the groups, then rating, count, n (latents), share, low, high (exact 95 %
    interval)."""
    alpha: dict[str, float]
    """Krippendorff's alpha, "nominal" and "ordinal"; NaN with one rater, or where all say the
    same."""
    pairs: pd.DataFrame
    """Pairs of raters: see :func:`jumprelu.latents.agreement.pairwise_agreement`."""
    raters: tuple[str, ...]

    def write(self, path: str | Path) -> None:
        """Write `items` as a CSV that is safe to open in a spreadsheet."""
        frame = self.items.map(lambda cell: guard(cell) if isinstance(cell, str) else cell).rename(
            columns=guard
        )
        write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def study_id(key: dict[str, Any]) -> str:
    """Id of the study that `key` belongs to, 16 hex digits: a digest of everything in it that
    matters."""
    return digest(*(key[name] for name in ("format", "salt", "seed", "digest", "items")))


def read_key(path: str | Path) -> dict[str, Any]:
    """The key of a study. Raises FileNotFoundError for no such file, ValueError for one that is
    none or was changed."""
    key = read_json(path)
    needed = {"format", "salt", "seed", "digest", "items", "study"}
    if not isinstance(key, dict) or not needed <= set(key):
        raise ValueError(
            f"{path} is not the key of a study: expected a JSON object with {', '.join(sorted(needed))}"
        )
    if key["format"] != FORMAT:
        raise ValueError(f"{path} has format {key['format']!r}, this version reads {FORMAT}")
    if study_id(key) != key["study"]:
        raise ValueError(
            f"{path} was changed after the study was made: its content gives the id {study_id(key)}, it says "
            f"{key['study']}; use the file as it was written"
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
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error}): hand in the file as the page exported it"
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    items, raters, found = {item["item"] for item in key["items"]}, set(), Ratings("", {}, {})
    crc = zlib.crc32((key["study"] + key["digest"]).encode())
    try:
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise ValueError(
                f"the columns are {', '.join(header) or 'none'}; expected {', '.join(COLUMNS)}"
            )
        for row in reader:
            if len(row) != len(COLUMNS):
                raise ValueError(f"{len(row)} cells, expected {len(COLUMNS)}")
            fields = [_unguarded(cell) for cell in row]
            crc = checksum(crc, fields[:-1])
            _check_row(
                dict(zip(COLUMNS, fields, strict=True)), key["study"], items, found, raters, crc
            )
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}, line {max(1, reader.line_num)}: {error}. Hand in the file as the page exported it, "
            "not saved from a spreadsheet"
        ) from error
    if not raters:
        raise ValueError(f"{path} holds no rating")
    return found._replace(rater=raters.pop())


def _unguarded(cell: str) -> str:
    if cell.startswith("'"):
        return cell[1:]
    if cell.startswith(ACTIVE):
        raise ValueError(
            f"the cell {cell[:20]!r} begins like a formula, which the page never writes"
        )
    return cell


def _check_row(
    row: dict[str, str], study: str, items: set[str], found: Ratings, raters: set[str], crc: int
) -> None:
    """Raise ValueError for a row that does not belong; else enter it into `found` and `raters`."""
    item = row["item"]
    if row["study"] != study:
        raise ValueError(f"it is of study {row['study']!r}, the key of {study!r}")
    if item not in items:
        raise ValueError(f"unknown item {item!r}")
    if item in found.ratings:
        raise ValueError(f"item {item} is rated a second time")
    if row["rating"] not in RATINGS:
        raise ValueError(f"the rating is {row['rating']!r}, expected one of {', '.join(RATINGS)}")
    if not row["rater"].strip():
        raise ValueError("no rater is named")
    if raters - {row["rater"]}:
        raise ValueError(
            f"the rater is {row['rater']!r}, above {next(iter(raters))!r}: one file holds one rater"
        )
    try:
        datetime.fromisoformat(row["time"])
    except ValueError:
        raise ValueError(
            f"the time is {row['time']!r}, expected one like 2026-01-31T12:00:00.000Z"
        ) from None
    if row["checksum"] != f"{crc:08x}":
        raise ValueError(
            f"the checksum is {row['checksum']!r}, the rows up to here give {crc:08x}: this row or one above "
            "was changed, moved or left out"
        )
    raters.add(row["rater"])
    found.ratings[item] = row["rating"]
    found.explanations[item] = row["explanation"]


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
    if unknown := set(by) - set(GROUPS):
        raise ValueError(
            f"cannot count by {', '.join(sorted(unknown))}: expected some of {', '.join(GROUPS)}"
        )
    files, order = {}, [item["item"] for item in key["items"]]
    for path in paths:
        own = read_ratings(path, key)
        if own.rater in files:
            raise ValueError(
                f"{path} is of the rater {own.rater!r}, as is a file before it: give one file a rater"
            )
        if not partial and len(own.ratings) < len(order):
            raise ValueError(
                f"{path} has {len(own.ratings)} of {len(order)} items: let {own.rater} finish, or allow it "
                "with --partial"
            )
        files[own.rater] = own
    if not files:
        raise ValueError("no ratings given: expected at least one CSV file")
    ranks = {rating: rank for rank, rating in enumerate(RATINGS)}
    table = np.array(
        [[ranks.get(own.ratings.get(item, ""), np.nan) for item in order] for own in files.values()]
    )
    items = pd.DataFrame(key["items"])
    # inverted_cdf: an existing rank, the lower one of two in the middle
    items["verdict"] = [
        RATINGS[int(np.quantile(given, 0.5, method="inverted_cdf"))] if len(given) else ""
        for given in (column[~np.isnan(column)] for column in table.T)
    ]
    for rater, own in files.items():
        items[f"rating: {rater}"] = [own.ratings.get(item, "") for item in order]
        items[f"explanation: {rater}"] = [own.explanations.get(item, "") for item in order]
    alpha = {level: krippendorff_alpha(table, level) for level in LEVELS}
    return Scored(
        items, _shares(items, list(by)), alpha, pairwise_agreement(table, list(files)), tuple(files)
    )


def _shares(items: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    rows = []
    for group, part in items[items.verdict != ""].groupby(by):
        for rating in reversed(RATINGS):
            count = int((part.verdict == rating).sum())
            rows.append((*group, rating, count, len(part), *share_interval(count, len(part))))
    return pd.DataFrame(rows, columns=[*by, "rating", "count", "n", "share", "low", "high"])


def report(found: Scored) -> str:
    """What the command line prints."""
    number = "{:.3f}".format
    lines = [
        f"{len(found.items)} items, {len(found.raters)} raters. Latents by the median of their ratings:",
        found.shares.to_string(index=False, float_format=number),
        "",
    ]
    for level, value in found.alpha.items():
        lines.append(
            f"Krippendorff's alpha, {level}: "
            + ("not defined for these ratings" if np.isnan(value) else number(value))
        )
    if len(found.pairs):
        lines += ["", "Pairs of raters:", found.pairs.to_string(index=False, float_format=number)]
    return "\n".join(lines)
