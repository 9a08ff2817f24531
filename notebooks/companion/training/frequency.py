"""How often latents fire, and what the ones that fire often stand for.

Intervals are over seeds, because latents of one SAE are no independent sample. `extreme_share`
alone is over latents: where none of a few thousand does a thing, seeds agree on 0 and their
interval has no width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from jumprelu.intervals import Interval

from ..rails.frontier import at_l0
from ..rails.repeats import mean_interval, share_interval
from .describe import DESCRIPTORS


def frequency_bands(
    tables: Sequence[pd.DataFrame], edges: Sequence[float] = (0.01, 0.1)
) -> pd.DataFrame:
    """Latents by how often they fire: each descriptor's mean within each band, with a 95 %
    t-interval over seeds.

    tables: what :func:`describe_latents` returns, one a seed. The band's mean is taken in each seed
    by itself, and the interval is of these means: latents of one SAE are no independent sample of
    what another training run would find. Seeds with no latent in a band do not count there. edges:
    frequencies between bands, ascending; a latent that fires on exactly that share belongs below.

    Returns columns band ("over 10 %", …, "dead"), quantity ("frequency" or one of DESCRIPTORS),
    mean, low, high, seeds: how many count, latents: how many of the band have the quantity, over
    all seeds. Without any seed, mean, low and high are NaN; with a single one, low and high. Raises
    ValueError for no table, and for edges that are none.
    """
    edges = list(edges)
    if edges != sorted(set(edges)) or not edges or not 0 < edges[0] <= edges[-1] < 1:
        raise ValueError(
            f"edges must be frequencies between 0 and 1 in ascending order, got {edges}"
        )
    if isinstance(tables, pd.DataFrame) or not tables:
        raise ValueError(
            "tables must be a list with one table of describe_latents a seed, and at least one"
        )
    percent = [f"{100 * edge:g}" for edge in edges]
    names = [
        "dead",
        f"under {percent[0]} %",
        *(f"{low}–{high} %" for low, high in zip(percent, percent[1:], strict=False)),
        f"over {percent[-1]} %",
    ]
    bands = [np.searchsorted([0.0, *edges], table.frequency) for table in tables]
    rows = []
    for number in reversed(range(len(names))):
        for quantity in ("frequency", *DESCRIPTORS):
            values = [
                table.loc[band == number, quantity].dropna()
                for table, band in zip(tables, bands, strict=True)
            ]
            means = [each.mean() for each in values if len(each)]
            found = mean_interval(means) if means else (math.nan,) * 3
            rows.append((names[number], quantity, *found, len(means), sum(map(len, values))))
    return pd.DataFrame(
        rows, columns=["band", "quantity", "mean", "low", "high", "seeds", "latents"]
    )


def frequency_histogram(
    frequencies: dict[str, Sequence[torch.Tensor]], bins: int = 5
) -> pd.DataFrame:
    """Share of latents by log₁₀ of their frequency, mean over seeds with a 95 % t-interval.

    frequencies: for each architecture, one tensor a seed, [d_sae] (:attr:`Report.frequency`). bins:
    bins a decade, the same for all, each with its upper edge, the last up to frequency 1; with more
    than about 5, the rarest latents, which fired a whole number of times, show as a comb. Returns
    columns architecture, dead, log10_frequency (middle of the bin; NaN for the row of dead
    latents), mean, low, high (shares of all latents, so that a seed's add up to 1).
    """
    alive = [f[f > 0].double() for seeds in frequencies.values() for f in seeds]
    lowest = min((math.log10(f.min()) for f in alive if len(f)), default=None)
    if lowest is None:
        raise ValueError(
            f"no latent of {', '.join(frequencies) or 'any architecture'} ever fires: there is no "
            "frequency to show"
        )
    number = 1 - math.ceil(lowest * bins - 1e-6)
    middles = (np.arange(number) + 0.5 - number) / bins

    def shares(frequency: torch.Tensor) -> np.ndarray:
        logs = frequency[frequency > 0].double().log10()
        # 1e-6: 0.1 in float32 is at the edge too
        place = torch.ceil(logs * bins - 1e-6).long() + number - 1
        counts = torch.bincount(place, minlength=number)
        return np.r_[(frequency == 0).sum().item(), counts.numpy()] / len(frequency)

    tables = []
    for name, seeds in frequencies.items():
        mean, low, high = mean_interval(np.stack([shares(frequency.cpu()) for frequency in seeds]))
        columns = {"dead": [True] + [False] * number, "log10_frequency": np.r_[math.nan, middles]}
        tables.append(
            pd.DataFrame({"architecture": name, **columns, "mean": mean, "low": low, "high": high})
        )
    return pd.concat(tables, ignore_index=True)


class Excess(NamedTuple):
    """What :func:`excess_right` returns; shares of all latents."""

    observed: float
    expected: float


def excess_right(frequency: torch.Tensor, above: float = 0.1) -> Excess:
    """Share of latents that fire on more than `above` of tokens, and the share that a log-normal
    would have there.

    frequency: [d_sae]. The log-normal has the median and the interquartile range of those that fire
    at all: the bulk says how many frequent latents belong to its own tail, and what goes beyond is
    a right mode of its own. Where the bulk leans to the left, as it does when many latents are
    rare, the expected share is too high: the excess is understated. Raises ValueError if no latent
    fires.
    """
    alive = frequency[frequency > 0].double().cpu()
    if not len(alive):
        raise ValueError("no latent fires: there is nothing to compare")
    low, middle, high = (
        alive.log().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    )
    spread = (high - low) / (2 * stats.norm.ppf(0.75))
    gap = math.log(above) - middle
    tail = float(stats.norm.sf(gap / spread)) if spread > 0 else float(gap < 0)
    share = len(alive) / len(frequency)
    return Excess((frequency > above).double().mean().item(), share * tail)


def extreme_share(frequencies: Sequence[torch.Tensor], above: float = 0.5) -> Interval:
    """Share of latents that fire on more than `above` of tokens, with the exact binomial 95 %
    interval over latents.

    frequencies: one tensor a seed, [d_sae]; all seeds are pooled. Latents are taken for
    independent, which those of one SAE are not quite. Raises ValueError for no latents.
    """
    pooled = (
        torch.cat([frequency.flatten().cpu() for frequency in frequencies])
        if len(frequencies)
        else torch.zeros(0)
    )
    if not len(pooled):
        raise ValueError("no latents: give one tensor of frequencies a seed, and at least one")
    return share_interval(int((pooled > above).sum()), len(pooled))


# ---- at equal L0


def nearest_runs(table: pd.DataFrame, l0: float) -> pd.DataFrame:
    """The runs of each architecture at that of its settings whose L0 is nearest to `l0`, by ratio,
    in the table's order.

    table: one row a run, with columns architecture, seed and l0; the n-th run of each seed is of
    the n-th setting, and the settings' L0 is the geometric mean over seeds. The rows keep their
    index.
    """
    setting = table.groupby(["architecture", "seed"], sort=False).cumcount()
    distance = np.log(table.l0 / l0).groupby([table.architecture, setting]).transform("mean").abs()
    return table[distance == distance.groupby(table.architecture).transform("min")]


def _share_at(runs: pd.DataFrame, l0: float, metric: str) -> float:
    """A share of latents at `l0`: the logarithm of the share plus that of one latent is linear in
    log L0."""
    one = 1 / runs.d_sae.iloc[0]
    return at_l0(runs.assign(**{metric: runs[metric] + one}), l0, metric) - one


def values_at(
    table: pd.DataFrame, architecture: str, l0: float, metric: str = "dense_10"
) -> pd.Series:
    """A share of latents of one architecture at `l0` in each seed; index: seed, in ascending order.

    Shares rise steeply with L0 and may be 0: their logarithm is interpolated, with one latent added
    and taken off again. NaN where the seed's runs do not reach that L0. Raises ValueError if the
    architecture has no runs.
    """
    runs = table[table.architecture == architecture]
    if runs.empty:
        raise ValueError(
            f"no runs of {architecture!r}: the table has "
            f"{', '.join(map(str, table.architecture.unique()))}"
        )
    return pd.Series(
        {seed: _share_at(rows, l0, metric) for seed, rows in runs.groupby("seed")}, dtype=float
    )


def beside_reference(
    table: pd.DataFrame, reference: pd.DataFrame, metric: str = "dense_10"
) -> pd.Series:
    """Each run's share of latents minus that of the same seed's `reference` runs at the run's L0;
    indexed as `table`.

    A difference and not a ratio, because shares may be 0; interpolated as in :func:`values_at`.
    reference: rows of one architecture, of several L0. NaN for an L0 that these do not reach.
    Raises ValueError for a seed without reference runs.
    """
    frontiers = dict(list(reference.groupby("seed")))
    missing = sorted(set(table.seed) - set(frontiers))
    if missing:
        raise ValueError(
            f"no reference runs of seed {', '.join(map(str, missing))}: train the reference with "
            "these seeds too"
        )
    return pd.Series(
        [
            row[metric] - _share_at(frontiers[row.seed], row.l0, metric)
            for _, row in table.iterrows()
        ],
        index=table.index,
        dtype=float,
    )
