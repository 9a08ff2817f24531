"""Do raters agree? Krippendorff's alpha, and the share of pairs that say the same.

Notable here:
- alpha = 1 − D_o/D_e, from the matrix of coincidences (Krippendorff, "Computing Krippendorff's
  Alpha-Reliability", 2011, sections A to D). Items with one rating say nothing about agreement and
  are left out; missing ratings are allowed.
- 1 is full agreement, 0 what chance gives, below 0 is worse than chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..intervals import share_interval

LEVELS = ("nominal", "ordinal")


def krippendorff_alpha(ratings: np.ndarray, level: str = "nominal") -> float:
    """Alpha of `ratings`, float [raters, items]; NaN: not rated. For "ordinal", greater numbers are
    higher ranks.

    NaN where it is not defined: no item with two ratings, or one value for all. Raises ValueError
    for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: expected one of {', '.join(LEVELS)}")
    ratings = np.asarray(ratings, dtype=float)
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0)  # [items, values]
    counts = counts[counts.sum(1) > 1]
    weight = 1 / (counts.sum(1) - 1)
    coincidences = (counts * weight[:, None]).T @ counts - np.diag(weight @ counts)
    total = coincidences.sum(1)  # n_c: pairable ratings of each value
    distance = _distance(total, level)
    expected = (np.outer(total, total) * distance).sum() / (total.sum() - 1) if len(counts) else 0.0
    return float("nan") if expected == 0 else float(1 - (coincidences * distance).sum() / expected)


def _distance(total: np.ndarray, level: str) -> np.ndarray:
    """δ² of each pair of values. Ordinal: the square of the ratings between them, both ends counted
    half."""
    if level == "nominal":
        return 1.0 - np.eye(len(total))
    middle = np.cumsum(total) - total / 2
    return np.square(middle[:, None] - middle)


def pairwise_agreement(ratings: np.ndarray, raters: Sequence[str]) -> pd.DataFrame:
    """Each pair of raters: columns first, second, items (rated by both), agree (share), low, high
    (exact 95 % interval).

    ratings: float [raters, items]; NaN: not rated. Without common items the share is NaN.
    """
    rows = []
    for (i, first), (j, second) in itertools.combinations(enumerate(raters), 2):
        both = ~np.isnan(ratings[i]) & ~np.isnan(ratings[j])
        same = int((ratings[i] == ratings[j])[both].sum())
        share = share_interval(same, int(both.sum())) if both.any() else (np.nan,) * 3
        rows.append((first, second, int(both.sum()), *share))
    return pd.DataFrame(rows, columns=["first", "second", "items", "agree", "low", "high"])
