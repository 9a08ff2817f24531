"""Tables of the dark-matter notebooks: decompositions over seeds, sparsities, widths and tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .activations import Activations, activations_from_tensor, add_shard, open_activations, start_store
from .architectures import Trainee
from .corpus import Tokens
from .darkmatter import (
    NORMS,
    HeldOut,
    Linear,
    Split,
    TokenNorms,
    bootstrap,
    breakdown,
    decompose,
    linear_error,
    nonlinear_error,
    over_seeds,
    scalar_r2,
)
from .downstream import splice_variants
from .files import tensor_digest
from .frontier import log_interval
from .intervals import mean_interval
from .language import token_losses
from .lm import LM
from .pursuit import pursue
from .recipe import TrainConfig
from .sae import SAE

Statistic = Callable[[HeldOut, torch.Tensor], torch.Tensor]

STATISTICS: dict[str, Statistic] = {
    "fvu": HeldOut.fvu,
    "fvu_nonlinear": HeldOut.fvu_nonlinear,
    "vector_r2": HeldOut.vector_r2,
    "vector_r2_by_dimension": lambda test, weights: test.vector_r2(weights, pooled=False),
    "norm_r2": HeldOut.norm_r2,
}
"""Name → (what was held out, weights of documents) → [draws]."""

NORM_STATISTICS: dict[str, Statistic] = {name: functools.partial(HeldOut.norm_r2, of=name) for name in NORMS}
"""R² of each squared norm as predicted from x."""


# ---- controls ---------------------------------------------------------------------------------------------------


def shuffled(acts: Activations, out: str | Path, rows: int = 2**18, seed: int = 0) -> Activations:
    """A store of at most `rows` of the same activations, each dimension shuffled among them by itself, so that none knows of
    another. Holds these in memory."""
    x = acts.rows(rows, seed)
    g = torch.Generator().manual_seed(seed)
    for column in x.unbind(1):
        column.copy_(column[torch.randperm(len(x), generator=g)])
    return activations_from_tensor(x, out)


def random_sae(acts: Activations, config: TrainConfig) -> SAE:
    """An SAE as training begins: random atoms of norm 1, the encoder their transpose, b_dec the mean activation."""
    trainee = Trainee(acts.d_in, config, torch.Generator().manual_seed(config.seed))
    rows = acts.rows(2**14)
    scale = rows.square().sum(-1).mean().sqrt().item()
    with torch.no_grad():
        trainee.b_dec.copy_(rows.mean(0) / scale)
    return trainee.fold(scale)


# ---- SAEs on parts of the error ---------------------------------------------------------------------------------


@torch.no_grad()
def error_part(acts: Activations, sae: SAE, linear: Linear, part: str, out: str | Path) -> Activations:
    """A store of one part of an SAE's error on each row of `acts`, "linear" or "nonlinear", a shard at a time."""
    request = {"source": acts.fingerprint, "sae": sae.fingerprint, "map": tensor_digest(linear._asdict()), "part": part,
               "site": acts.site, "layer": acts.layer, "dtype": acts.dtype}  # fmt: skip
    index = start_store(Path(out), request, acts.model_name, acts.d_in, len(acts.index["shards"]))
    for number, shard in enumerate(acts.shards()):
        x = shard.activations
        value = linear_error(x, linear) if part == "linear" else nonlinear_error(x, sae, linear)
        add_shard(Path(out), index, number, shard._replace(activations=value))
    return open_activations(out)


def purity(sae: SAE, acts: Activations, top: int = 20) -> pd.DataFrame:
    """How much the contexts of each latent have in common: a stand-in for interpretability that needs no reader.

    Of the `top` tokens on which a latent is most active, the share that have its most frequent token; latents that fire on fewer
    are left out. Columns latent, purity, chance: the share that so many tokens drawn at random would have, on average.
    """
    ids, tokens, latents, values, first = [], [], [], [], 0
    for shard in acts.shards():
        for some, of in zip(shard.activations.split(2**13), shard.ids.split(2**13), strict=True):
            found = sae.encode(some, sparse=True)
            token, latent = found.indices()
            tokens.append(token + first), latents.append(latent), values.append(found.values()), ids.append(of)
            first += len(some)
    ids = torch.cat(ids).numpy()
    table = pd.DataFrame({"token": ids[torch.cat(tokens).numpy()], "latent": torch.cat(latents).numpy(),
                          "value": torch.cat(values).numpy()})  # fmt: skip
    best = table.sort_values("value", ascending=False, kind="stable").groupby("latent").head(top)
    counts = best.groupby("latent").token.agg(lambda some: some.value_counts().iloc[0])[best.groupby("latent").size() == top]
    drawn = np.random.default_rng(0).choice(ids, (1000, top))
    chance = np.mean([np.unique(some, return_counts=True)[1].max() for some in drawn]) / top
    return pd.DataFrame({"latent": counts.index, "purity": counts.to_numpy() / top, "chance": chance})


