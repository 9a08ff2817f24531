"""What the latents of an SAE go with: one pass over held-out tokens.

Notable here:
- a batch at a time: kept are sums, per latent and per (token id, latent), in float64; activations
  never.
- "share of the variance of f explained by the token's id" is ε² and not η². With thousands of small
  groups η² is large for a latent that has nothing to do with the token: (groups − 1)/(tokens − 1)
  on average. ε² is 0 then, and may come out slightly negative; where the group fixes f it is 1."""

from __future__ import annotations

import copy
import math

import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE
from jumprelu.sites import capture

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
    # A total below that is rounding.
    return torch.where((total > 1e-12 * squares) & (n > g), share, torch.nan)


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
                f"latents must be numbers from 0 to {d_sae - 1} in one dimension, got "
                f"{latents.tolist()}"
            )
        if len(latents.unique()) < len(latents):
            raise ValueError("latents names a latent twice: give latents.unique()")
        most = max(groups.values())
        if most * len(latents) > MOST_SUMS:
            raise ValueError(
                f"{most} groups × {len(latents)} latents are more sums than the {MOST_SUMS} held "
                "at once: describe "
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
    # The ids that occur: fewer groups than the vocabulary may have
    names, group = tokens.ids.unique(return_inverse=True)
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
        keep = ~lm.is_special(ids)
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
