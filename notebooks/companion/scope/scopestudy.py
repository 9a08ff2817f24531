"""Tables of notebook 08: a release of SAEs, read through its loader and scored.

A release is a hub id or a folder in Gemma Scope's layout. `release.build` trains one and writes it
so, and everything here reads files: the code that scores a small scope scores Gemma Scope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.corpus import Tokens
from jumprelu.dark.darkmatter import HeldOut, decompose, split
from jumprelu.exchange.gemma_scope import available, path_for
from jumprelu.exchange.loading import load_sae
from jumprelu.intervals import Interval, bootstrap
from jumprelu.lm import LM
from jumprelu.metrics import Report, evaluate_many
from jumprelu.sae import SAE

from ..rails.by_seed import settings, statistic_at
from ..rails.cache import remember
from ..rails.frontier import at_l0, log_interval, seed_ratios
from ..rails.repeats import over_seeds
from ..rails.study import METRICS
from .release import harvest_all

SAES_AT_ONCE, BYTES_AT_ONCE = 8, 2**34
"""How many SAEs are scored at once, and how many bytes of them, at most."""


def choose(
    releases: Mapping[str, str | Sequence[str]],
    layer: int,
    widths: Sequence[int],
    layers: Sequence[int] = (),
    l0s: Sequence[float] = (),
) -> pd.DataFrame:
    """The SAEs to score: at `layer` those of all `widths`, elsewhere those of the first; one a row,
    in the order of releases.

    releases: site → hub id or folder, or several that differ in their seed. layers: by default all
    that the release has at the first width. l0s: of each layer and width, the SAEs whose L0 is
    nearest to each of these by ratio; by default all there are. Columns site, source, seed, layer,
    width, l0_label, path. Raises FileNotFoundError for a release without SAEs of the first width at
    `layer`.
    """
    rows = []
    for site, sources in releases.items():
        for seed, source in enumerate([sources] if isinstance(sources, str | Path) else sources):
            there = available(source)
            for n in sorted({layer, *(layers or there.layer.dropna())}):
                for width in widths if n == layer else widths[:1]:
                    folder = PurePosixPath(path_for(n, width, 0)).parent
                    some = there[
                        [PurePosixPath(path).parent.parent == folder for path in there.path]
                    ]
                    if n == layer and width == widths[0] and some.empty:
                        raise FileNotFoundError(
                            f"{source} has no SAE in {folder}: choose layer and widths of those "
                            "that "
                            "jumprelu.exchange.gemma_scope.available lists"
                        )
                    if len(l0s) and len(some):
                        nearest = [np.log(some.l0.astype(float) / l0).abs().idxmin() for l0 in l0s]
                        some = some.loc[list(dict.fromkeys(nearest))]
                    rows += [
                        (site, str(source), seed, int(n), width, one.l0, one.path)
                        for one in some.itertuples()
                    ]
    return pd.DataFrame(
        rows, columns=["site", "source", "seed", "layer", "width", "l0_label", "path"]
    )


def load(row: Any, dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE of a row of :func:`choose`."""
    return load_sae(row.source, path=row.path, site=row.site, layer=row.layer, dtype=dtype)