# ---- tables -----------------------------------------------------------------------------------------------------


def _once(test: HeldOut) -> torch.Tensor:
    return torch.ones(1, len(test.tokens), dtype=torch.float64)


def run_table(table: pd.DataFrame, tests: Sequence[HeldOut],
              statistics: dict[str, Statistic] = STATISTICS) -> pd.DataFrame:  # noqa: B006 (a constant)
    """`table` of runs, with a column for each of `statistics`."""
    columns = {name: [statistic(test, _once(test)).item() for test in tests] for name, statistic in statistics.items()}
    return table.assign(**columns)


def summary(tests: dict[str, Sequence[HeldOut]], draws: int = 1000) -> pd.DataFrame:
    """Each of :data:`STATISTICS` for named SAEs, several that differ in their seed under one name.

    Columns name, quantity, mean, low, high (:func:`jumprelu.darkmatter.over_seeds`).
    """
    rows = [(name, quantity, *over_seeds(several, statistic, draws))
            for name, several in tests.items() for quantity, statistic in STATISTICS.items()]  # fmt: skip
    return pd.DataFrame(rows, columns=["name", "quantity", "mean", "low", "high"])


def _points(table: pd.DataFrame) -> dict[tuple[object, int], list[int]]:
    """Positions of runs that differ in their seed only: (architecture, number within its seed) → those."""
    number = table.groupby(["architecture", "seed"], sort=False).cumcount()
    places: dict[tuple[object, int], list[int]] = {}
    for position, key in enumerate(zip(table.architecture, number, strict=True)):
        places.setdefault(key, []).append(position)
    return places


def by_point(table: pd.DataFrame, tests: Sequence[HeldOut], draws: int = 1000,
             statistics: dict[str, Statistic] = STATISTICS) -> pd.DataFrame:  # noqa: B006 (a constant)
    """Statistics at each point of each architecture's curve, over its seeds (:func:`jumprelu.darkmatter.over_seeds`).

    table: a row a run, as `study.sweep_variants` gives; the n-th run of each seed belong together. Columns architecture, point,
    quantity, l0 (mean over seeds), mean, low, high.
    """
    rows = []
    for (name, point), places in _points(table).items():
        l0, several = table.l0.iloc[places].mean(), [tests[place] for place in places]
        rows += [(name, point, quantity, l0, *over_seeds(several, found, draws)) for quantity, found in statistics.items()]
    return pd.DataFrame(rows, columns=["architecture", "point", "quantity", "l0", "mean", "low", "high"])


def breakdown_table(table: pd.DataFrame) -> pd.DataFrame:
    """The breakdown of FVU by width, each seed by itself, then over seeds: columns component, d_sae, mean, low, high.

    table: a row a run, with columns seed, d_sae, fvu and fvu_nonlinear (:func:`run_table`). Components: absent, linear,
    nonlinear, and law (the fitted FVU); "offset" and "exponent" have one row each, and "miss" is measured over predicted FVU at
    the greatest width, by the fit to the others (NaN with fewer than four widths).
    """
    parts: list[pd.DataFrame] = []
    for seed, runs in table.groupby("seed"):
        runs = runs.sort_values("d_sae")
        found = breakdown(runs.d_sae.tolist(), runs.fvu.tolist(), runs.fvu_nonlinear.tolist())
        values = {"absent": found.absent, "linear": found.linear, "nonlinear": found.nonlinear, "law": found.law.at(runs.d_sae)}
        parts += [pd.DataFrame({"component": name, "d_sae": runs.d_sae, "seed": seed, "value": value})
                  for name, value in values.items()]  # fmt: skip
        miss = float("nan")
        if len(runs) > 3:
            fewer, last = runs.iloc[:-1], runs.iloc[-1]
            miss = last.fvu / breakdown(fewer.d_sae.tolist(), fewer.fvu.tolist(), fewer.fvu_nonlinear.tolist()).law.at(last.d_sae)
        single = {"offset": found.law.offset, "exponent": found.law.exponent, "miss": miss}
        parts += [pd.DataFrame({"component": [name], "d_sae": [runs.d_sae.max()], "seed": seed, "value": [value]})
                  for name, value in single.items()]  # fmt: skip
    rows = [(*key, *mean_interval(values)) for key, values in pd.concat(parts).groupby(["component", "d_sae"], sort=False).value]
    return pd.DataFrame(rows, columns=["component", "d_sae", "mean", "low", "high"])


