"""Standard errors and confidence intervals: over documents, over groups of documents, over seeds
and repeats.

Notable here: an :class:`Interval` holds floats or arrays of one shape, and unpacks as mean, low,
high, the columns in which tables and figures have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    se: float

    def __str__(self) -> str:
        digits = 3 if not self.se > 0 else max(0, 1 - math.floor(math.log10(self.se)))
        return f"{self.value:.{digits}f} ± {self.se:.{digits}f}"


def ratio_estimate(numerator: torch.Tensor, denominator: torch.Tensor) -> Estimate:
    """Σa/Σb over clusters, with the linearised (sandwich) standard error √(D/(D−1)·Σ(a_d −
    r·b_d)²)/Σb.

    numerator, denominator: sums of each cluster, shape [D]. With one cluster the error is not
    known: NaN.
    """
    numerator, denominator = numerator.double(), denominator.double()
    total, clusters = denominator.sum(), len(denominator)
    value = numerator.sum() / total
    if clusters < 2:
        return Estimate(value.item(), float("nan"))
    residual = (numerator - value * denominator).square().sum() * clusters / (clusters - 1)
    return Estimate(value.item(), (residual.sqrt() / total).item())


def share_estimate(
    fired: torch.Tensor, tokens: torch.Tensor, at_least: float, at_most: float = 1.0
) -> Estimate:
    """Share of latents with `at_least` < frequency ≤ `at_most`, with a delete-a-group jackknife
    error.

    fired: times each latent fired in each group of documents, [groups, d_sae]; tokens: tokens of
    each group, [groups]. at_least = -1 and at_most = 0 give the share of dead latents.
    """

    def share(fired: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        frequency = fired / tokens
        return ((frequency > at_least) & (frequency <= at_most)).double().mean()

    used = tokens > 0
    fired, tokens = fired[used].double(), tokens[used].double()
    whole = share(fired.sum(0), tokens.sum())
    groups = len(tokens)
    if groups < 2:
        return Estimate(whole.item(), float("nan"))
    without = torch.stack(
        [share(fired.sum(0) - fired[g], tokens.sum() - tokens[g]) for g in range(groups)]
    )
    se = ((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt()
    return Estimate(whole.item(), se.item())


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval: floats, or arrays of one shape."""

    mean: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray

    @property
    def half(self) -> float | np.ndarray:
        """Half the width."""
        return (self.high - self.low) / 2


def _reach(degrees: int, level: float, comparisons: int = 1) -> float:
    """Standard errors from the middle of a t-interval to its ends."""
    from scipy import stats  # a second of import time

    return float(stats.t.ppf(1 - (1 - level) / 2 / comparisons, degrees))


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
    mean = values.mean(0)
    half = (
        values.std(0, ddof=1) / math.sqrt(n) * _reach(n - 1, level, comparisons)
        if n > 1
        else np.full_like(mean, math.nan)
    )
    found = Interval(mean, mean - half, mean + half)
    return Interval(*map(float, found)) if values.ndim == 1 else found


def share_interval(count: int, n: int) -> Interval:
    """Share of `count` in n with its exact binomial 95 % interval (Clopper–Pearson).

    With none of n the upper end is about 3.7/n: a share below 1/n is not claimed from n. Raises
    ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"a share of {n} has no interval: give at least 1")
    from scipy import stats  # a second of import time

    found = stats.binomtest(count, n)
    low, high = found.proportion_ci(0.95, method="exact")
    return Interval(found.statistic, float(low), float(high))


def bootstrap(
    statistic: Callable[[torch.Tensor], torch.Tensor],
    documents: int,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic with its percentile interval over documents drawn with replacement.

    statistic: weights [draws, documents], how often each was drawn → [draws, ...], such as those of
    `darkmatter.HeldOut`; [draws] gives floats, more dimensions arrays. The same seed draws the same
    documents, so that differences between SAEs may be bootstrapped as one statistic. Draws for
    which it is NaN are left out; where it is NaN for all documents, so are the ends. An end that
    would leave out the statistic itself is moved to it.
    """
    drawn = torch.multinomial(
        torch.ones(documents),
        documents * draws,
        replacement=True,
        generator=torch.Generator().manual_seed(seed),
    ).view(draws, documents)
    weights = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    whole = statistic(torch.ones(1, documents, dtype=torch.float64))[0]
    ends = torch.nanquantile(
        statistic(weights), torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64), 0
    )
    ends = torch.where(
        whole.isnan(),
        math.nan,
        torch.stack([torch.minimum(ends[0], whole), torch.maximum(ends[1], whole)]),
    )
    found = Interval(*(value.numpy() for value in (whole, *ends)))
    return Interval(*map(float, found)) if whole.ndim == 0 else found


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
    import pandas as pd

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


def jackknife(estimates: np.ndarray, level: float = 0.95) -> Interval:
    """Interval of the first of `estimates` [of the whole, without group 1, …, without group G].

    Delete-a-group jackknife with Student's t on G − 1 degrees of freedom (Efron & Tibshirani 1993,
    chapter 11).
    """
    whole, without = float(estimates[0]), estimates[1:]
    groups = len(without)
    half = math.sqrt((groups - 1) / groups * np.square(without - without.mean()).sum()) * _reach(
        groups - 1, level
    )
    return Interval(whole, whole - half, whole + half)


def squared_length(samples: np.ndarray) -> float:
    """Unbiased estimate of ‖E v‖² from independent vectors v, the rows of `samples` [n, d]: the
    mean of v·v' over pairs.

    The square of the mean vector's length would count its noise as signal. May be negative where ‖E
    v‖² is near 0.
    """
    n = len(samples)
    return float((np.square(samples.sum(0)).sum() - np.square(samples).sum()) / (n * (n - 1)))
