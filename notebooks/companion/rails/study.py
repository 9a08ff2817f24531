"""Small studies that notebooks share: the same configuration over seeds, scored on held-out text,
as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from jumprelu.activations import Activations
from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.metrics import Report, evaluate
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE
from jumprelu.train import TrainResult, train_many

from .cache import remember
from .frontier import at_l0, bend, log_interval, seed_ratios, tuned
from .sweep import Scored, sweep

METRICS = ("l0", "fvu", "delta_loss", "kl", "dead", "dense_1", "dense_10", "norm_ratio")
"""What tables have of a :class:`Report`."""


def train_seeds(acts: Activations, config: TrainConfig, seeds: int) -> list[TrainResult]:
    """`config` trained with seeds 0 … seeds − 1, of the initial weights and of the order of the
    data; remembered."""
    return remember(
        train_many, acts, [dataclasses.replace(config, seed=seed) for seed in range(seeds)]
    )


def score_runs(runs: Sequence[TrainResult], lm: LM, tokens: Tokens) -> list[Report]:
    """Each run's SAE evaluated on held-out tokens; remembered."""
    return [remember(evaluate, run.sae, lm, tokens) for run in runs]


def joined_logs(runs: Sequence[TrainResult]) -> pd.DataFrame:
    """The training logs of several seeds below each other, with a column `seed`."""
    return pd.concat(
        [run.log.assign(seed=seed) for seed, run in enumerate(runs)], ignore_index=True
    )


def score_table(architecture: str, scores: Sequence[Report]) -> pd.DataFrame:
    """One row a seed: architecture, seed, and the values of each metric."""
    rows = [
        {
            "architecture": architecture,
            "seed": seed,
            **{name: getattr(score, name).value for name in METRICS},
        }
        for seed, score in enumerate(scores)
    ]
    return pd.DataFrame(rows)


def latent_table(run: TrainResult, score: Report, threshold_init: float) -> pd.DataFrame:
    """One row a latent: threshold in units of √E‖x‖², share of held-out tokens on which it fires,
    θ_init."""
    threshold = log_threshold(run.sae).exp()
    return pd.DataFrame(
        {"threshold": threshold, "frequency": score.frequency.double(), "initial": threshold_init}
    )


def log_threshold(sae: SAE) -> torch.Tensor:
    """log θ of each latent, [d_sae], float64, in units of √E‖x‖², as training has it."""
    return (sae.threshold / sae.input_scale).detach().cpu().double().log()