def pair_table(table: pd.DataFrame, norms: TokenNorms, draws: int = 200) -> pd.DataFrame:
    """How well a wide SAE's ‖error‖ follows from a narrower one's, token by token.

    table: a row a run, columns d_sae and seed, in the order of the columns of `norms`. Columns narrow, wide, quantity, mean, low,
    high (over seeds). Quantities: "error" (R² from the narrow SAE's ‖error‖), "nonlinear" (share of the rest that its
    ‖nonlinear error‖ explains), "x" (R² from ‖x‖ alone; narrow = wide).
    """
    places = {(int(row.d_sae), int(row.seed)): place for place, row in enumerate(table.itertuples())}
    widths, seeds = sorted(table.d_sae.unique()), sorted(table.seed.unique())
    rows = []
    for b, wide in enumerate(widths):
        for narrow in widths[: b + 1]:
            found: dict[str, list[float]] = {"error": [], "nonlinear": []} if narrow < wide else {"x": []}
            for seed in seeds:
                target = norms.error[:, places[wide, seed]]
                if narrow == wide:
                    found["x"].append(scalar_r2(target, norms.x[:, None], norms, draws=draws).mean)
                    continue
                error, nonlinear = (part[:, places[narrow, seed], None] for part in (norms.error, norms.nonlinear))
                found["error"].append(scalar_r2(target, error, norms, draws=draws).mean)
                found["nonlinear"].append(scalar_r2(target, nonlinear, norms, given=error, draws=draws).mean)
            rows += [(narrow, wide, name, *mean_interval(values)) for name, values in found.items()]
    return pd.DataFrame(rows, columns=["narrow", "wide", "quantity", "mean", "low", "high"])


def token_features(acts: Activations, sae: SAE, lm: LM, tokens: Tokens) -> pd.DataFrame:
    """What else is known of each token of a store that was harvested from `tokens`, in its order.

    Columns: loss (of the model at the token, for the next one; NaN at the end of a row), l0 (active latents), x (norm).
    """
    l0, norm = [], []
    for shard in acts.shards():
        for some in shard.activations.split(2**13):
            l0.append(torch.bincount(sae.encode(some, sparse=True).indices()[0], minlength=len(some)))
            norm.append(some.norm(dim=-1))
    losses = torch.nn.functional.pad(token_losses(lm, tokens.ids), (0, 1), value=float("nan"))
    kept = ~torch.isin(tokens.ids, torch.tensor(lm.special_ids))
    return pd.DataFrame({"loss": losses[kept].numpy(), "l0": torch.cat(l0).numpy(), "x": torch.cat(norm).numpy()})


def _means_by_id(y: torch.Tensor, norms: TokenNorms) -> torch.Tensor:
    """For each token, the mean of y over the tokens of the same id in the documents for fitting (the mean of all if none)."""
    fitting = norms.fold >= 0
    ids = norms.ids.long()
    count = torch.bincount(ids[fitting], minlength=int(ids.max()) + 1)
    total = torch.zeros(len(count), dtype=torch.float64).index_add_(0, ids[fitting], y[fitting].double())
    means = torch.where(count > 0, total / count.clamp_min(1), y[fitting].double().mean())
    return means[ids]


def baseline_table(features: pd.DataFrame, norms: TokenNorms, column: int, test: HeldOut, draws: int = 1000) -> pd.DataFrame:
    """R² of ‖error‖² of one SAE from simpler things than x: columns predictor, mean, low, high (over documents).

    features: :func:`token_features`; column: of the SAE in `norms`; test: of its decomposition, for the prediction from x.
    """
    square = norms.error[:, column].double().square()

    def of(*values: torch.Tensor):
        return scalar_r2(square, torch.stack(values, -1), norms, draws=draws)

    loss, l0, norm = (torch.from_numpy(features[name].to_numpy(float)) for name in ("loss", "l0", "x"))
    found = {"x, all dimensions": bootstrap(test.norm_r2, len(test.tokens), draws), "‖x‖ and ‖x‖²": of(norm, norm.square()),
             "mean of the token": of(_means_by_id(square, norms)), "loss of the model": of(loss), "active latents": of(l0)}
    return pd.DataFrame([(name, *interval) for name, interval in found.items()], columns=["predictor", "mean", "low", "high"])


