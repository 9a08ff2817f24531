"""Standard errors and 95 % confidence intervals over documents and groups of documents."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

LEVEL = 0.95


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


def bootstrap(
    statistic: Callable[[torch.Tensor], torch.Tensor], documents: int, draws: int = 1000
) -> Interval:
    """A statistic with its percentile interval over documents drawn with replacement.

    statistic: weights [draws, documents], how often each was drawn → [draws, ...], such as those of
    `darkmatter.HeldOut`; [draws] gives floats, more dimensions arrays. The same documents are drawn
    every time. Draws for which it is NaN are left out; where it is NaN for all documents, so are
    the ends. An end that would leave out the statistic itself is moved to it.
    """
    generator = torch.Generator().manual_seed(0)
    equal = torch.ones(documents)
    drawn = equal.multinomial(documents * draws, replacement=True, generator=generator)
    drawn = drawn.view(draws, documents)
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    weights = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    whole = statistic(torch.ones(1, documents, dtype=torch.float64))[0]
    levels = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    ends = torch.nanquantile(statistic(weights), levels, 0)
    ends = torch.stack([torch.minimum(ends[0], whole), torch.maximum(ends[1], whole)])
    ends = torch.where(whole.isnan(), math.nan, ends)
    found = Interval(*(value.numpy() for value in (whole, *ends)))
    return Interval(*map(float, found)) if whole.ndim == 0 else found
