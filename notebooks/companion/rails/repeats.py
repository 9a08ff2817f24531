"""What repeated measurements say: over seeds, over the repeats of a table, and with one group left
out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats

from jumprelu.intervals import Interval, bootstrap


def mean_interval(
    values: Sequence[float] | np.ndarray | torch.Tensor, level: float = 0.95, comparisons: int = 1
) -> Interval:
    """Mean over axis 0 of independent `values`, shape [n, ...], with Student's t-interval; ends are
    NaN where n is 1.

    With `comparisons` > 1 that many intervals hold *together* at `level` (Bonferroni). Values of
    shape [n] give plain floats. Raises ValueError for no values.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least 1 value, got none")
    mean, half = values.mean(0), np.full(values.shape[1:], math.nan)
    if n > 1:
        reach = float(stats.t.ppf(1 - (1 - level) / 2 / comparisons, n - 1))
        half = values.std(0, ddof=1) / math.sqrt(n) * reach
    found = Interval(mean, mean - half, mean + half)
    return Interval(*map(float, found)) if values.ndim == 1 else found


def share_interval(count: int, n: int) -> Interval:
    """Share of `count` in n with its exact binomial interval (Clopper–Pearson).

    With none of n the upper end is about 3.7/n: a share below 1/n is not claimed from n. Raises
    ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"a share of {n} has no interval: give at least 1")
    found = stats.binomtest(count, n)
    low, high = found.proportion_ci(0.95, method="exact")
    return Interval(found.statistic, float(low), float(high))


def over_seeds(
    statistics: Sequence[Callable[[torch.Tensor], torch.Tensor]], documents: int, draws: int = 1000
) -> Interval:
    """Mean of a statistic over SAEs that differ in their seed, with an interval (95 %) for other
    documents and other seeds.

    statistics: of each seed, a function as :func:`bootstrap` takes; all of the same documents. Half
    of the interval is the root of the sum of the squares of two: of the bootstrap of the mean over
    documents, and of the t-interval over seeds. With one seed it is for documents only.
    """

    def mean(weights: torch.Tensor) -> torch.Tensor:
        return torch.stack([statistic(weights) for statistic in statistics]).mean(0)

    drawn, once = bootstrap(mean, documents, draws), torch.ones(1, documents, dtype=torch.float64)
    seeds = (
        mean_interval(np.stack([statistic(once)[0].numpy() for statistic in statistics]))
        if len(statistics) > 1
        else None
    )
    other = seeds.half if seeds else 0.0
    found = Interval(
        drawn.mean,
        drawn.mean - np.hypot(drawn.mean - drawn.low, other),
        drawn.mean + np.hypot(drawn.high - drawn.mean, other),
    )
    return Interval(*map(float, found)) if np.ndim(drawn.mean) == 0 else found


def summarise(samples: pd.DataFrame, by: list[str], value: str = "value") -> pd.DataFrame:
    """Mean and 95 % interval of column `value` over the repeats in each group: columns `by`, mean,
    low, high."""
    groups = samples.groupby(by, sort=False)[value]
    rows = [(*key, *mean_interval(group)) for key, group in groups]
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high"])


def leave_one_out(statistic: Callable[..., float], *samples: np.ndarray) -> np.ndarray:
    """`statistic` of arrays that share axis 0, of length n: of all of it, then without each place
    in turn; [1 + n]."""
    without = [
        statistic(*(np.delete(s, i, axis=0) for s in samples)) for i in range(len(samples[0]))
    ]
    return np.array([statistic(*samples), *without])


def jackknife(estimates: np.ndarray) -> Interval:
    """95 % interval of the first of `estimates` [of the whole, without group 1, …, without group
    G].

    Delete-a-group jackknife with Student's t on G − 1 degrees of freedom (Efron & Tibshirani 1993,
    chapter 11).
    """
    whole, without = float(estimates[0]), estimates[1:]
    groups = len(without)
    spread = math.sqrt((groups - 1) / groups * np.square(without - without.mean()).sum())
    half = spread * float(stats.t.ppf(0.975, groups - 1))
    return Interval(whole, whole - half, whole + half)


def squared_length(samples: np.ndarray) -> float:
    """Unbiased estimate of ‖E v‖² from independent vectors v, the rows of `samples` [n, d]: the
    mean of v·v' over pairs. May be negative where ‖E v‖² is near 0.

    The square of the mean vector's length would count its noise as signal.
    """
    n = len(samples)
    return float((np.square(samples.sum(0)).sum() - np.square(samples).sum()) / (n * (n - 1)))
