"""The lemma behind the straight-through estimator, checked by algebra and by counting.

    d/dy E[A·H(Y − y)] = −E[A | Y = y]·p_Y(y)

(Rajamanoharan et al. 2024, arXiv 2407.14435, appendix on gradients.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch

from ..rails.repeats import mean_interval


def lemma_symbolic() -> pd.DataFrame:
    """The lemma by sympy: E[A·H(Y − y)] in closed form, differentiated, against −E[A | Y =
    y]·p_Y(y).

    Three families, all coefficients symbolic: Y normal and Y exponential with A a quadratic in Y,
    and A = W² where (W, Y) is jointly normal, so that A is not a function of Y. Columns: family,
    expectation, difference, holds.
    """
    import sympy as sp  # slow to import, and nothing else here needs it

    y, t, w, rho = sp.symbols("y t w rho", real=True)
    sigma, rate, tau = sp.symbols("sigma a tau", positive=True)
    c = sp.symbols("c0:3", real=True)
    quadratic = c[0] + c[1] * t + c[2] * t**2
    standard = sp.exp(-(w**2) / 2) / sp.sqrt(2 * sp.pi)
    square_given_t = sp.integrate(
        sp.expand((rho * t + tau * w) ** 2) * standard, (w, -sp.oo, sp.oo)
    )
    families = [
        ("normal, A quadratic in Y", quadratic, standard.subs(w, t / sigma) / sigma, y),
        (
            "exponential, A quadratic in Y",
            quadratic,
            rate * sp.exp(-rate * t),
            sp.Symbol("y", positive=True),
        ),
        ("jointly normal, A = W²", square_given_t, standard.subs(w, t), y),
    ]
    rows = []
    for family, mean_given_t, density, at in families:
        expectation = sp.integrate(sp.expand(mean_given_t) * density, (t, at, sp.oo))
        difference = sp.simplify(sp.diff(expectation, at) + (mean_given_t * density).subs(t, at))
        rows.append((family, str(sp.simplify(expectation)), str(difference), difference == 0))
    return pd.DataFrame(rows, columns=["family", "expectation", "difference", "holds"])


class Family(NamedTuple):
    """A pair (A, Y) for the lemma's numerical check, and −E[A | Y = y]·p_Y(y), which is known."""

    sample: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    """(n, generator) → (A [n], Y [n])."""
    derivative: Callable[[np.ndarray], np.ndarray]


def _jointly_normal(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    y, w = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return (0.8 * y + 0.6 * w).square(), y


def _exponential(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty(n, dtype=torch.float64).exponential_(generator=generator)
    return 1 + y - y.square(), y


def _coin(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    y = 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    y += 1.2 * (torch.rand(n, generator=generator) < 0.3)
    return (torch.rand(n, generator=generator, dtype=torch.float64) < y.sigmoid()).double(), y


def _coin_derivative(y: np.ndarray) -> np.ndarray:
    density = 0.7 * scipy.stats.norm.pdf(y, 0, 0.5) + 0.3 * scipy.stats.norm.pdf(y, 1.2, 0.5)
    return -density / (1 + np.exp(-y))


FAMILIES = {
    "jointly normal, A = W²": Family(
        _jointly_normal, lambda y: -(0.64 * y**2 + 0.36) * scipy.stats.norm.pdf(y)
    ),
    "exponential, A = 1 + Y − Y²": Family(_exponential, lambda y: -(1 + y - y**2) * np.exp(-y)),
    "two normals, A a coin of P = 1/(1 + e⁻ʸ)": Family(_coin, _coin_derivative),
}


def lemma_numeric(
    levels: np.ndarray, half_step: float, n: int, seed: int = 0, chunks: int = 32
) -> pd.DataFrame:
    """Central differences of the sample mean of A·H(Y − y), both sides on the same `n` samples, at
    each y of `levels`.

    The intervals hold together over levels and families at 95 %. Columns: family, y, theory, mean,
    low, high.
    """
    generator = torch.Generator().manual_seed(seed)
    at = torch.from_numpy(np.asarray(levels))
    rows = []
    for name, family in FAMILIES.items():
        differences = []
        for _ in range(chunks):
            a, y = family.sample(n // chunks, generator)
            above, below = (
                (a[:, None] * (y[:, None] > at + shift)).mean(0)
                for shift in (half_step, -half_step)
            )
            differences.append(((above - below) / (2 * half_step)).numpy())
        found = mean_interval(np.stack(differences), comparisons=len(levels) * len(FAMILIES))
        rows += [
            (name, *values)
            for values in zip(levels, family.derivative(np.asarray(levels)), *found, strict=True)
        ]
    return pd.DataFrame(rows, columns=["family", "y", "theory", "mean", "low", "high"])
