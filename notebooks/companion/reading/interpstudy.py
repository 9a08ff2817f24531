"""Tables of notebook 09: SAEs of a sweep by setting, baselines, and statistics over latents of
several seeds."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from jumprelu.activations import Activations
from jumprelu.corpus import Tokens
from jumprelu.harvest import harvest
from jumprelu.intervals import Interval
from jumprelu.latents.interp import EDGES
from jumprelu.lm import LM
from jumprelu.sae import SAE
from jumprelu.train import train

from ..rails.attribution import Uniformity, token_uniformity
from ..rails.by_seed import settings
from ..rails.cache import remember
from ..rails.repeats import over_seeds
from ..rails.study import Sweep
from .baselines import activations, neurons, random_directions, random_weights
from .summaries import summary

BASELINES = ("random directions", "neurons", "random weights")


def names_of(runs: Sweep) -> list[str]:
    """A name for each run of a sweep, "architecture, point, seed", the point numbering its settings
    from 0."""
    names = [""] * len(runs.table)
    for (architecture, point), places in settings(runs.table).items():
        for place in places:
            names[place] = f"{architecture}, {point}, {runs.table.seed.iloc[place]}"
    return names


def named(runs: Sweep) -> dict[str, SAE]:
    """The SAEs of a sweep by :func:`names_of`."""
    return {name: run.sae() for name, run in zip(names_of(runs), runs.runs, strict=True)}


def baselines(
    runs: Sweep, main: str, lm: LM, tokens: Tokens, site: str, layer: int, storage: str = "float32"
) -> tuple[dict[str, SAE], dict[str, LM]]:
    """What latents are compared with: (SAEs by the names in :data:`BASELINES`, models of those that
    have another than `lm`).

    Directions and neurons fire as often as the latents of the run named `main`, on the first rows
    of `tokens`. The SAE on random weights is trained as that run was, on the same tokens, seen
    through a model of the same architecture that was not trained.
    """
    place = names_of(runs).index(main)
    sae, x = runs.runs[place].sae(), activations(lm, tokens[:64], site, layer)
    untrained = random_weights(lm)
    store: Activations = remember(harvest, untrained, tokens, site=site, layer=layer, dtype=storage)
    other = remember(train, store, runs.runs[place].config).sae.cpu()
    found = dict(zip(BASELINES, (random_directions(sae, x), neurons(sae, x), other), strict=True))
    return found, {"random weights": untrained}


def with_settings(table: pd.DataFrame, runs: Sweep) -> pd.DataFrame:
    """:func:`jumprelu.latents.interp.study`'s table with columns setting (architecture, or the
    baseline's name), point (−1 for a baseline), l0_mean (of the setting, over its seeds)."""
    split = table.sae.str.split(", ", expand=True)
    baseline = table.sae.isin(BASELINES)
    setting = split[0].where(~baseline, table.sae)
    point = pd.to_numeric(split[1], errors="coerce").where(~baseline, -1).astype(int)
    table = table.assign(setting=setting, point=point)
    mean = {key: runs.table.l0.iloc[places].mean() for key, places in settings(runs.table).items()}
    l0 = [
        mean.get(key, l0)
        for key, l0 in zip(zip(table.setting, table.point, strict=True), table.l0, strict=True)
    ]
    return table.assign(l0_mean=l0)


def pooled(table: pd.DataFrame, point: int | None = None) -> pd.DataFrame:
    """Latents of all seeds of an architecture under its name in column sae, at one point or at all;
    baselines stay."""
    kept = table if point is None else table[table.point.isin([point, -1])]
    return kept.assign(sae=kept.setting)


def over_shuffled(table: pd.DataFrame, name: str, draws: int = 1000) -> Interval:
    """Correlation with the latent's own explanation less that with another's, mean over latents of
    `name` in column sae."""
    own = table[table.sae == name]
    gain = own.assign(gain=own.correlation - own.shuffled_correlation)
    return Interval(*summary(gain, ["gain"], ("sae",), draws)[["mean", "low", "high"]].iloc[0])


def band_names(edges: Sequence[float] = EDGES) -> dict[int, str]:
    """Band → what frequencies it has, in words."""
    ends = [f"{100 * edge:g} %" for edge in edges]
    middle = {
        n + 1: f"{low} to {high}"
        for n, (low, high) in enumerate(zip(ends[:-1], ends[1:], strict=True))
    }
    return {0: f"below {ends[0]}", **middle, len(edges): f"above {ends[-1]}"}


def _uniformity(runs: Sweep, places: Sequence[int], lm: LM, tokens: Tokens) -> list[Uniformity]:
    return [remember(token_uniformity, runs.runs[place].sae(), lm, tokens) for place in places]


def uniformity_table(runs: Sweep, lm: LM, tokens: Tokens, draws: int = 1000) -> pd.DataFrame:
    """r_L0 at each setting: columns architecture, point, l0, mean, low, high (over rows of tokens,
    one a document, and seeds)."""
    rows = []
    for (name, point), places in settings(runs.table).items():
        interval = over_seeds(
            [one.mean for one in _uniformity(runs, places, lm, tokens)], len(tokens), draws
        )
        rows.append((name, point, runs.table.l0.iloc[places].mean(), *interval))
    return pd.DataFrame(rows, columns=["architecture", "point", "l0", "mean", "low", "high"])


def uniformity_fall(
    runs: Sweep, architecture: str, lm: LM, tokens: Tokens, draws: int = 1000
) -> Interval:
    """r_L0 at an architecture's densest setting less that at its sparsest, on the same
    positions."""
    of = {
        point: places
        for (name, point), places in settings(runs.table).items()
        if name == architecture
    }
    l0 = {point: runs.table.l0.iloc[places].mean() for point, places in of.items()}
    sparse, dense = (_uniformity(runs, of[pick(l0, key=l0.get)], lm, tokens) for pick in (min, max))
    gaps = [lambda w, a=a, b=b: b.mean(w) - a.mean(w) for a, b in zip(sparse, dense, strict=True)]
    return over_seeds(gaps, len(tokens), draws)


# ---- what latents do


def densest(runs: Sweep) -> dict[str, list[SAE]]:
    """The SAEs of each architecture at its densest setting, one a seed."""
    found: dict[str, list[int]] = {}
    for (architecture, _), places in settings(runs.table).items():
        before = found.get(architecture)
        if before is None or runs.table.l0.iloc[places].mean() > runs.table.l0.iloc[before].mean():
            found[architecture] = places
    return {
        architecture: [runs.runs[place].sae() for place in places]
        for architecture, places in found.items()
    }


def apart(one: Interval, other: Interval) -> Interval:
    """One minus the other, from their nearest to their farthest ends: too wide if they are
    independent."""
    return Interval(one.mean - other.mean, one.low - other.high, one.high - other.low)
