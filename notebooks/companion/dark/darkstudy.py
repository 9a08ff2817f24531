"""Tables of notebook 06: decompositions over seeds, sparsities, widths and tokens, and the controls
beside them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from jumprelu.activations import Activations, activations_from_tensor
from jumprelu.architectures import Trainee
from jumprelu.corpus import Tokens
from jumprelu.dark.darkmatter import (
    NORMS,
    HeldOut,
    Split,
    TokenNorms,
    stream,
)
from jumprelu.dark.regression import Linear
from jumprelu.intervals import Interval, bootstrap
from jumprelu.lm import LM
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE

from ..rails.by_seed import Statistic, settings
from ..rails.lm_loss import token_losses
from ..rails.repeats import over_seeds
from .errors import Predicted, breakdown, predict_scalar

STATISTICS: dict[str, Statistic] = {
    "fvu": HeldOut.fvu,
    "fvu_nonlinear": HeldOut.fvu_nonlinear,
    "vector_r2": HeldOut.vector_r2,
    "vector_r2_by_dimension": lambda test, weights: test.vector_r2(weights, pooled=False),
    "norm_r2": HeldOut.norm_r2,
}
"""Name → (what was held out, weights of documents) → [draws]."""

NORM_STATISTICS: dict[str, Statistic] = {
    name: functools.partial(HeldOut.norm_r2, of=name) for name in NORMS
}
"""R² of each squared norm as predicted from x."""


# ---- controls


def shuffled(acts: Activations, out: str | Path, rows: int = 2**18, seed: int = 0) -> Activations:
    """A store of at most `rows` of the same activations, each dimension shuffled among them by
    itself, so that none knows of another. Holds these in memory."""
    x = acts.rows(rows, seed)
    g = torch.Generator().manual_seed(seed)
    for column in x.unbind(1):
        column.copy_(column[torch.randperm(len(x), generator=g)])
    return activations_from_tensor(x, out)


shuffled.version, shuffled.threads_matter = 1, False  # of its key, see rails/cache.py


def random_sae(acts: Activations, config: TrainConfig) -> SAE:
    """An SAE as training begins: random atoms of norm 1, the encoder their transpose, b_dec the
    mean activation."""
    trainee = Trainee(acts.d_in, config, torch.Generator().manual_seed(config.seed))
    rows = acts.rows(2**14)
    scale = rows.square().sum(-1).mean().sqrt().item()
    with torch.no_grad():
        trainee.b_dec.copy_(rows.mean(0) / scale)
    return trainee.fold(scale)


# ---- tables


def _once(test: HeldOut) -> torch.Tensor:
    return torch.ones(1, len(test.tokens), dtype=torch.float64)


def _over_seeds(tests: Sequence[HeldOut], statistic: Statistic, draws: int) -> Interval:
    return over_seeds(
        [functools.partial(statistic, test) for test in tests], len(tests[0].tokens), draws
    )


def run_table(
    table: pd.DataFrame, tests: Sequence[HeldOut], statistics: dict[str, Statistic] = STATISTICS
) -> pd.DataFrame:  # noqa: B006 (a constant)
    """`table` of runs, with a column for each of `statistics`."""
    columns = {
        name: [statistic(test, _once(test)).item() for test in tests]
        for name, statistic in statistics.items()
    }
    return table.assign(**columns)


def summary(tests: dict[str, Sequence[HeldOut]], draws: int = 1000) -> pd.DataFrame:
    """Each of :data:`STATISTICS` for named SAEs, several that differ in their seed under one name.

    Columns name, quantity, mean, low, high (:func:`companion.rails.repeats.over_seeds`).
    """
    rows = [
        (name, quantity, *_over_seeds(several, statistic, draws))
        for name, several in tests.items()
        for quantity, statistic in STATISTICS.items()
    ]
    return pd.DataFrame(rows, columns=["name", "quantity", "mean", "low", "high"])


def by_point(
    table: pd.DataFrame,
    tests: Sequence[HeldOut],
    draws: int = 1000,
    statistics: dict[str, Statistic] = STATISTICS,
) -> pd.DataFrame:  # noqa: B006 (a constant)
    """Statistics at each point of each architecture's curve, over its seeds
    (:func:`companion.rails.repeats.over_seeds`).

    table: a row a run, as `study.sweep_variants` gives; the n-th run of each seed belong together.
    Columns architecture, point, quantity, l0 (mean over seeds), mean, low, high.
    """
    rows = []
    for (name, point), places in settings(table).items():
        l0, several = table.l0.iloc[places].mean(), [tests[place] for place in places]
        rows += [
            (name, point, quantity, l0, *_over_seeds(several, found, draws))
            for quantity, found in statistics.items()
        ]
    return pd.DataFrame(
        rows, columns=["architecture", "point", "quantity", "l0", "mean", "low", "high"]
    )


def breakdown_table(
    table: pd.DataFrame, tests: Sequence[HeldOut], draws: int = 100
) -> pd.DataFrame:
    """The breakdown of FVU by width over seeds and documents: columns component, d_sae, mean, low,
    high.

    table: a row a run, with columns seed and d_sae; tests: of each run. The law is fitted in each
    seed, and again for each draw of documents (:func:`over_seeds`). Components:
    absent, linear, nonlinear, and law (the fitted FVU); "offset" and "exponent" have one row each,
    and "miss" is measured over predicted FVU at the greatest width, by the fit to the others (NaN
    with fewer than four widths).
    """
    widths = sorted(table.d_sae.unique().tolist())

    def found(weights: torch.Tensor, several: Sequence[HeldOut]) -> torch.Tensor:
        """[draws, 4 · widths + 3]"""
        fvu, nonlinear = (
            torch.stack([statistic(test, weights) for test in several], -1).numpy()
            for statistic in (HeldOut.fvu, HeldOut.fvu_nonlinear)
        )
        return torch.from_numpy(
            np.array([_broken(widths, *row) for row in zip(fvu, nonlinear, strict=True)])
        )

    by_seed = []
    for _, runs in table.assign(place=range(len(table))).groupby("seed"):
        several = [tests[place] for place in runs.sort_values("d_sae").place]
        by_seed.append(functools.partial(found, several=several))
    keys = [(name, width) for name in ("absent", "linear", "nonlinear", "law") for width in widths]
    keys += [(name, widths[-1]) for name in ("offset", "exponent", "miss")]
    values = over_seeds(by_seed, len(tests[0].tokens), draws)
    rows = [(*key, *ends) for key, *ends in zip(keys, *values, strict=True)]
    return pd.DataFrame(rows, columns=["component", "d_sae", "mean", "low", "high"])


def _broken(widths: Sequence[int], fvu: np.ndarray, nonlinear: np.ndarray) -> np.ndarray:
    """absent, linear, nonlinear and law at each width, then offset, exponent and miss: [4 · widths
    + 3]."""
    parts, miss = breakdown(widths, fvu, nonlinear), math.nan
    if len(widths) > 3:
        miss = fvu[-1] / breakdown(widths[:-1], fvu[:-1], nonlinear[:-1]).law.at(widths[-1])
    single = [parts.law.offset, parts.law.exponent, miss]
    return np.concatenate(
        [parts.absent, parts.linear, parts.nonlinear, parts.law.at(widths), single]
    )


def pair_table(table: pd.DataFrame, norms: TokenNorms, draws: int = 200) -> pd.DataFrame:
    """How well a wide SAE's ‖error‖ follows from a narrower one's, token by token.

    table: a row a run, columns d_sae and seed, in the order of the columns of `norms`. Columns
    narrow, wide, quantity, mean, low, high (over seeds and documents). Quantities: "error" (R² from
    the narrow SAE's ‖error‖), "nonlinear" (share of the rest that its ‖nonlinear error‖ explains),
    "x" (R² from ‖x‖ alone; narrow = wide).
    """
    places = {
        (int(row.d_sae), int(row.seed)): place for place, row in enumerate(table.itertuples())
    }
    widths, seeds = sorted(table.d_sae.unique()), sorted(table.seed.unique())
    rows = []
    for b, wide in enumerate(widths):
        for narrow in widths[: b + 1]:
            found: dict[str, list[Predicted]] = (
                {"error": [], "nonlinear": []} if narrow < wide else {"x": []}
            )
            for seed in seeds:
                target = norms.error[:, places[wide, seed]]
                if narrow == wide:
                    found["x"].append(predict_scalar(target, norms.x[:, None], norms))
                    continue
                error, nonlinear = (
                    part[:, places[narrow, seed], None] for part in (norms.error, norms.nonlinear)
                )
                found["error"].append(predict_scalar(target, error, norms))
                found["nonlinear"].append(predict_scalar(target, nonlinear, norms, given=error))
            rows += [
                (
                    narrow,
                    wide,
                    name,
                    *over_seeds([one.r2 for one in several], len(several[0].tokens), draws),
                )
                for name, several in found.items()
            ]
    return pd.DataFrame(rows, columns=["narrow", "wide", "quantity", "mean", "low", "high"])


@torch.no_grad()
def token_features(
    acts: Activations, sae: SAE, lm: LM, tokens: Tokens, parts: Split
) -> pd.DataFrame:
    """What else is known of each token of a store that was harvested from `tokens`, in its order,
    from `parts.start` on.

    Columns: loss (of the model at the token, for the next one; NaN at the end of a row), l0 (active
    latents), x (norm).
    """
    l0, norm = [], []
    for x, *_ in stream(acts, parts):
        l0.append(torch.bincount(sae.encode(x, sparse=True).indices()[0], minlength=len(x)))
        norm.append(x.norm(dim=-1))
    losses = torch.nn.functional.pad(token_losses(lm, tokens.ids), (0, 1), value=float("nan"))
    kept = ~lm.is_special(tokens.ids)
    kept[:, : parts.start] = False
    return pd.DataFrame(
        {"loss": losses[kept].numpy(), "l0": torch.cat(l0).numpy(), "x": torch.cat(norm).numpy()}
    )


def beyond_token(
    table: pd.DataFrame, norms: TokenNorms, narrow: int, wide: int, draws: int = 1000
) -> Interval:
    """Share of what the mean for the token leaves of a wide SAE's ‖error‖ that a narrower one's
    ‖error‖ explains.

    table, norms: as for :func:`pair_table`; over seeds and documents.
    """
    places = {
        (int(row.d_sae), int(row.seed)): place for place, row in enumerate(table.itertuples())
    }
    found = []
    for seed in sorted(table.seed.unique()):
        target = norms.error[:, places[wide, seed]]
        known = _means_by_id(target, norms)[:, None]
        found.append(
            predict_scalar(target, norms.error[:, places[narrow, seed], None], norms, given=known)
        )
    return over_seeds([one.r2 for one in found], len(found[0].tokens), draws)


def size_correlation(directions: pd.DataFrame, draws: int = 1000) -> Interval:
    """Rank correlation of size with `along` among latents above the median size, with a bootstrap
    over latents.

    directions: :func:`direction_table`.
    """
    large = directions[directions.active_mean > directions.active_mean.median()]
    rng = np.random.default_rng(0)
    drawn = [large.iloc[rng.integers(len(large), size=len(large))] for _ in range(draws)]
    found = [one.active_mean.corr(one.along, method="spearman") for one in (large, *drawn)]
    return Interval(found[0], *np.quantile(found[1:], [0.025, 0.975]).tolist())


def _means_by_id(y: torch.Tensor, norms: TokenNorms) -> torch.Tensor:
    """For each token, the mean of y over the tokens of the same id in the documents for fitting
    (the mean of all if none)."""
    fitting = norms.fold >= 0
    ids = norms.ids.long()
    count = torch.bincount(ids[fitting], minlength=int(ids.max()) + 1)
    total = torch.zeros(len(count), dtype=torch.float64).index_add_(
        0, ids[fitting], y[fitting].double()
    )
    means = torch.where(count > 0, total / count.clamp_min(1), y[fitting].double().mean())
    return means[ids]


def baseline_table(
    features: pd.DataFrame, norms: TokenNorms, column: int, test: HeldOut, draws: int = 1000
) -> pd.DataFrame:
    """R² of ‖error‖² of one SAE from simpler things than x: columns predictor, mean, low, high
    (over documents).

    features: :func:`token_features`; column: of the SAE in `norms`; test: of its decomposition, for
    the prediction from x.
    """
    square = norms.error[:, column].double().square()

    def of(*values: torch.Tensor):
        found = predict_scalar(square, torch.stack(values, -1), norms)
        return bootstrap(found.r2, len(found.tokens), draws)

    loss, l0, norm = (
        torch.from_numpy(features[name].to_numpy(float)) for name in ("loss", "l0", "x")
    )
    found = {
        "x, all dimensions": bootstrap(test.norm_r2, len(test.tokens), draws),
        "‖x‖ and ‖x‖²": of(norm, norm.square()),
        "mean of the token": of(_means_by_id(square, norms)),
        "loss of the model": of(loss),
        "active latents": of(l0),
    }
    return pd.DataFrame(
        [(name, *interval) for name, interval in found.items()],
        columns=["predictor", "mean", "low", "high"],
    )


def shared_value(table: pd.DataFrame, names: Sequence[str], by: str) -> float:
    """A value of column `by` that the runs of all architectures reach in every seed: the middle, in
    logarithms, of what they share; NaN if they share nothing."""
    ends = (
        table[table.architecture.isin(names)]
        .groupby(["architecture", "seed"])[by]
        .agg(["min", "max"])
    )
    low, high = ends["min"].max(), ends["max"].min()
    return math.sqrt(low * high) if low <= high else math.nan


@torch.no_grad()
def direction_table(sae: SAE, acts: Activations, parts: Split, norm: Linear) -> pd.DataFrame:
    """Each latent beside the direction of x from which ‖SaeError‖² is predicted, on the documents
    for fitting.

    norm: `Decomposition.norm` of the SAE. Columns latent; along (change of the predicted ‖error‖²
    by one unit of the latent's atom); active_mean (mean activation where it is active, NaN if it
    never is); frequency. Source: Engels et al. 2024, who ask whether the direction is that of large
    latents.
    """
    (total, count), tokens = torch.zeros(2, sae.d_sae, dtype=torch.float64), 0
    for x, *_ in stream(acts, parts, "fit"):
        found = sae.encode(x, sparse=True)
        latent, values = found.indices()[1], found.values()
        total.index_add_(0, latent, values.double())
        count += torch.bincount(latent, minlength=sae.d_sae)
        tokens += len(x)
    along = sae.W_dec.detach().double() @ norm.weight[:, NORMS.index("error")]
    return pd.DataFrame(
        {
            "latent": range(sae.d_sae),
            "along": along.numpy(),
            "active_mean": (total / count).numpy(),
            "frequency": (count / tokens).numpy(),
        }
    )