def score(chosen: pd.DataFrame, lm: LM, tokens: Tokens) -> tuple[pd.DataFrame, list[Report]]:
    """Each SAE of `chosen`, loaded and evaluated on held-out tokens; remembered, a few at a time.

    Returns `chosen` with columns d_sae, each of `study.METRICS`, and standard errors over documents
    (delta_loss_se, fvu_se); and the reports, in its order.
    """
    rows, reports = list(chosen.itertuples()), []
    some = (
        max(1, min(SAES_AT_ONCE, BYTES_AT_ONCE // (8 * lm.d_model * int(chosen.width.max()))))
        if rows
        else 1
    )
    for start in tqdm(range(0, len(rows), some), desc="scoring", unit=f"{some} SAEs"):
        reports += remember(
            evaluate_many, [load(row) for row in rows[start : start + some]], lm, tokens
        )
    columns = {"d_sae": [len(report.frequency) for report in reports]}
    columns |= {name: [getattr(report, name).value for report in reports] for name in METRICS}
    columns |= {
        f"{name}_se": [getattr(report, name).se for report in reports]
        for name in ("delta_loss", "fvu")
    }
    return chosen.assign(**columns), reports


def nearest(table: pd.DataFrame, l0: float) -> pd.DataFrame:
    """Of each site, layer, width and seed the row whose L0 is nearest to `l0` by ratio; rows keep
    their index and order."""
    distance = np.log(table.l0 / l0).abs()
    return table.loc[
        distance.groupby([table[name] for name in ("site", "layer", "width", "seed")]).idxmin()
    ].sort_index()


# ---- comparisons


def versus(
    table: pd.DataFrame, by: str, one: Any, other: Any, metric: str, documents: int
) -> Interval:
    """Metric of the SAEs with one value of column `by` over that of those with another, at equal L0
    (:mod:`companion.rails.frontier`).

    Interval (95 %) over seeds; with one seed over documents, from the standard errors in `table`,
    as if the two had been scored on different documents, which is too wide. NaN if they share no
    L0.
    """
    named = table.assign(architecture=table[by].astype(str))
    ratios = seed_ratios(named, str(one), str(other), metric)
    if len(ratios) > 1:
        return log_interval(ratios)
    relative = (table[f"{metric}_se"] / table[metric]) ** 2
    spread = np.sqrt(sum(relative[table[by] == name].mean() for name in (one, other)))
    return log_interval(ratios, float(spread), documents - 1)


def by_layer(table: pd.DataFrame, l0: float) -> pd.DataFrame:
    """Delta LM loss and FVU of seed 0 at one L0, in each site and layer of `table`, whose SAEs are
    of one width.

    Columns site, layer, metric, mean, low, high: 95 % over documents, by the mean relative standard
    error of the runs there. NaN where they do not enclose that L0.
    """
    rows = []
    for (site, layer), runs in table[table.seed == 0].groupby(["site", "layer"], sort=False):
        for metric in ("delta_loss", "fvu"):
            value, half = (
                at_l0(runs, l0, metric),
                1.96 * (runs[f"{metric}_se"] / runs[metric]).mean(),
            )
            rows.append((site, layer, metric, value, value * (1 - half), value * (1 + half)))
    return pd.DataFrame(rows, columns=["site", "layer", "metric", "mean", "low", "high"])


def largest_step(layers: pd.DataFrame) -> Interval:
    """Largest factor, above 1, between neighbouring layers in a part of :func:`by_layer`; interval
    of that pair alone.

    NaN where a layer's value is.
    """
    rows = layers.sort_values("layer")
    logs, error = (
        np.log(rows["mean"].to_numpy()),
        ((rows.high - rows["mean"]) / rows["mean"]).to_numpy(),
    )
    steps = np.abs(np.diff(logs))
    if np.isnan(steps).any() or not len(steps):
        return Interval(np.nan, np.nan, np.nan)
    n = int(steps.argmax())
    half = np.hypot(error[n], error[n + 1])
    return Interval(*(float(np.exp(steps[n] + change)) for change in (0, -half, half)))


def by_point(
    table: pd.DataFrame,
    statistics: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    documents: int,
    draws: int = 1000,
) -> pd.DataFrame:
    """A statistic at each sparsity of each site, over documents and seeds: columns site, point, l0,
    mean, low, high.

    table: a row an SAE, of one layer and width; the n-th of each seed belong together. statistics:
    of each row, a function of weights as :func:`jumprelu.intervals.bootstrap` takes.
    """
    rows = []
    for (site, point), places in settings(table.assign(architecture=table.site)).items():
        several = [statistics[place] for place in places]
        rows.append(
            (site, point, table.l0.iloc[places].mean(), *over_seeds(several, documents, draws))
        )
    return pd.DataFrame(rows, columns=["site", "point", "l0", "mean", "low", "high"])


# ---- dark matter


def decompose_release(
    chosen: pd.DataFrame, lm: LM, tokens: Tokens, test_share: float, start: int, storage: str
) -> dict[int, HeldOut]:
    """The errors of each SAE of `chosen` split into linear and nonlinear ones
    (:mod:`jumprelu.dark.darkmatter`), by its index."""
    stores = harvest_all(
        lm, tokens, list(chosen.site.unique()), sorted(chosen.layer.unique().tolist()), storage
    )
    found: dict[int, HeldOut] = {}
    for (site, layer), rows in chosen.groupby(["site", "layer"], sort=False):
        store = stores[site, layer]
        saes = {str(row.Index): load(row) for row in rows.itertuples()}
        parts, _ = remember(decompose, store, saes, split(store, test_share, start=start))
        found |= {int(name): one.test for name, one in parts.items()}
    return found


def dark_table(
    near: pd.DataFrame,
    ladder: pd.DataFrame,
    tests: Mapping[int, HeldOut],
    l0: float,
    draws: int = 1000,
) -> pd.DataFrame:
    """Columns panel, site, x, quantity, mean, low, high (95 %, over documents): how linear the
    errors are.

    near: SAEs one a site and layer (panel "layer", x the layer). ladder: SAEs of one place and
    seed, several L0 a width (panel "width", x the width; between runs at `l0`, NaN outside of
    them). tests: by index of both.
    """
    quantities = {
        "vector_r2": HeldOut.vector_r2,
        "norm_r2": HeldOut.norm_r2,
        "fvu_nonlinear": HeldOut.fvu_nonlinear,
    }
    documents, rows = len(next(iter(tests.values())).tokens), []
    for row in near.itertuples():
        rows += [
            (
                "layer",
                row.site,
                row.layer,
                name,
                *bootstrap(partial(statistic, tests[row.Index]), documents, draws),
            )
            for name, statistic in quantities.items()
        ]
    named, several = (
        ladder.assign(architecture=ladder.width),
        [tests[index] for index in ladder.index],
    )
    for width in sorted(ladder.width.unique()):
        for name, statistic in quantities.items():
            found = over_seeds(statistic_at(named, several, width, statistic, l0), documents, draws)
            rows.append(("width", ladder.site.iloc[0], width, name, *found))
    return pd.DataFrame(rows, columns=["panel", "site", "x", "quantity", "mean", "low", "high"])
