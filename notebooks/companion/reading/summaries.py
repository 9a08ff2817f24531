"""Means of scores over an SAE's latents, and differences between SAEs, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from jumprelu.intervals import Interval
from jumprelu.latents.interp import SCORES


def _resampled(
    values: np.ndarray, weights: np.ndarray, band: np.ndarray, draws: int, seed: int | list[int]
) -> np.ndarray:
    """The weighted mean of the latents, and of `draws` samples of them, with replacement within
    bands; [1 + draws]."""
    rng = np.random.default_rng(seed)
    totals, sums = np.zeros(1 + draws), np.zeros(1 + draws)
    for number in np.unique(band):
        mine = (band == number).nonzero()[0]
        drawn = np.vstack([mine, mine[rng.integers(len(mine), size=(draws, len(mine)))]])
        totals += (values[drawn] * weights[drawn]).sum(1)
        sums += weights[drawn].sum(1)
    return totals / sums


def _interval(means: np.ndarray) -> Interval:
    return Interval(
        float(means[0]), *(float(end) for end in np.quantile(means[1:], [0.025, 0.975]))
    )


def summary(
    table: pd.DataFrame,
    columns: Sequence[str] = SCORES,
    by: Sequence[str] = ("sae",),
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean of columns of :func:`jumprelu.latents.interp.study`'s table over the SAE's latents, with
    bootstrap 95 % intervals over latents.

    Latents count by their `weight` and are drawn anew within their band; rows without a value are
    left out. Returns columns `by`, score, mean, low, high, latents.
    """
    rows = []
    for key, own in table.groupby(list(by), sort=False):
        for name in columns:
            some = own[own[name].notna()]
            found = (
                _interval(
                    _resampled(
                        *(some[c].to_numpy(float) for c in (name, "weight", "band")), draws, seed
                    )
                )
                if len(some)
                else Interval(*[float("nan")] * 3)
            )
            rows.append((*key, name, *found, len(some)))
    return pd.DataFrame(rows, columns=[*by, "score", "mean", "low", "high", "latents"])


def difference(
    table: pd.DataFrame,
    first: str,
    second: str,
    column: str = "correlation",
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean of a score of the SAE `first` less that of `second`, at equal frequency: the mean over
    bands that both have of the difference within each, with a bootstrap 95 % interval over latents.
    Raises ValueError if they share no band."""
    found = []
    for name in (first, second):
        own = table[(table.sae == name) & table[column].notna()]
        found.append({band: some[column].to_numpy(float) for band, some in own.groupby("band")})
    bands = sorted(set(found[0]) & set(found[1]))
    if not bands:
        raise ValueError(
            f"{first} and {second} have no latents with a {column} in a common band of frequency: "
            "sample more"
        )
    means = np.zeros(1 + draws)
    for sign, own, offset in zip((1, -1), found, (0, 1), strict=True):
        for band in bands:
            values = own[band]
            one = np.ones(len(values))
            means += (
                sign * _resampled(values, one, one, draws, [seed, offset, int(band)]) / len(bands)
            )
    return _interval(means)