def l0_histogram(scores: dict[str, Report], bins: int = 60) -> pd.DataFrame:
    """Share of tokens by their number of active latents; columns architecture, l0 (middle of the
    bin), share."""
    top = max(score.l0_per_token.max().item() for score in scores.values()) + 1
    width = max(1, -(-top // bins))
    tables = []
    for name, score in scores.items():
        counts = torch.bincount(score.l0_per_token // width, minlength=-(-top // width)).double()
        middle = [i * width + (width - 1) / 2 for i in range(len(counts))]
        tables.append(
            pd.DataFrame(
                {"architecture": name, "l0": middle, "share": (counts / counts.sum()).tolist()}
            )
        )
    return pd.concat(tables, ignore_index=True)


def configurations(base: TrainConfig, changes: Mapping[str, Any]) -> list[TrainConfig]:
    """`base` with `changes`: field → value, or → a list of values, one for each of the
    configurations that are returned.

    Lists must be of one length; without any, there is one configuration. So {"architecture":
    "topk", "k": [16, 32]} gives two. `betas` and `resample` are lists themselves and the same for
    all. Raises ValueError for lists of several lengths.
    """
    whole = {name: tuple(changes[name]) for name in ("betas", "resample") if name in changes}
    lists = {
        name: value
        for name, value in changes.items()
        if isinstance(value, list) and name not in whole
    }
    lengths = {name: len(value) for name, value in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists of values must be of one length, got {lengths}")
    single = {name: value for name, value in changes.items() if name not in lists} | whole
    number = next(iter(lengths.values()), 1)
    return [
        dataclasses.replace(base, **single, **{name: value[n] for name, value in lists.items()})
        for n in range(number)
    ]


def score_frame(names: Sequence[str], scored: Sequence[Scored]) -> pd.DataFrame:
    """One row a run: architecture (its name in `names`), site, layer, seed, steps, d_sae, lr, and
    each metric's value."""
    rows = [
        {
            "architecture": name,
            "site": one.site,
            "layer": one.layer,
            "seed": one.config.seed,
            "steps": one.config.steps,
            "d_sae": one.config.d_sae,
            "lr": one.config.lr,
            **{metric: getattr(one.report, metric).value for metric in METRICS},
        }
        for name, one in zip(names, scored, strict=True)
    ]
    return pd.DataFrame(rows)


class Sweep(NamedTuple):
    """A sweep over named variants: a row of `table` for each of `runs`, in the same order."""

    table: pd.DataFrame
    runs: list[Scored]


def sweep_variants(
    stores: Activations | Sequence[Activations],
    variants: Mapping[str, Sequence[TrainConfig]],
    seeds: Sequence[int],
    lm: LM,
    tokens: Tokens,
    workers: int | None = None,
) -> Sweep:
    """Every configuration of every variant, with each seed, on each store of activations; see
    :func:`companion.rails.sweep.sweep`."""
    stores = [stores] if isinstance(stores, Activations) else stores
    named = [
        (name, store, dataclasses.replace(config, seed=seed))
        for store in stores
        for name, configs in variants.items()
        for seed in seeds
        for config in configs
    ]
    runs = sweep([(store, config) for _, store, config in named], lm, tokens, workers)
    return Sweep(score_frame([name for name, *_ in named], runs), runs)


def tune_lr(
    acts: Activations,
    variants: Mapping[str, Sequence[TrainConfig]],
    lrs: Sequence[float],
    points: Sequence[int],
    like: Mapping[str, str],
    lm: LM,
    tokens: Tokens,
    workers: int | None = None,
) -> tuple[pd.DataFrame, dict[str, list[TrainConfig]]]:
    """Variants at every learning rate, with seed 0: the runs' table, and each variant, whole, at
    its best rate.

    points: which of a variant's configurations are tried; like: variant → the one whose rate it
    takes over without being tried. The best rate is that of least FVU at equal L0
    (:func:`companion.rails.frontier.tuned`, against the middle one of `lrs`); the table has its
    columns ratio and best. Seed 0 is then one of those that the comparison uses, too: what is
    chosen on it is one number a variant.
    """
    named = {
        (name, lr): [dataclasses.replace(configs[point], lr=lr) for point in points]
        for name, configs in variants.items()
        if name not in like
        for lr in lrs
    }
    found = sweep_variants(
        acts,
        {f"{name} {lr}": configs for (name, lr), configs in named.items()},
        [0],
        lm,
        tokens,
        workers,
    )
    table = found.table.assign(
        architecture=[name for (name, _), configs in named.items() for _ in configs]
    )
    judged = tuned(table, "lr", sorted(lrs)[len(lrs) // 2])
    table = table.merge(judged, on=["architecture", "lr", "seed"], how="left")
    best = {row.architecture: row.lr for row in judged[judged.best].itertuples()}
    return table, {
        name: [dataclasses.replace(config, lr=best[like.get(name, name)]) for config in configs]
        for name, configs in variants.items()
    }


def beside_frontier(
    table: pd.DataFrame, reference: pd.DataFrame, metric: str = "fvu"
) -> pd.DataFrame:
    """`table` with a column ratio: each run's metric over that of the same seed's `reference` runs
    at the run's L0.

    reference: rows of one architecture, of several L0, between which the bend of all is used. NaN
    for an L0 that they do not reach.
    """
    frontiers, curve = (
        dict(list(reference.groupby("seed"))),
        bend(reference, metric) if reference.l0.nunique() > 2 else 0.0,
    )
    ratio = [
        row[metric] / at_l0(frontiers[row.seed], row.l0, metric, curve)
        for _, row in table.iterrows()
    ]
    return table.assign(ratio=ratio)


def ratios_by_place(
    table: pd.DataFrame, main: pd.DataFrame, one: str, others: Sequence[str]
) -> pd.DataFrame:
    """`one` over each of `others` at equal L0 in each place of `table`, and in that of `main`,
    which has several seeds.

    Columns place, other, metric, mean, low, high (95 %). A place with fewer than three seeds
    borrows the standard deviation over seeds from `main`; see
    :func:`companion.rails.frontier.log_interval`.
    """
    rows = []
    for metric in ("delta_loss", "fvu"):
        for other in others:
            known = np.log(seed_ratios(main, one, other, metric).dropna())
            for (site, layer), runs in table.groupby(["site", "layer"], sort=False):
                ratios = seed_ratios(runs, one, other, metric)
                borrowed = (
                    {"spread": known.std(), "degrees": len(known) - 1} if len(ratios) < 3 else {}
                )
                rows.append(
                    (f"{site}, layer {layer}", other, metric, *log_interval(ratios, **borrowed))
                )
    return pd.DataFrame(rows, columns=["place", "other", "metric", "mean", "low", "high"])


def scaling_table(
    acts: Activations,
    lm: LM,
    tokens: Tokens,
    variants: Mapping[str, Sequence[TrainConfig]],
    l0: float,
    widths: Sequence[int],
    lengths: Sequence[int],
    seeds: Sequence[int],
    workers: int | None = None,
) -> pd.DataFrame:
    """Errors at one L0 over width (d_sae) and, at the variants' own width, over length (steps).

    variants: name → one configuration whose L0 is `l0` by construction (TopK), or several with L0
    on both sides of it, between which each seed is interpolated
    (:func:`companion.rails.frontier.at_l0`; NaN if they do not enclose it). One row a seed and
    metric: architecture, quantity ("width", "tokens"), x (its value), seed, metric ("fvu",
    "delta_loss"), value.
    """
    named = {}
    for name, configs in variants.items():
        named |= {
            (name, "width", width): [dataclasses.replace(c, d_sae=width) for c in configs]
            for width in widths
        }
        tokens_of = configs[0].batch_size
        named |= {
            (name, "tokens", n * tokens_of): [dataclasses.replace(c, steps=n) for c in configs]
            for n in lengths
        }
    table = sweep_variants(
        acts, {str(key): configs for key, configs in named.items()}, seeds, lm, tokens, workers
    ).table
    frontiers = dict(list(table.groupby(["architecture", "seed"])))
    rows = []
    for key, configs in named.items():
        for seed in seeds:
            one = frontiers[str(key), seed]
            rows += [
                (
                    *key,
                    seed,
                    metric,
                    one[metric].iloc[0] if len(configs) == 1 else at_l0(one, l0, metric),
                )
                for metric in ("fvu", "delta_loss")
            ]
    return pd.DataFrame(rows, columns=["architecture", "quantity", "x", "seed", "metric", "value"])
