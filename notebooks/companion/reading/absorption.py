"""Feature absorption: tokens at which the latent for a feature is silent because a more special
latent has taken its part over.

A feature is a known fact about the token at a position, such as "begins with s". Its probe is a
logistic regression on activations, of direction w; its main latents are those whose firing tells it
best. A token that has the feature, and of which the probe says so, is absorbed where all main
latents are silent and one other latent, whose decoder points along w, carries it.

Source: Chanin et al. 2024 (arXiv 2409.14507), from memory: k-sparse probing, the step of 0.03 in
F1, and the criterion by cosine and by what is carried along the probe. The two thresholds are those
of SAEBench (Karvonen et al. 2025), also from memory.

Notable here:
- latents are judged by whether they fire, not by a fitted threshold: silence is what absorption is
  about.
- probe and main latents come from one half of the documents, every number that is reported from the
  other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE
from jumprelu.sites import capture

from ..rails.repeats import mean_interval, over_seeds

WORDS = (
    "and as assert class def del elif else except for from if import in is not or pass raise "
    "return try while with yield"
)
FEATURES = {
    **{f"begins with {letter}": rf" ?{letter}[a-z]*" for letter in "abcdefimoprst"},
    "keyword": rf" ?({WORDS.replace(' ', '|')})",
    "capital letter": r" ?[A-Z]\w*",
    "white space": r"\s+",
    "digit": r" ?\d+",
}
"""Name → what the whole text of a token with the feature matches."""
QUANTITIES = ("probe F1", "main F1", "main latents", "silent", "absorbed")


class Counts(NamedTuple):
    """Sums over documents of the testing half, float64, [D, F]; and of the main latents, [F]."""

    probe: torch.Tensor
    """[3, D, F]: tokens that have the feature, of which the probe says so, and both."""
    main: torch.Tensor
    """[3, D, F]: the same with "a main latent fires" in the place of the probe."""
    silent: torch.Tensor
    """Tokens for which feature and probe hold and no main latent fires."""
    absorbed: torch.Tensor
    """Those of them that another latent carries (:func:`absorbed`)."""
    latents: torch.Tensor

    def statistic(self, weights: torch.Tensor) -> torch.Tensor:
        """QUANTITIES of each feature, [draws, F, 5]: F1 of the probe and of the main latents, how
        many these are, and the shares of tokens, among those for which feature and probe hold, at
        which they are silent, and that are absorbed."""
        weights = weights.to(self.silent)
        (has, says, both), (_, fires, right) = (
            torch.einsum("wd,kdf->kwf", weights, part) for part in (self.probe, self.main)
        )
        found = [
            2 * both / (has + says),
            2 * right / (has + fires),
            self.latents.expand(len(weights), -1).double(),
            weights @ self.silent / both,
            weights @ self.absorbed / both,
        ]
        return torch.stack(found, -1)


def fit_probes(
    x: torch.Tensor, y: torch.Tensor, decay: float = 1e-3, steps: int = 100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions w [d_in, F] and offsets b [F]: logistic regressions of y [n, F], bool, on x [n,
    d_in]: y where x w + b > 0.

    Minimises the mean cross-entropy + decay/2 · ‖w‖², x in units of its root mean square about the
    mean, by L-BFGS.
    """
    mean = x.mean(0)
    scale = (x - mean).square().sum(-1).mean().sqrt() / x.shape[1] ** 0.5
    z, target = (x - mean) / scale, y.to(x.dtype)
    w, b = (
        torch.zeros(shape, dtype=x.dtype, requires_grad=True)
        for shape in ((x.shape[1], y.shape[1]), (y.shape[1],))
    )
    solver = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = (
            F.binary_cross_entropy_with_logits(z @ w + b, target) * y.shape[1]
            + decay / 2 * w.square().sum()
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    w, b = w.detach() / scale, b.detach()
    return w, b - mean @ w


def main_latents(
    fires: torch.Tensor, y: torch.Tensor, step: float = 0.03, most: int = 5
) -> list[int]:
    """Latents chosen one by one: each raises F1 of "one of them fires" against y most, as long as
    it does by `step`.

    fires: [n, d_sae], 0 or 1, of a floating dtype; y: [n], bool. The first is taken whatever its
    F1.
    """
    chosen: list[int] = []
    covered, best = torch.zeros(len(y), dtype=torch.bool), -torch.inf
    while len(chosen) < most:
        right = covered[y].sum() + (y & ~covered).to(fires) @ fires
        said = covered.sum() + (~covered).to(fires) @ fires
        f1 = 2 * right / (y.sum() + said)
        if f1.max() < best + step:
            break
        best = f1.max()
        chosen.append(int(f1.argmax()))
        covered |= fires[:, chosen[-1]] > 0
    return chosen


def absorbed(
    f: torch.Tensor,
    W_dec: torch.Tensor,
    w: torch.Tensor,
    main: Sequence[int],
    cosine: float = 0.1,
    share: float = 0.4,
) -> torch.Tensor:
    """Whether another latent carries the feature, bool [n], for tokens with activations f [n,
    d_sae].

    All `main` latents are silent; some other i has cos(d_i, w) ≥ `cosine`; and f_i d_i · w is at
    least `share` of Σ_j f_j d_j · w over all j, which is positive (b_dec counts for nothing).
    """
    along = W_dec @ (w / w.norm())
    carried = f * along
    able = along >= cosine * W_dec.norm(dim=-1)
    able[list(main)] = False
    total = carried.sum(-1)
    silent = (f[:, list(main)] == 0).all(-1)
    return silent & (total > 0) & (carried.where(able, 0).amax(-1) >= share * total)


@torch.no_grad()
def count(
    sae: SAE,
    x: torch.Tensor,
    y: torch.Tensor,
    document: torch.Tensor,
    train: torch.Tensor,
    probes: tuple[torch.Tensor, torch.Tensor],
    cosine: float = 0.1,
    share: float = 0.4,
) -> Counts:
    """x: [n, d_in]; y: [n, F]; document: [n], of those not in `train` numbered from 0; train: [n],
    bool."""
    f = sae.encode(x.to(sae.W_enc)).cpu().to(x.dtype)
    w, b = probes
    fires = (f > 0).to(x.dtype)
    mains = [main_latents(fires[train], y[train, k]) for k in range(y.shape[1])]
    f, x, y, document = f[~train], x[~train], y[~train], document[~train]
    says = x @ w + b > 0
    main = torch.stack([(f[:, chosen] > 0).any(-1) for chosen in mains], -1)
    W_dec, gone = sae.W_dec.cpu().to(x.dtype), torch.zeros_like(y)
    for k, chosen in enumerate(mains):
        both = y[:, k] & says[:, k]
        gone[both, k] = absorbed(f[both], W_dec, w[:, k], chosen, cosine, share)

    def sums(value: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(document.max()) + 1, y.shape[1], dtype=torch.float64).index_add_(
            0, document, value.double()
        )

    return Counts(
        torch.stack([sums(y), sums(says), sums(y & says)]),
        torch.stack([sums(y), sums(main), sums(y & main)]),
        sums(y & says & ~main),
        sums(gone),
        torch.tensor([len(chosen) for chosen in mains]),
    )


def truth(
    ids: torch.Tensor, tokenizer: Any, features: Mapping[str, str] = FEATURES
) -> torch.Tensor:
    """Which of the features each token has, bool [n, F]; ids: [n]."""
    known, number = ids.unique(return_inverse=True)
    texts = [tokenizer.decode([token]) for token in known.tolist()]
    found = [
        [re.fullmatch(pattern, text) is not None for pattern in features.values()] for text in texts
    ]
    return torch.tensor(found)[number]


def absorption_table(
    lm: LM,
    saes: Mapping[str, Sequence[SAE]],
    tokens: Tokens | torch.Tensor,
    features: Mapping[str, str] = FEATURES,
    cosine: float = 0.1,
    share: float = 0.4,
    draws: int = 1000,
    batch_rows: int | None = None,
) -> pd.DataFrame:
    """How often features are absorbed, for SAEs by name (those of one name differ in their seed),
    with 95 % intervals.

    tokens: rows of held-out text; every other document is for probes and main latents, the others
    for the numbers. Columns name, feature, quantity (`QUANTITIES`), mean, low, high. Intervals: for
    documents and seeds (`over_seeds`); of the feature "all", the mean over features, for other
    features (Student's t).

    Raises ValueError for an SAE that does not remember its place, fewer than two documents, or a
    feature that no token, or every token, of the probes' half has.
    """
    tokens = as_tokens(tokens)
    lm.check_ids(tokens.ids)
    places = list(
        dict.fromkeys(
            (sae.origin.site, sae.origin.layer) for several in saes.values() for sae in several
        )
    )
    if any(None in place for place in places):
        raise ValueError(
            "an SAE does not remember where it was trained: make it with SAE(..., "
            "origin=Origin(site=, layer=))"
        )
    keep = ~lm.is_special(tokens.ids)
    documents, number = tokens.document.unique(return_inverse=True)
    if len(documents) < 2:
        raise ValueError(
            "one document cannot be split into two halves: give tokens of more documents"
        )
    number = number[:, None].expand_as(keep)[keep]
    train, y = number % 2 == 0, truth(tokens.ids[keep], lm.tokenizer, features)
    bad = [
        name
        for name, share_of in zip(features, y[train].double().mean(0).tolist(), strict=True)
        if share_of in (0, 1)
    ]
    if bad:
        raise ValueError(
            f"{', '.join(bad)}: no token or every token of the documents for the probes has it. "
            "Give more rows, or leave it out"
        )
    step = batch_rows or lm.rows_at_once(tokens.ids.shape[1])
    parts = [
        {
            place: value.float().cpu()
            for place, value in capture(lm, places, tokens.ids[i : i + step]).items()
        }
        for i in range(0, len(tokens), step)
    ]
    acts = {place: torch.cat([part[place] for part in parts])[keep] for place in places}
    probes = {place: fit_probes(x[train], y[train]) for place, x in acts.items()}
    rows = []
    for name, several in saes.items():
        found = []
        for sae in several:
            place = sae.origin.site, sae.origin.layer
            found.append(
                count(sae, acts[place], y, number // 2, train, probes[place], cosine, share)
            )
        interval = over_seeds([one.statistic for one in found], len(documents) // 2, draws)
        rows += [
            (name, feature, quantity, *(float(end[k, q]) for end in interval))
            for k, feature in enumerate(features)
            for q, quantity in enumerate(QUANTITIES)
        ]
        known = [
            of_one[~np.isnan(of_one)] for of_one in interval.mean.T
        ]  # of a feature that the probe never finds, no share
        rows += [
            (name, "all", quantity, *mean_interval(of_one))
            for quantity, of_one in zip(QUANTITIES, known, strict=True)
        ]
    return pd.DataFrame(rows, columns=["name", "feature", "quantity", "mean", "low", "high"])
