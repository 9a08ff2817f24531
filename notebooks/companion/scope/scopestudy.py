"""Tables of notebook 08: a release of SAEs, read through its loader and scored; a small release to
train; a large one on paper.

Notable here:
- a release is a hub id or a folder in Gemma Scope's layout. :func:`build` trains one and writes it
  so, and everything after it reads files: the code that scores a small scope scores Gemma Scope.
- SAEs that differ in their seed alone are releases of their own, because a path has no place for a
  seed. A site has then several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.activations import Activations
from jumprelu.corpus import Tokens
from jumprelu.dark.darkmatter import HeldOut, decompose, split
from jumprelu.exchange.gemma_scope import available, load_sae, path_for, save_gemma_scope
from jumprelu.files import read_json, write_json
from jumprelu.harvest import harvest
from jumprelu.intervals import Interval, bootstrap, over_seeds
from jumprelu.lm import LM
from jumprelu.metrics import Report, evaluate_many
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE
from jumprelu.sites import SITES, Key
from jumprelu.train import train_many

from ..dark.darkstudy import STATISTICS, at, settings
from ..rails.cache import remember
from ..rails.frontier import at_l0, log_interval, seed_ratios
from ..rails.study import METRICS
from ..rails.sweep import LOG_ROWS, sweep

TOGETHER, HELD = 8, 2**34
"""SAEs that are scored at once: at most so many, and at most so many bytes."""
HARVESTED = 2**25
"""Activations, as single numbers, that a harvest of many places holds before they are written; but
16 rows at least."""

# ---- a release to train


def harvest_all(
    lm: LM, tokens: Tokens, sites: Sequence[str], layers: Sequence[int], storage: str
) -> dict[Key, Activations]:
    """A store for each site and layer, of one pass; remembered. One shard of each is in memory:
    shards are small if many."""
    rows = max(16, HARVESTED // (len(sites) * len(layers) * tokens.ids.shape[1] * lm.d_model))
    return remember(
        harvest, lm, tokens, site=list(sites), layer=list(layers), dtype=storage, shard_rows=rows
    )


def build(
    lm: LM,
    train_tokens: Tokens,
    test_tokens: Tokens,
    configs: Sequence[TrainConfig],
    ends: Sequence[int],
    layer: int,
    widths: Sequence[int],
    seeds: int,
    layers: Sequence[int] = (),
    storage: str = "float32",
    workers: int = 0,
    transcoders: bool = True,
    *,
    out: str | Path,
) -> dict[str, list[str]]:
    """Train a small scope and write it in Gemma Scope's layout below `out`: site → its folders, one
    a seed.

    configs: one for each sparsity. At `layer`: all of them at the first of `widths`, those whose
    places are in `ends` at the others, each with `seeds` seeds; wider ones at other sites than the
    residual stream with one. At other `layers` (by default all): those of `ends` at the first
    width, with one seed. transcoders: also transcoders of the MLP at `layer`, with all of `configs`
    and `seeds`, under "transcoder". The L0 in a path is measured on `test_tokens`. A finished scope
    is returned at once; of an unfinished one, the runs are kept.

    Raises ValueError if two sparsities come out at one L0: the layout has one path for both.
    """
    out, index = Path(out), Path(out) / "releases.json"
    if not index.exists():
        stores = harvest_all(
            lm, train_tokens, SITES, sorted({layer, *(layers or range(lm.n_layers))}), storage
        )
        jobs = []
        for (site, n), acts in stores.items():
            for width in widths if n == layer else widths[:1]:
                first = n == layer and width == widths[0]
                for seed in range(seeds if first or (n == layer and site == "resid_post") else 1):
                    changed = {"d_sae": width, "seed": seed}
                    jobs += [
                        (f"{site}/seed_{seed}", acts, dataclasses.replace(configs[i], **changed))
                        for i in (range(len(configs)) if first else ends)
                    ]
        scored = sweep(
            [(acts, config) for _, acts, config in jobs], lm, test_tokens, workers or None
        )
        paths = [
            f"{name}/{path_for(one.layer, one.config.d_sae, one.report.l0.value)}"
            for (name, _, _), one in zip(jobs, scored, strict=True)
        ]
        _check_apart(paths)
        for path, one in zip(
            tqdm(paths, desc="writing the scope", unit="SAE", leave=False), scored, strict=True
        ):
            save_gemma_scope(one.sae(), out / path)
        names = list(dict.fromkeys(name for name, _, _ in jobs))
        if transcoders:
            changed = [
                [dataclasses.replace(config, d_sae=widths[0], seed=seed) for config in configs]
                for seed in range(seeds)
            ]
            names += _write_transcoders(lm, train_tokens, test_tokens, changed, layer, storage, out)
        write_json(index, names)  # last: without it the scope is unfinished
    names = read_json(index)
    return {
        site: [str(out / name) for name in names if name.startswith(f"{site}/")]
        for site in (*SITES, "transcoder")
    }


build.version = 1  # of its key, see rails/cache.py


def _check_apart(paths: Sequence[str]) -> None:
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"two SAEs would be {twice[0]}: choose sparsities further apart")


def _write_transcoders(
    lm: LM,
    train_tokens: Tokens,
    test_tokens: Tokens,
    configs: Sequence[Sequence[TrainConfig]],
    layer: int,
    storage: str,
    out: Path,
) -> list[str]:
    """Transcoders with the configurations of each seed, at the place of Gemma Scope's; returns
    their folders."""
    read, predicted = harvest_all(
        lm, train_tokens, ("mlp_in_before_gain", "mlp_out"), [layer], storage
    ).values()
    for seed, some in enumerate(configs):
        found = [
            result.sae
            for result in remember(train_many, read, some, targets=predicted, log_rows=LOG_ROWS)
        ]
        paths = [
            f"transcoder/seed_{seed}/{path_for(layer, sae.d_sae, report.l0.value)}"
            for sae, report in zip(found, evaluate_many(found, lm, test_tokens), strict=True)
        ]
        _check_apart(paths)
        for path, sae in zip(paths, found, strict=True):
            save_gemma_scope(sae, out / path)
    return [f"transcoder/seed_{seed}" for seed in range(len(configs))]


# ---- a release to read


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
                            f"{source} has no SAE in {folder}: choose layer and widths of those that "
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
    some = max(1, min(TOGETHER, HELD // (8 * lm.d_model * int(chosen.width.max())))) if rows else 1
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
    quantities = {name: STATISTICS[name] for name in ("vector_r2", "norm_r2", "fvu_nonlinear")}
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
            found = over_seeds(at(named, several, width, statistic, l0), documents, draws)
            rows.append(("width", ladder.site.iloc[0], width, name, *found))
    return pd.DataFrame(rows, columns=["panel", "site", "x", "quantity", "mean", "low", "high"])


# ---- a large one, on paper


def plan(
    gpus: Sequence[int] = (1, 8, 64),
    d_in: int = 3584,
    d_sae: int = 131072,
    batch: int = 4096,
    tokens: float = 8e9,
    l0: float = 60,
    window: float = 60,
    matmul_rate: float = 790e12,
    memory_rate: float = 4.3e12,
    node: int = 8,
    link_rate: float = 450e9,
    network_rate: float = 50e9,
    lm_parameters: float = 9.2e9,
    lm_share: float = 0.5,
    lm_efficiency: float = 0.5,
    reported_ms: float = 45,
    reported_chips: int = 8,
) -> pd.DataFrame:
    """What a JumpReLU SAE of this size costs, on paper. Columns quantity, gpus, value, unit, kind,
    from.

    Assumed of each GPU: `matmul_rate`, bf16 FLOP/s that a large matmul reaches; `memory_rate`,
    bytes/s of its memory; `link_rate` and `network_rate`, bytes/s to others of its node of `node`
    GPUs and beyond. P = 2·d_in·d_sae + 2·d_sae + d_in parameters, float32 with a bf16 copy; N GPUs
    hold a share of the latents each and see every token. S = l0 + window entries a token are active
    or within the bandwidth of θ. Per step:

        encode       2·d_in·d_sae·batch / (N·matmul_rate)          every pre-activation, in bf16
        weights      26·P / (N·memory_rate)                        bytes: write the gradient (4); Adam with β₁ = 0 reads gradient,
                                                                   weight and second moment and
                                                                   writes the two (20); bf16 copy
                                                                   (2)
        entries      4·S·d_in·batch / (N·memory_rate)              rows of W_dec in bf16, read for x̂ and for gradients of f
        exchange     8·(N − 1)/N·d_in·batch / rate                 all-reduce of x̂ in float32

    parts are added, none hidden behind another. Memory: 14·P + 2·batch·d_sae bytes over N. Disk:
    bf16 activations. Harvest: 2·lm_parameters·lm_share FLOPs a token, at lm_efficiency of
    matmul_rate.
    """
    P, S = 2 * d_in * d_sae + 2 * d_sae + d_in, l0 + window
    given = {
        "matmul, bf16": (matmul_rate / 1e12, "TFLOP/s"),
        "memory": (memory_rate / 1e12, "TB/s"),
        "link within a node": (link_rate / 1e9, "GB/s"),
        "network a GPU": (network_rate / 1e9, "GB/s"),
        "L0": (l0, "a token"),
        "entries in the window": (window, "a token"),
        "share of the LM that runs": (lm_share, ""),
        "share of the matmul rate that it reaches": (lm_efficiency, ""),
    }
    rows = [(name, np.nan, value, unit, "assumed", "") for name, (value, unit) in given.items()]
    rows.append(("parameters", np.nan, P / 1e9, "10⁹", "derived", "2·d·F + 2·F + d"))
    rows.append(("activations on disk", np.nan, 2 * d_in * tokens / 1e12, "TB", "derived", "bf16"))
    for n in gpus:
        rate = link_rate if n <= node else network_rate
        parts = {
            "encode": 2 * d_in * d_sae * batch / (n * matmul_rate),
            "weights": 26 * P / (n * memory_rate),
            "entries": 4 * S * d_in * batch / (n * memory_rate),
            "exchange": 8 * (n - 1) / n * d_in * batch / rate,
        }
        step = sum(parts.values())
        each = {f"step: {name}": (1e3 * seconds, "ms") for name, seconds in parts.items()}
        each |= {
            "step": (1e3 * step, "ms"),
            "rate": (batch / step / 1e3, "10³ tokens/s"),
            "time for all tokens": (tokens / batch * step / 3600, "h"),
            "reading": (2 * d_in * batch / step / 1e9, "GB/s"),
            "memory of a GPU": ((14 * P + 2 * batch * d_sae) / n / 1e9, "GB"),
            "harvest of all tokens": (
                2 * lm_parameters * lm_share * tokens / (n * lm_efficiency * matmul_rate) / 3600,
                "h",
            ),
        }
        rows += [(name, n, value, unit, "derived", "") for name, (value, unit) in each.items()]
    hours = tokens / batch * reported_ms / 3.6e6
    rows += [
        ("step", reported_chips, reported_ms, "ms", "reported", "Gemma Scope, TPU v5p"),
        (
            "rate",
            reported_chips,
            batch / reported_ms,
            "10³ tokens/s",
            "derived",
            "from the reported step",
        ),
        ("time for all tokens", reported_chips, hours, "h", "derived", "from the reported step"),
    ]
    return pd.DataFrame(rows, columns=["quantity", "gpus", "value", "unit", "kind", "from"])
