"""Power laws of an error in the number of latents or of training tokens, held to account at a point
they did not see.

Notable here:
- an error is fitted in logarithms, because what matters of it is its relative size: y = scale ·
  x^(−exponent) is then a straight line, and its least squares are exact. With an offset, the floor
  that no x gets below, the problem is not convex: it is solved from several starts, and the law
  without offset is among the candidates.
- two parameters go through almost any falling curve, so a good fit says little. :func:`fits` also
  fits without the largest x and gives measured over predicted there: above 1, the error falls more
  slowly than the power law promised.
- intervals are over seeds, each fitted by itself: the points of one curve share their seed and are
  not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from .repeats import mean_interval

STEEPEST = 20.0
"""Largest |exponent| beside an offset. Where y is at its floor from the second x on, any steep law
fits, up to infinity."""


class PowerLaw(NamedTuple):
    """y = scale · x^(−exponent) + offset; scale and offset in the units of y, the scale at x =
    1."""

    scale: float
    exponent: float
    offset: float = 0.0

    def at(self, x: ArrayLike) -> float | np.ndarray:
        """y at `x` > 0: a float, or an array of the shape of `x`."""
        found = self.scale * np.asarray(x, dtype=float) ** -self.exponent + self.offset
        return float(found) if found.ndim == 0 else found


def _line(log_x: np.ndarray, log_y: np.ndarray) -> tuple[float, float]:
    """log y at log x = 0 and the slope of the straight line of least squares."""
    middle = log_x.mean()
    slope = (log_x - middle) @ log_y / np.square(log_x - middle).sum()
    return log_y.mean() - slope * middle, slope


def _with_offset(log_x: np.ndarray, y: np.ndarray, starts: int) -> PowerLaw:
    """The best law with 0 ≤ offset < min y, in log residuals. log_x: centred, so that level and
    exponent hardly trade."""
    lowest = y.min()

    def law(parameters: np.ndarray) -> np.ndarray:
        level, exponent, share = (
            parameters  # the offset as a share of the lowest y: all three are then of order 1
        )
        return np.exp(level - exponent * log_x) + share * lowest

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return np.log(law(parameters) / y)

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        level, exponent, _ = parameters
        falling = np.exp(level - exponent * log_x)
        return (
            np.stack([falling, -falling * log_x, np.full_like(y, lowest)], axis=1)
            / law(parameters)[:, None]
        )

    level, slope = _line(log_x, np.log(y))
    candidates = [
        (np.square(level + slope * log_x - np.log(y)).sum() / 2, (level, -slope, 0.0))
    ]  # without offset, exactly
    bounds = ([-np.inf, -STEEPEST, 0.0], [np.inf, STEEPEST, np.nextafter(1.0, 0.0)])
    for share in 1 - np.logspace(
        0, -3, starts
    ):  # 0 to 0.999: y − offset changes fastest just under the lowest y
        level, slope = _line(log_x, np.log(y - share * lowest))
        start = np.array([level, np.clip(-slope, -STEEPEST, STEEPEST), share])
        found = least_squares(
            residuals, start, jacobian, bounds, x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12
        )
        candidates.append((found.cost, tuple(found.x)))
    level, exponent, share = min(candidates)[1]
    return PowerLaw(float(np.exp(level)), float(exponent), float(share * lowest))


def fit_power_law(x: ArrayLike, y: ArrayLike, offset: bool = False, starts: int = 8) -> PowerLaw:
    """y = scale · x^(−exponent), with `offset` + offset, by least squares of log y; x, y: positive,
    shape [n].

    The offset is at least 0 and below the smallest y; it is sought from `starts` places. With it
    |exponent| ≤ STEEPEST, unless the best law has no offset. An exponent below 0 is a y that grows.

    Raises ValueError for x and y of other shapes, for values that are not positive and finite, for
    fewer distinct x than the law has parameters, and for no start.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"x and y must be of one shape [n], got {list(x.shape)} and {list(y.shape)}"
        )
    for name, values in (("x", x), ("y", y)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(
                f"{name} must be positive and finite, because it is fitted in logarithms: got "
                f"{values.tolist()}"
            )
    needed = 3 if offset else 2
    if len(np.unique(x)) < needed:
        raise ValueError(
            f"a power law {'with' if offset else 'without'} offset has {needed} parameters and "
            f"needs as many distinct x, got {np.unique(x).tolist()}"
        )
    if starts < 1:
        raise ValueError(f"starts must be at least 1, got {starts}")
    log_x = np.log(x)
    if not offset:
        level, slope = _line(log_x, np.log(y))
        return PowerLaw(float(np.exp(level)), float(-slope))
    middle = log_x.mean()
    found = _with_offset(log_x - middle, y, starts)
    return found._replace(scale=float(found.scale * np.exp(found.exponent * middle)))


def fits(
    table: pd.DataFrame, x: str, y: str, by: Sequence[str] = ("architecture",), level: float = 0.95
) -> pd.DataFrame:
    """A power law of column `y` in column `x` for each group: its exponent, and how it predicts the
    largest x unseen.

    table: columns `by`, seed, `x`, `y`; one row for each seed and x of a group. Each seed is fitted
    by itself, without offset. Columns of the result: `by`; exponent, exponent_low, exponent_high
    (over all x; t-interval over seeds at `level`); ratio, ratio_low, ratio_high (measured over
    predicted at the largest x by the fit to the others; in logarithms, turned back). With one seed
    the ends are NaN; with two x, nothing is left to predict the larger one from, and the ratio is
    NaN.

    Raises ValueError where a seed has not exactly one row at each x of its group, or where it
    cannot be fitted.
    """
    rows = []
    for group, runs in table.groupby(list(by), sort=False):
        name = ", ".join(map(str, group))
        counts = runs.groupby(["seed", x]).size().unstack(fill_value=0)
        if not (counts == 1).all(axis=None):
            raise ValueError(
                f"{name}: every seed needs one row at each {x}, got these numbers of "
                f"rows:\n{counts.to_string()}\nname in `by` whatever else tells the rows apart, "
                "and leave out what some seeds lack"
            )
        exponents, misses = [], []
        for seed, curve in runs.groupby("seed"):
            curve = curve.sort_values(x)
            try:
                exponents.append(fit_power_law(curve[x], curve[y]).exponent)
            except ValueError as error:
                raise ValueError(f"{name}, seed {seed}: {error}") from error
            known, last = curve.iloc[:-1], curve.iloc[-1]
            misses.append(
                np.log(last[y] / fit_power_law(known[x], known[y]).at(last[x]))
                if len(known) > 1
                else np.nan
            )
        rows.append(
            (*group, *mean_interval(exponents, level), *np.exp(mean_interval(misses, level)))
        )
    exponent, ratio = (
        [column + end for end in ("", "_low", "_high")] for column in ("exponent", "ratio")
    )
    return pd.DataFrame(rows, columns=[*by, *exponent, *ratio])
