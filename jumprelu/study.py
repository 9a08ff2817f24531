"""Small studies that notebooks share: the same configuration over seeds, scored on held-out text, as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pandas as pd
import torch

from .activations import Activations
from .cache import remember
from .corpus import Tokens
from .frontier import at_l0
from .lm import LM
from .metrics import Report, evaluate
from .recipe import TrainConfig
from .train import TrainResult, train_many


def train_seeds(acts: Activations, config: TrainConfig, seeds: int) -> list[TrainResult]:
    """`config` trained with seeds 0 … seeds − 1, of the initial weights and of the order of the data; remembered."""
    return remember(train_many, acts, [dataclasses.replace(config, seed=seed) for seed in range(seeds)])


def score_runs(runs: Sequence[TrainResult], lm: LM, tokens: Tokens) -> list[Report]:
    """Each run's SAE evaluated on held-out tokens; remembered."""
    return [remember(evaluate, run.sae, lm, tokens) for run in runs]


def joined_logs(runs: Sequence[TrainResult]) -> pd.DataFrame:
    """The training logs of several seeds below each other, with a column `seed`."""
    return pd.concat([run.log.assign(seed=seed) for seed, run in enumerate(runs)], ignore_index=True)


def score_table(architecture: str, scores: Sequence[Report]) -> pd.DataFrame:
    """One row a seed: architecture, seed, and the values of each metric."""
    metrics = ("l0", "fvu", "delta_loss", "kl", "dead", "dense_1", "dense_10", "norm_ratio")
    rows = [{"architecture": architecture, "seed": seed, **{name: getattr(score, name).value for name in metrics}}
            for seed, score in enumerate(scores)]  # fmt: skip
    return pd.DataFrame(rows)


def latent_table(run: TrainResult, score: Report, threshold_init: float) -> pd.DataFrame:
    """One row a latent: threshold in units of √E‖x‖², share of held-out tokens on which it fires, θ_init."""
    threshold = (run.sae.threshold / run.sae.input_scale).detach().cpu()
    return pd.DataFrame({"threshold": threshold.double(), "frequency": score.frequency.double(), "initial": threshold_init})


def l0_histogram(scores: dict[str, Report], bins: int = 60) -> pd.DataFrame:
    """Share of tokens by their number of active latents; columns architecture, l0 (middle of the bin), share."""
    top = max(score.l0_per_token.max().item() for score in scores.values()) + 1
    width = max(1, -(-top // bins))
    tables = []
    for name, score in scores.items():
        counts = torch.bincount(score.l0_per_token // width, minlength=-(-top // width)).double()
        middle = [i * width + (width - 1) / 2 for i in range(len(counts))]
        tables.append(pd.DataFrame({"architecture": name, "l0": middle, "share": (counts / counts.sum()).tolist()}))
    return pd.concat(tables, ignore_index=True)


def bandwidth_table(acts: Activations, lm: LM, tokens: Tokens, config: TrainConfig, runs: Sequence[TrainResult],
                    others: Sequence[float], sparsities: Sequence[float]) -> pd.DataFrame:
    """`config`, of which `runs` are the seeds, at `others` bandwidths too, and at its own with the prices `sparsities`.

    One row a run: bandwidth, sparsity, seed, the metrics of :func:`score_table`, threshold_travel (mean |log θ − log θ_init|),
    and fvu_ratio: FVU over that of the same seed's runs at `config.bandwidth` at the same L0 (:func:`jumprelu.frontier.at_l0`).
    """
    settings = [(bandwidth, config.sparsity) for bandwidth in others] + [(config.bandwidth, price) for price in sparsities]
    changed = [dataclasses.replace(config, bandwidth=bandwidth, sparsity=price, seed=seed)
               for bandwidth, price in settings for seed in range(len(runs))]  # fmt: skip
    more = remember(train_many, acts, changed)
    tables = []
    for number, (bandwidth, price) in enumerate([(config.bandwidth, config.sparsity), *settings]):
        these = [*runs, *more][number * len(runs) : (number + 1) * len(runs)]
        table = score_table("JumpReLU", score_runs(these, lm, tokens)).assign(bandwidth=bandwidth, sparsity=price)
        table["threshold_travel"] = [run.log.threshold_travel.iloc[-1] for run in these]
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    own = table[table.bandwidth == config.bandwidth]
    table["fvu_ratio"] = [row.fvu / at_l0(own[own.seed == row.seed], row.l0) for row in table.itertuples()]
    return table
