"""Why a jump: one latent with interference, and four activation functions at their best.

Notable here: each activation function gets the parameters that minimise the same objective exactly,
with no optimiser. So what separates them is the function, not its training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch
from tqdm import tqdm

from jumprelu.estimators import jump_relu


@dataclass(frozen=True)
class Mixture:
    """Pre-activations of one latent: π = s + noise, where s is the feature's contribution, mostly
    0."""

    present: float = 0.1
    """Probability that the feature is present."""
    magnitude: float = 1.0
    """Median of s where the feature is present; s is log-normal."""
    spread: float = 0.3
    """Standard deviation of log s."""
    noise: float = 0.25
    """Standard deviation of the interference by other features, normal with mean 0."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(π, s), float64, each [n]."""
        present = torch.rand(n, generator=generator, dtype=torch.float64) < self.present
        magnitude = self.magnitude * torch.exp(
            self.spread * torch.randn(n, generator=generator, dtype=torch.float64)
        )
        s = magnitude * present
        return s + self.noise * torch.randn(n, generator=generator, dtype=torch.float64), s

    def densities(self, grid: np.ndarray) -> pd.DataFrame:
        """Density of π on `grid`, split: columns pre_activation, absent, present, which add up to
        the density."""
        absent = (1 - self.present) * scipy.stats.norm.pdf(grid, scale=self.noise)
        nodes = (
            np.exp(self.spread * scipy.stats.norm.ppf((np.arange(400) + 0.5) / 400))
            * self.magnitude
        )
        present = self.present * scipy.stats.norm.pdf(grid[:, None], nodes, self.noise).mean(1)
        return pd.DataFrame({"pre_activation": grid, "absent": absent, "present": present})


ACTIVATIONS = ("ReLU", "biased ReLU", "biased ReLU with gain", "JumpReLU")


class Activation(NamedTuple):
    """f(π) = gain·(π − bias)·H(π − threshold); a ReLU has threshold = bias, JumpReLU has bias =
    0."""

    bias: float
    threshold: float
    gain: float

    def __call__(self, pre_activation: torch.Tensor) -> torch.Tensor:
        return self.gain * jump_relu(
            pre_activation - self.bias, self.threshold - self.bias, bandwidth=1.0
        )


def best_activation(
    name: str, pre_activation: torch.Tensor, s: torch.Tensor, sparsity: float
) -> Activation:
    """Parameters of one of `ACTIVATIONS` that minimise the sample mean of (s − f(π))² +
    sparsity·H(f).

    The objective changes only as a sample crosses the threshold, so the minimum over every order
    statistic of π above 0 is found exactly, from sums over the samples above each. pre_activation,
    s: [n]. Raises ValueError for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    if name == "ReLU":
        return Activation(0.0, 0.0, 1.0)
    y, order = pre_activation.sort(descending=True)
    s = s[order]
    n = torch.arange(1, len(y) + 1, dtype=y.dtype)
    sum_y, sum_yy, sum_s, sum_ys = (v.cumsum(0) for v in (y, y * y, s, y * s))
    # At each threshold the samples up to that place in the order are on.
    threshold = torch.cat([(y[:-1] + y[1:]) / 2, y[-1:]])
    bias = torch.zeros_like(y) if name == "JumpReLU" else threshold
    # Σ f² and Σ f·s over the samples that are on, at gain 1
    ff = sum_yy - 2 * bias * sum_y + bias**2 * n
    fs = sum_ys - bias * sum_s
    gain = fs / ff if name == "biased ReLU with gain" else torch.ones_like(y)
    objective = (gain**2 * ff - 2 * gain * fs + sparsity * n).masked_fill(threshold <= 0, math.inf)
    best = objective.argmin()
    return Activation(bias[best].item(), threshold[best].item(), gain[best].item())


def activation_errors(
    activation: Activation, pre_activation: torch.Tensor, s: torch.Tensor, sparsity: float
) -> dict[str, float]:
    """What an activation function gets wrong on a sample: dimensionless shares, and the objective
    it was fitted to."""
    f = activation(pre_activation)
    on, present = f > 0, s > 0
    hits = on & present
    return {
        "false positives": (on & ~present).sum().item()
        / (~present).sum().item(),  # share of absent that are on
        "misses": (~on & present).sum().item()
        / present.sum().item(),  # share of present that are off
        "shrinkage": 1
        - f[hits].sum().item() / s[hits].sum().item(),  # where on and present; below 0: too large
        "magnitude error": ((f - s)[hits].square().sum() / s[hits].square().sum()).sqrt().item(),
        "objective": ((s - f).square() + sparsity * on).mean().item(),
    }


def compare_activations(
    mixture: Mixture, sparsities: Iterable[float], n: int, repeats: int, seed: int = 0
) -> pd.DataFrame:
    """Fit each of `ACTIVATIONS` on `n` samples, judge it on `n` fresh ones; `repeats` independent
    times.

    Returns one row per repeat, activation, sparsity and metric: columns repeat, activation,
    sparsity, metric, value.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for repeat in tqdm(range(repeats), desc="toy mixture"):
        fitted, fresh = mixture.sample(n, generator), mixture.sample(n, generator)
        for sparsity in sparsities:
            for name in ACTIVATIONS:
                errors = activation_errors(
                    best_activation(name, *fitted, sparsity), *fresh, sparsity
                )
                rows += [
                    (repeat, name, sparsity, metric, value) for metric, value in errors.items()
                ]
    return pd.DataFrame(rows, columns=["repeat", "activation", "sparsity", "metric", "value"])
