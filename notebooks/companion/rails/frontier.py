"""Two sparsity–fidelity frontiers compared at equal L0, with an interval over seeds.

A frontier is a table with a row for each run: columns architecture, seed, l0 and metrics such as
fvu and delta_loss.

How two are compared (:func:`compare`): in each seed by itself, the logarithm of the metric is
interpolated, linearly in log L0, on a grid over the range of L0 that both reach; the mean of the
difference of logarithms over that grid is the seed's comparison. A t-interval over seeds, turned
back from logarithms, is the result. The runs of one seed saw the same batches in the same order, so
what a seed's data has to do with it cancels in the ratio. Nothing is extrapolated: no overlap, no
comparison.

On a plain metric a chord lies above a convex curve, by more where points are further apart, and the
curve with the wider gaps would lose by that. Between logarithms frontiers are nearly straight, but
not over a wide gap: there they bend down, and the curve with the wider gaps wins. Curves of few
points are therefore interpolated by parabolas of a given `bend`, which a curve of many points tells
(:func:`bend`); straight lines have none.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from jumprelu.intervals import Interval

from .repeats import mean_interval

POINTS = 33
"""Points of the grid over the common range of log L0."""


def bend(frontier: pd.DataFrame, metric: str = "fvu") -> float:
    """Coefficient of (log L0)² in the parabola of least squares through log metric; below 0 where
    the curve bends down.

    frontier: runs of one architecture, of any seeds. Raises ValueError for fewer than three L0 (to
    1 %).
    """
    if len(np.unique(np.log(frontier.l0).round(2))) < 3:
        raise ValueError(
            f"a bend takes runs of three different L0 at least, got {sorted(frontier.l0.round(1))}"
        )
    return float(np.polyfit(np.log(frontier.l0), np.log(frontier[metric]), 2)[0])


def at_l0(
    frontier: pd.DataFrame, l0: float | np.ndarray, metric: str = "fvu", bend: float = 0.0
) -> float | np.ndarray:
    """A metric of a frontier at an L0, between its points; NaN outside of them, and next to a value
    that is not positive.

    Its logarithm is linear in log L0 but for `bend` · (log L0)². A collapsed run, in which nothing
    fires, has no place on the curve: it is left out.
    """
    ordered = frontier[frontier.l0 > 0].sort_values("l0")
    if ordered.empty:
        return np.full_like(l0, np.nan, dtype=float) if np.ndim(l0) else float("nan")
    known, wanted = np.log(ordered.l0.to_numpy(float)), np.log(l0)
    values = ordered[metric].to_numpy(float)
    values = np.log(np.where(values > 0, values, np.nan)) - bend * known**2
    found = np.exp(np.interp(wanted, known, values, left=np.nan, right=np.nan) + bend * wanted**2)
    return float(found) if np.ndim(found) == 0 else found


def matched_ratio(
    one: pd.DataFrame,
    other: pd.DataFrame,
    metric: str = "fvu",
    worst: bool = False,
    bend: float = 0.0,
) -> float:
    """Metric of a frontier over that of another at equal L0: geometric mean over their common range
    of log L0.

    worst: the largest ratio in that range instead. bend: of both curves, between their points. NaN
    if the ranges have less than two points in common, or a metric is not positive there.
    """
    low, high = max(one.l0.min(), other.l0.min()), min(one.l0.max(), other.l0.max())
    if not low < high:
        return float("nan")
    grid = np.geomspace(low, high, POINTS)[
        1:-1
    ]  # an end of the range may fall outside of it by rounding
    ratio = at_l0(one, grid, metric, bend) / at_l0(other, grid, metric, bend)
    return float(ratio.max() if worst else np.exp(np.log(ratio).mean()))


def seed_ratios(
    table: pd.DataFrame,
    one: str,
    other: str,
    metric: str = "fvu",
    worst: bool = False,
    bend: float = 0.0,
) -> pd.Series:
    """:func:`matched_ratio` of two architectures in each seed that both have; index: seed."""
    mine, theirs = (
        dict(list(table[table.architecture == name].groupby("seed"))) for name in (one, other)
    )
    if not mine or not theirs:
        raise ValueError(
            f"no runs of {one if not mine else other!r}: the table has "
            f"{', '.join(table.architecture.unique())}"
        )
    both = [seed for seed in mine if seed in theirs]
    return pd.Series(
        {seed: matched_ratio(mine[seed], theirs[seed], metric, worst, bend) for seed in both},
        dtype=float,
    )


def log_interval(
    ratios: Iterable[float], spread: float | None = None, degrees: int = 0
) -> Interval:
    """Interval of the mean of log ratios, turned back; NaN ratios are left out, and without any
    left all is NaN.

    spread, degrees: standard deviation of log ratios over seeds, and its degrees of freedom, known
    from elsewhere: for a place with too few seeds to tell its own.
    """
    logs = np.log(np.asarray(list(ratios), dtype=float))
    logs = logs[np.isfinite(logs)]
    if len(logs) == 0:
        return Interval(np.nan, np.nan, np.nan)
    if spread is None:
        return Interval(*(float(np.exp(v)) for v in mean_interval(logs)))
    half = stats.t.ppf(0.975, degrees) * spread / np.sqrt(len(logs))
    return Interval(*(float(np.exp(logs.mean() + step)) for step in (0.0, -half, half)))


def compare(
    table: pd.DataFrame,
    one: str,
    other: str,
    metric: str = "fvu",
    worst: bool = False,
    bend: float = 0.0,
) -> Interval:
    """Metric of one architecture over another's at equal L0, with its 95 % interval over seeds;
    below 1: `one` is better."""
    return log_interval(seed_ratios(table, one, other, metric, worst, bend))


def bands(table: pd.DataFrame, metric: str = "fvu", points: int = POINTS) -> pd.DataFrame:
    """Each architecture's mean frontier: columns architecture, l0, mean, low, high (95 % over
    seeds, in logarithms).

    On a grid over the range that all of its seeds reach; with one seed, low and high are NaN.
    """
    rows = []
    for name, runs in table.groupby("architecture", sort=False):
        seeds = [one for _, one in runs.groupby("seed")]
        low, high = max(one.l0.min() for one in seeds), min(one.l0.max() for one in seeds)
        grid = np.geomspace(low, high, points)[1:-1]
        curves = np.log([at_l0(one, grid, metric) for one in seeds])
        rows += [
            (name, l0, *values)
            for l0, *values in zip(grid, *map(np.exp, mean_interval(curves)), strict=True)
        ]
    return pd.DataFrame(rows, columns=["architecture", "l0", "mean", "low", "high"])


def tuned(table: pd.DataFrame, by: str, reference: float, metric: str = "fvu") -> pd.DataFrame:
    """What each value of a hyper-parameter does to a frontier: columns architecture, `by`, seed,
    ratio, best.

    table: with a further column `by`. ratio: to the frontier at `reference` at equal L0
    (:func:`matched_ratio`); best: whether the value has its architecture's least ratio, on average
    over seeds. Where values have no L0 in common with the reference, the ratio is NaN and they
    cannot be best.
    """
    rows = []
    for (name, seed), runs in table.groupby(["architecture", "seed"], sort=False):
        frontiers = dict(list(runs.groupby(by)))
        if reference not in frontiers:
            raise ValueError(
                f"{name} was not run at {by} = {reference}, only at "
                f"{', '.join(map(str, frontiers))}"
            )
        rows += [
            (name, value, seed, matched_ratio(one, frontiers[reference], metric))
            for value, one in frontiers.items()
        ]
    found = pd.DataFrame(rows, columns=["architecture", by, "seed", "ratio"])
    mean = np.log(found.ratio).groupby([found.architecture, found[by]]).transform("mean")
    found["best"] = mean == mean.groupby(found.architecture).transform("min")
    return found
