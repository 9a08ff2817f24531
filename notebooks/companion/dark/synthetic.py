"""Activations whose features and noise are known: which of them shows as linear error, and which as
nonlinear?

The truth is an SAE's own output on real activations, s = Σ fᵢdᵢ + b_dec, so that its features are
known by name. Three things are added in known amounts, each as a share of the variance of s:

    x = s + noise                          "input": dense noise, which no dictionary has atoms for
    x̂ = s − Σ fᵢdᵢ over some latents       "absent": features that the SAE has not learned
    x̂ = s + noise                          "output": of a poor encoder; x knows nothing of it

and the error x − x̂ is split as a real one (:mod:`jumprelu.dark.darkmatter`). Source: Engels et al.
2024, whose synthetic setup adds noise to the input and to the reconstruction; absent features are
ours.

Notable here: x̂ is made from the true code and not by an encoder, so that nothing enters the error
besides what was added. All noise is Gaussian of equal variance in all directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch

from jumprelu.activations import Activations
from jumprelu.dark.darkmatter import Split, stream
from jumprelu.dark.regression import RIDGES, Moments
from jumprelu.sae import SAE

KNOBS = ("input", "absent", "output")


class Truth(NamedTuple):
    """What an SAE makes of some tokens. s: its output, float32 [n, d_in]; code: sparse [n, d_sae];
    fold: [n], of each token's document, −1 for testing."""

    s: torch.Tensor
    code: torch.Tensor
    fold: torch.Tensor


class Shares(NamedTuple):
    """What was added and what came out, each as a share of the variance of x on the documents for
    testing."""

    input: float
    absent: float
    output: float
    fvu: float
    fvu_linear: float
    """FVU − FVU_nl."""
    fvu_nonlinear: float


@torch.no_grad()
def truth(acts: Activations, sae: SAE, parts: Split, tokens: int) -> Truth:
    """The output of `sae` on the first `tokens` tokens of a store. Raises ValueError if these have
    none to fit or to test on."""
    outputs, codes, folds, known = [], [], [], 0
    for x, _, fold, _ in stream(acts, parts):
        code = sae.encode(x[: tokens - known], sparse=True)
        outputs.append(sae.decode(code))
        codes.append(code)
        folds.append(fold[: tokens - known])
        known += len(code)
        if known >= tokens:
            break
    found = Truth(torch.cat(outputs), torch.cat(codes).coalesce(), torch.cat(folds))
    if not (found.fold < 0).any() or len(found.fold[found.fold >= 0].unique()) < 2:
        raise ValueError(
            f"the first {tokens} tokens have no documents to test on, or too few to fit on: give "
            "more tokens"
        )
    return found


def absent_part(known: Truth, sae: SAE, share: float, seed: int = 0) -> torch.Tensor:
    """Σ fᵢdᵢ over latents drawn at random, until that has `share` of the variance of s; [n, d_in].
    share: from 0 to below 1."""
    total = _variance(known.s)
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(seed))
    token, latent = known.code.indices()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[latent]

    def of(many: int) -> torch.Tensor:
        values = torch.where(rank < many, known.code.values(), 0)
        code = torch.sparse_coo_tensor(
            torch.stack([token, latent]),
            values,
            known.code.shape,
            is_coalesced=True,
            check_invariants=False,
        )
        return torch.sparse.mm(code, sae.W_dec.detach())

    # the fewest latents that have the share: it grows with their number, but for correlations
    low, high = 0, sae.d_sae
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _variance(of(middle)) < share * total else (low, middle)
    return of(low)


def _variance(x: torch.Tensor) -> float:
    return (x - x.mean(0)).double().square().sum().item() / len(x)


@torch.no_grad()
def shares_table(
    known: Truth,
    sae: SAE,
    levels: Mapping[str, Sequence[float]],
    seed: int = 0,
    ridges: Sequence[float] = RIDGES,
) -> pd.DataFrame:
    """Every combination of levels of the three knobs: columns :class:`Shares`, a row a combination.

    levels: knob → shares of the variance of s, each ≥ 0 and for "absent" below 1. Raises ValueError
    for other knobs.
    """
    if set(levels) != set(KNOBS):
        raise ValueError(f"levels has {sorted(levels)}, expected exactly {', '.join(KNOBS)}")
    s, fold = known.s, known.fold
    g = torch.Generator().manual_seed(seed)
    unit = (_variance(s) / s.shape[1]) ** 0.5  # of the noise that has all of the variance
    before, after = (unit * torch.randn(s.shape, generator=g) for _ in range(2))
    missing = {share: absent_part(known, sae, share, seed) for share in levels["absent"]}
    fitting, testing = fold >= 0, fold < 0
    rows = []
    for dense in levels["input"]:
        noise = before * dense**0.5
        x = s + noise
        variance = _variance(x[testing]) * int(testing.sum())
        moments = Moments(x[:256].double().mean(0), 0, int(fold.max()) + 1)
        moments.add(x[fitting], x[fitting, :0], fold[fitting])
        for absent in levels["absent"]:
            for output in levels["output"]:
                wrong = after * output**0.5
                error = noise + missing[absent] - wrong
                sums = moments.again(s.shape[1])
                sums.add(x[fitting], error[fitting], fold[fitting])
                ridge = sums.best_ridge(torch.zeros(s.shape[1], dtype=torch.long), ridges)
                left = error[testing] - sums.fit(ridge)(x[testing])
                vectors = [
                    error[testing],
                    left,
                    *(part[testing] for part in (noise, missing[absent], wrong)),
                ]
                fvu, nonlinear, *added = (
                    vector.double().square().sum().item() / variance for vector in vectors
                )
                rows.append(Shares(*added, fvu, fvu - nonlinear, nonlinear))
    return pd.DataFrame(rows)


def synthetic_table(
    acts: Activations,
    sae: SAE,
    parts: Split,
    levels: Mapping[str, Sequence[float]],
    tokens: int,
    seed: int = 0,
) -> pd.DataFrame:
    """:func:`truth` and :func:`shares_table` in one: for a store and an SAE."""
    return shares_table(truth(acts, sae, parts, tokens), sae, levels, seed)