def at_one_l0(table: pd.DataFrame, name: str, quantity: str, l0: float) -> list[float]:
    """A quantity of an architecture at one L0 in each seed, linear in log L0 between its runs; NaN where they do not reach it."""
    curves = [rows.sort_values("l0") for _, rows in table[table.architecture == name].groupby("seed")]
    return [float(np.interp(np.log(l0), np.log(rows.l0), rows[quantity], left=np.nan, right=np.nan)) for rows in curves]


# ---- what the nonlinear error is --------------------------------------------------------------------------------


def harm_table(lm: LM, tokens: Tokens, sae: SAE, linear: Linear, test: HeldOut, site: str, layer: int, start: int,
               draws: int = 1000) -> pd.DataFrame:
    """How much of the rise in cross-entropy each part of an SAE's error causes, beside its share of the squared error.

    With x̂ + linear error in the place of x, the nonlinear error is what is missing, and the other way round. The rise with one
    part missing ("alone") and the fall when it is given back ("restored"), both as shares of the rise with x̂ alone, differ,
    because cross-entropy does not add up: "harm" is their mean, and the harms of both parts add up to 1.

    Columns missing ("linear", "nonlinear"), quantity, mean, low, high (over documents): harm, alone, restored; "size", the part's
    share of Σ‖SaeError‖² on the documents of `test`; "harm over size", whose two were drawn independently; and, under missing
    "both", "rise": nats per token with x̂ alone. See `downstream.splice_variants`.
    """
    variants = {"both": sae, "nonlinear": lambda x: sae(x) + linear_error(x, linear),
                "linear": lambda x: sae(x) + nonlinear_error(x, sae, linear)}  # fmt: skip
    spliced = splice_variants(lm, tokens, variants, site, layer, start)
    many, tested = len(spliced.tokens), len(test.tokens)
    rows = [("both", "rise", *bootstrap(lambda w: spliced.rise(w, "both"), many, draws))]

    def size(weights: torch.Tensor, part: str) -> torch.Tensor:
        nonlinear = test.fvu_nonlinear(weights) / test.fvu(weights)
        return nonlinear if part == "nonlinear" else 1 - nonlinear

    for part, other in (("linear", "nonlinear"), ("nonlinear", "linear")):
        alone, restored, harm = (bootstrap(found, many, draws) for found in (
            lambda w, part=part: spliced.share(w, part, "both"),
            lambda w, other=other: 1 - spliced.share(w, other, "both"),
            lambda w, part=part, other=other: (1 + spliced.share(w, part, "both") - spliced.share(w, other, "both")) / 2,
        ))  # fmt: skip
        share = bootstrap(lambda w, part=part: size(w, part), tested, draws)
        ratio = harm.mean / share.mean
        reach = math.hypot(harm.half / share.mean, ratio * share.half / share.mean)  # to first order
        rows += [(part, "harm", *harm), (part, "alone", *alone), (part, "restored", *restored), (part, "size", *share),
                 (part, "harm over size", ratio, ratio - reach, ratio + reach)]  # fmt: skip
    return pd.DataFrame(rows, columns=["missing", "quantity", "mean", "low", "high"])


def pursuit_table(saes: Sequence[SAE], acts: Activations, parts: Split) -> pd.DataFrame:
    """FVU and FVU_nl with pursuit over those with the encoder, at equal L0 token by token: over SAEs of one width.

    Columns d_sae, quantity ("fvu", "fvu_nonlinear"), mean, low, high.
    """
    ratios: dict[tuple[int, str], list[float]] = {}
    for sae in saes:
        ways = {"encoder": sae, "pursuit": lambda x, sae=sae: sae.decode(pursue(sae, x))}
        found = decompose(acts, ways, parts)[0]
        once = _once(found["encoder"].test)
        for name in ("fvu", "fvu_nonlinear"):
            after, before = (STATISTICS[name](found[way].test, once).item() for way in ("pursuit", "encoder"))
            ratios.setdefault((sae.d_sae, name), []).append(after / before)
    rows = [(*key, *log_interval(values)) for key, values in ratios.items()]
    return pd.DataFrame(rows, columns=["d_sae", "quantity", "mean", "low", "high"])
