"""Standard errors and confidence intervals: over documents, over groups of documents, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import stats


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    se: float

    def __str__(self) -> str:
        digits = 3 if not self.se > 0 else max(0, 1 - math.floor(math.log10(self.se)))
        return f"{self.value:.{digits}f} ± {self.se:.{digits}f}"


def ratio_estimate(numerator: torch.Tensor, denominator: torch.Tensor) -> Estimate:
    """Σa/Σb over clusters, with the linearised (sandwich) standard error √(D/(D−1)·Σ(a_d − r·b_d)²)/Σb.

    numerator, denominator: sums of each cluster, shape [D]. With one cluster the error is not known: NaN.
    """
    numerator, denominator = numerator.double(), denominator.double()
    total, clusters = denominator.sum(), len(denominator)
    value = numerator.sum() / total
    if clusters < 2:
        return Estimate(value.item(), float("nan"))
    residual = (numerator - value * denominator).square().sum() * clusters / (clusters - 1)
    return Estimate(value.item(), (residual.sqrt() / total).item())


def share_estimate(fired: torch.Tensor, tokens: torch.Tensor, at_least: float, at_most: float = 1.0) -> Estimate:
    """Share of latents with `at_least` < frequency ≤ `at_most`, with a delete-a-group jackknife error.

    fired: times each latent fired in each group of documents, [groups, d_sae]; tokens: tokens of each group, [groups].
    at_least = -1 and at_most = 0 give the share of dead latents.
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
    without = torch.stack([share(fired.sum(0) - fired[g], tokens.sum() - tokens[g]) for g in range(groups)])
    se = ((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt()
    return Estimate(whole.item(), se.item())


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval: mean ± half."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t-interval; NaN for its half-width when there is one run only."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, float("nan"))
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, float(stats.t.ppf(0.5 + level / 2, n - 1)) * sd / math.sqrt(n))
