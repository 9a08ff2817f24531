"""How often latents fire, and what the ones that fire often stand for.

Notable here:
- one pass over held-out tokens, a batch at a time: kept are sums, per latent and per (token id,
  latent), in float64; activations never.
- "share of the variance of f explained by the token's id" is ε² and not η². With thousands of small
  groups η² is large for a latent that has nothing to do with the token: (groups − 1)/(tokens − 1)
  on average. ε² is 0 then, and may come out slightly negative; where the group fixes f it is 1.
- intervals are over seeds, because latents of one SAE are no independent sample. `extreme_share`
  alone is over latents: where none of a few thousand does a thing, seeds agree on 0 and their
  interval has no width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.intervals import Interval, mean_interval, share_interval
from jumprelu.lm import LM
from jumprelu.sae import SAE
from jumprelu.sites import capture

from ..rails.frontier import at_l0

DESCRIPTORS = (
    "mean_activation",
    "threshold",
    "by_token",
    "by_previous",
    "by_position",
    "norm_correlation",
    "mean_cosine",
    "top_direction",
    "norm_share",
)
"""What :func:`describe_latents` says of a latent, beside its frequency."""

MOST_SUMS = 2**28
"""Sums over groups, groups × latents, that are held at most: 2 GiB for each way to group."""


def explained_share(
    sums: torch.Tensor, counts: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """ε²: share of the variance of f that the group explains, corrected for the number of groups;
    shape [latents].

    sums: Σ f in each group, [groups, latents]; counts: tokens of each group, [groups]; squares: Σ
    f² over all tokens, [latents]. ε² = 1 − (SS_within/(n − g)) / (SS_total/(n − 1)), n tokens in g
    groups that have any: its mean over all ways to deal the tokens into groups of these sizes is
    exactly 0. NaN where f does not vary, or where n = g. Source: Kelley 1935, "An unbiased
    correlation ratio measure".
    """
    used = counts > 0
    sums, counts = sums[used].double(), counts[used].double()
    n, g = counts.sum(), len(counts)
    total = squares - sums.sum(0).square() / n
    within = squares - (sums.square() / counts[:, None]).sum(0)
    share = 1 - (within / (n - g)) / (total / (n - 1))
    return torch.where(
        (total > 1e-12 * squares) & (n > g), share, torch.nan
    )  # a total below that is rounding


def log_bins(positions: torch.Tensor, length: int, bins: int) -> torch.Tensor:
    """Bin, 0 … bins − 1, of positions 0 … length − 1 in a row: `bins` of equal width in log(1 +
    position).

    The first ones can be empty, because the first positions are far apart on this scale.
    """
    return (bins * torch.log1p(positions.double()) / math.log1p(length)).long()


class LatentSums:
    """What :func:`describe_latents` adds up, one batch of tokens after the other.

    W_dec: atoms, [d_sae, d_in]; groups: for each way to group tokens its name and number of groups;
    latents: those of interest, [latents], by default all. Raises ValueError where the sums over
    groups would not fit (`MOST_SUMS`).
    """

    def __init__(
        self, W_dec: torch.Tensor, groups: dict[str, int], latents: torch.Tensor | None = None
    ):
        d_sae, d_in = W_dec.shape
        device = W_dec.device
        latents = torch.arange(d_sae) if latents is None else latents.cpu().long()
        if latents.ndim != 1 or not len(latents) or not 0 <= latents.min() <= latents.max() < d_sae:
            raise ValueError(
                f"latents must be numbers from 0 to {d_sae - 1} in one dimension, got {latents.tolist()}"
            )
        if len(latents.unique()) < len(latents):
            raise ValueError("latents names a latent twice: give latents.unique()")
        most = max(groups.values())
        if most * len(latents) > MOST_SUMS:
            raise ValueError(
                f"{most} groups × {len(latents)} latents are more sums than the {MOST_SUMS} held at once: describe "
                f"some of them, describe_latents(..., latents=...), at most {MOST_SUMS // most}"
            )

        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        count = len(latents)
        self.latents, self.W_dec = latents.to(device), W_dec.detach().double()
        self.place = torch.full((d_sae,), -1, device=device)  # of a latent among those of interest
        self.place[self.latents] = torch.arange(count, device=device)
        self.tokens, self.energy, self.norms, self.norm_squares = 0, zeros(()), zeros(()), zeros(())
        self.x, self.xx = zeros(d_in), zeros(d_in, d_in)
        self.fired, self.sums, self.squares, self.with_norm = (zeros(count) for _ in range(4))
        self.group_sums = {name: zeros(number, count) for name, number in groups.items()}
        self.group_tokens = {name: zeros(number) for name, number in groups.items()}

    def add(self, x: torch.Tensor, acts: torch.Tensor, **groups: torch.Tensor) -> None:
        """x: [tokens, d_in]; acts: sparse and coalesced, [tokens, d_sae]; groups: by name, the
        group of each token, [tokens]."""
        x = x.double()
        norm = x.norm(dim=-1)
        self.tokens += len(x)
        self.x += x.sum(0)
        self.xx += x.T @ x
        self.norms += norm.sum()
        self.norm_squares += norm.square().sum()
        (token, latent), f = acts.indices(), acts.values().double()
        self.energy += (f.square() * self.W_dec.square().sum(-1)[latent]).sum()  # of all latents
        wanted = self.place[latent] >= 0
        token, place, f = token[wanted], self.place[latent[wanted]], f[wanted]
        self.fired.index_add_(0, place, torch.ones_like(f))
        self.sums.index_add_(0, place, f)
        self.squares.index_add_(0, place, f.square())
        self.with_norm.index_add_(0, place, f * norm[token])
        for name, group in groups.items():
            self.group_tokens[name].index_add_(0, group, torch.ones_like(norm))
            self.group_sums[name].view(-1).index_add_(
                0, group[token] * len(self.latents) + place, f
            )

    def table(self, directions: int) -> pd.DataFrame:
        """All columns of :func:`describe_latents` but `threshold`."""
        n, atoms = self.tokens, self.W_dec[self.latents]
        mean, square = self.x / n, atoms.square().sum(-1)
        variance = self.squares - self.sums.square() / n
        covariance = self.with_norm - self.sums * self.norms / n
        norm_variance = self.norm_squares - self.norms.square() / n
        _, principal = torch.linalg.eigh(self.xx / n - mean.outer(mean))  # in ascending order
        found = {
            "latent": self.latents,
            "frequency": self.fired / n,
            "mean_activation": self.sums / self.fired,
            **{
                f"by_{name}": explained_share(sums, self.group_tokens[name], self.squares)
                for name, sums in self.group_sums.items()
            },
            "norm_correlation": torch.where(
                variance > 1e-12 * self.squares,
                covariance / (variance * norm_variance).sqrt(),
                torch.nan,
            ),
            "mean_cosine": atoms @ mean / (square.sqrt() * mean.norm()),
            "top_direction": (atoms @ principal[:, -directions:]).square().sum(-1) / square,
            "norm_share": self.squares * square / self.energy,
        }
        return pd.DataFrame({name: column.cpu().numpy() for name, column in found.items()})


@torch.no_grad()
def describe_latents(
    sae: SAE,
    lm: LM,
    tokens: Tokens | torch.Tensor,
    position_bins: int = 16,
    directions: int = 8,
    latents: torch.Tensor | None = None,
    batch_rows: int | None = None,
) -> pd.DataFrame:
    """What each latent of an SAE goes with, on held-out tokens; one row a latent.

    - latent; frequency: share of tokens on which it fires; mean_activation: where it fires, raw
      units; threshold: raw units
    - by_token, by_previous, by_position: share of the variance of its activation f over all tokens
      that is explained (:func:`explained_share`) by the token's id, by the id before it (a row's
      first token has a group of its own), and by the position in the row, in `position_bins` bins
      of equal logarithmic width
    - norm_correlation: Pearson correlation of f with ‖x‖
    - mean_cosine: cosine of its atom with the mean activation x̄
    - top_direction: share of its atom's squared length in the span of the `directions` leading
      principal directions of x about its mean; directions/d_in for an atom that points anywhere
    - norm_share: Σ f²‖d‖² over that of all latents, its share of the energy written

    tokens: rows of ids, [n_rows, context_size]; special ones count neither as tokens nor for x̄.
    latents: describe these only, [latents]. batch_rows: rows a forward pass, by default
    :meth:`LM.rows_at_once`. A latent that never fires has NaN for what needs activations. Raises
    ValueError if the SAE does not remember its place or is not of its width, if ids are not of the
    model's vocabulary, if no token is left after the special ones, for a number of directions that
    x does not have, and where the sums would not fit (see :class:`LatentSums`).
    """
    tokens = as_tokens(tokens)
    lm.check_ids(tokens.ids)
    key = (sae.origin.site, sae.origin.layer)
    if None in key:
        raise ValueError(
            "this SAE does not remember where it was trained: make it with SAE(..., "
            "origin=Origin(site=..., layer=...))"
        )
    if not 1 <= directions <= sae.d_in:
        raise ValueError(f"directions must be from 1 to d_in = {sae.d_in}, got {directions}")
    batch_rows = batch_rows or lm.rows_at_once(tokens.ids.shape[1])
    if sae.W_enc.device != lm.device:
        sae = copy.deepcopy(sae).to(lm.device)  # the caller's stays where it is
    special = torch.tensor(lm.special_ids, device=lm.device)
    names, group = tokens.ids.unique(
        return_inverse=True
    )  # the ids that occur: fewer groups than the vocabulary may have
    before = torch.cat([torch.full_like(group[:, :1], len(names)), group[:, :-1]], 1)
    length = tokens.ids.shape[1]
    bins = log_bins(torch.arange(length), length, position_bins).expand_as(group)
    sums = LatentSums(
        sae.W_dec,
        {"token": len(names), "previous": len(names) + 1, "position": position_bins},
        latents,
    )
    for start in tqdm(
        range(0, len(tokens), batch_rows), desc="describing latents", unit="batch", mininterval=1
    ):
        rows = slice(start, start + batch_rows)
        ids = tokens.ids[rows].to(lm.device)
        keep = ~torch.isin(ids, special)
        x = capture(lm, [key], ids)[key][keep].to(sae.W_enc.dtype)
        token, previous, position = (
            kind[rows].to(lm.device)[keep] for kind in (group, before, bins)
        )
        sums.add(x, sae.encode(x, sparse=True), token=token, previous=previous, position=position)
    if not sums.tokens:
        raise ValueError("every token is a special one (BOS, EOS or pad): nothing to describe")
    table = sums.table(directions)
    table["threshold"] = sae.threshold.double().cpu().numpy()[table.latent]
    return table[["latent", "frequency", *DESCRIPTORS]]


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
            f"no latent of {', '.join(frequencies) or 'any architecture'} ever fires: there is no frequency to show"
        )
    number = 1 - math.ceil(lowest * bins - 1e-6)
    middles = (np.arange(number) + 0.5 - number) / bins

    def shares(frequency: torch.Tensor) -> np.ndarray:
        logs = frequency[frequency > 0].double().log10()
        place = (
            torch.ceil(logs * bins - 1e-6).long() + number - 1
        )  # 1e-6: 0.1 in float32 is at the edge too
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

    frequencies: one tensor a seed, [d_sae]; all seeds are pooled
    (:func:`jumprelu.intervals.share_interval`). Latents are taken for independent, which those of
    one SAE are not quite. Raises ValueError for no latents.
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
            f"no runs of {architecture!r}: the table has {', '.join(map(str, table.architecture.unique()))}"
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
            f"no reference runs of seed {', '.join(map(str, missing))}: train the reference with these seeds too"
        )
    return pd.Series(
        [
            row[metric] - _share_at(frontiers[row.seed], row.l0, metric)
            for _, row in table.iterrows()
        ],
        index=table.index,
        dtype=float,
    )
