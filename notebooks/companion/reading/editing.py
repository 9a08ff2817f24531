"""How many latents must be changed before the model continues with something else? Ablations of the
top latents of a concept.

A concept is a rule on the text so far and a set of answers, such as: a round bracket is open, and
the next token closes it. Its positions are those where the rule holds, the next token is an answer,
and so is the model's first choice. On half of the documents latents are ranked for each concept; on
the other half the n top ones are taken away at the position where the answer is predicted, x − Σ
(f_i − m_i) d_i with m = 0 or the mean activation, so that the SAE's error and all other latents
stay.

Sources: editing with few latents as a measure of an SAE: from memory, after Marks et al. 2024
(arXiv 2403.19647); attribution to first order: as in `attribution.py`, with x itself, not x̂, as
the point where the gradient is taken.

Notable here:
- only the position that predicts is edited. What earlier positions hold stays for attention to
  fetch.
- taking away everything would change every answer. Beside the changes stands what the same edit
  does to other concepts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE, check_autoencoder
from jumprelu.sites import Key
from jumprelu.splicing import known_before, on_device, place_of

from ..rails.repeats import over_seeds
from .concepts import Concept, python_concepts
from .positions import Row, answer_table, copied_logits, find_positions, log_odds

RANKINGS = ("attribution", "activation", "random")
COUNTS = (1, 2, 4, 8, 16, 32)
AT_ONCE = 512
"""Copies in a forward pass."""


def gradients(
    lm: LM, rows: Sequence[Row], answer: torch.Tensor, place: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations at the rows' positions, [P, width], and the gradients of the log-odds of each
    position's own concept there."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row in rows:
        leaf = _Leaf()
        with torch.enable_grad():
            logits = copied_logits(lm, row, row.at, leaf, place)
            odds = log_odds(logits, answer[row.concept].to(lm.device))
            found.append((leaf.x.detach(), torch.autograd.grad(odds.sum(), leaf.x)[0]))
    return torch.cat([x for x, _ in found]), torch.cat([gradient for _, gradient in found])


class _Leaf:
    """Leaves activations as they are, and keeps them as something to derive by."""

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        self.x = value.detach().requires_grad_()
        return self.x


@torch.no_grad()
def rank(
    sae: SAE, x: torch.Tensor, gradient: torch.Tensor, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Latents in order, [d_sae], for one concept; x, gradient: [P, d_in] at its positions.

    attribution: by the mean of f_i d_i · gradient, the fall of the log-odds to first order when i
    is taken away; activation: by the mean of f_i ‖d_i‖; random: drawn one after another, with
    chances in proportion to how often they fire at these positions.
    """
    f = sae.encode(x)
    often = (f > 0).double().mean(0).cpu()
    noise = torch.rand(
        sae.d_sae, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    # "random" is the Gumbel trick: sorted, it is a draw without replacement
    scores = {
        "attribution": (f * (gradient @ sae.W_dec.T)).mean(0),
        "activation": f.mean(0) * sae.W_dec.norm(dim=-1),
        "random": often.log() - (-noise.log()).log(),
    }
    return {name: scores[name].argsort(descending=True).cpu() for name in RANKINGS}


class Edited(NamedTuple):
    """Sums over documents; D documents, C concepts, R rankings, N counts of latents; float64."""

    positions: torch.Tensor
    """[D, C]."""
    changed: torch.Tensor
    """Positions where the first choice is an answer no more, [D, C, R, N]."""
    fall: torch.Tensor
    """Log-odds of an answer before minus after, nats, [D, C, R, N]."""
    others: torch.Tensor
    """Positions of other concepts at which the edits for this one were tried, [D, C]."""
    rise: torch.Tensor
    """Cross-entropy there after minus before, nats, [D, C, R, N]."""

    def statistic(self, weights: torch.Tensor, counts: Sequence[int] = COUNTS) -> torch.Tensor:
        """[draws, C + 1, R, 3 N + 2]: changed, fall and collateral by count, latents needed for
        half of the answers to change and for a mean fall of one nat; last the mean over
        concepts."""
        parts = (
            (self.changed, self.positions),
            (self.fall, self.positions),
            (self.rise, self.others),
        )
        changed, fall, rise = (
            torch.einsum("wd,dcrn->wcrn", weights, sums) / (weights @ count)[..., None, None]
            for sums, count in parts
        )
        found = torch.cat(
            [
                changed,
                fall,
                rise,
                needed(changed, counts)[..., None],
                needed(fall, counts, level=1.0)[..., None],
            ],
            -1,
        )
        return torch.cat([found, found.nanmean(1, keepdim=True)], 1)


def needed(share: torch.Tensor, counts: Sequence[int], level: float = 0.5) -> torch.Tensor:
    """The least n at which `share` [..., N] reaches `level`, interpolated in log n between the
    counts [N]; [...].

    At the first count already: that count. Never: twice the greatest, which stands for "more than
    that".
    """
    log_n = torch.tensor(counts, dtype=torch.float64).log2()
    over = share >= level
    last = over.double().argmax(-1).clamp_min(1)
    low, high = (share.gather(-1, at[..., None]).squeeze(-1) for at in (last - 1, last))
    part = ((level - low) / (high - low)).clamp(0, 1)
    value = log_n[last - 1] + part * (log_n[last] - log_n[last - 1])
    value = torch.where(over[..., 0], log_n[0], torch.where(over.any(-1), value, log_n[-1] + 1))
    return torch.where(share.isnan().any(-1), torch.nan, 2**value)


@torch.no_grad()
def edit(
    lm: LM,
    sae: SAE,
    rows: Sequence[Row],
    sets: torch.Tensor,
    answer: torch.Tensor,
    place: Key,
    to: torch.Tensor | float = 0.0,
) -> Edited:
    """Ablate sets of latents [C, R, N, d_sae], bool, at the rows' positions: those of a position's
    own concept, and those of one other, the concepts in turn. to: what the activations become,
    [d_sae] or a number."""
    documents = {
        document: number
        for number, document in enumerate(dict.fromkeys(row.document for row in rows))
    }
    n_concepts, shape = len(sets), sets.shape[1:3]
    sums = [torch.zeros(len(documents), n_concepts, *shape, dtype=torch.float64) for _ in range(3)]
    counts = [torch.zeros(len(documents), n_concepts, dtype=torch.float64) for _ in range(2)]
    turn, each = 0, 2 * shape.numel()

    def ablate(value: torch.Tensor) -> torch.Tensor:
        x = value.view(-1, each, value.shape[-1])
        f = sae.encode(x[:, 0].to(sae.W_enc.dtype))
        taken = torch.where(chosen, (f - to)[:, None], 0)
        return (x - (taken @ sae.W_dec).to(x)).view(value.shape)

    for row in rows:
        for start in range(0, len(row.at), max(1, AT_ONCE // each)):
            part = slice(start, start + max(1, AT_ONCE // each))
            own = row.concept[part]
            other = (
                own + 1 + (turn + torch.arange(len(own))) % max(1, n_concepts - 1)
            ) % n_concepts
            turn += len(own)
            chosen = sets[torch.stack([own, other], 1)].flatten(1, 3).to(lm.device)
            logits = copied_logits(lm, row, row.at[part].repeat_interleave(each), ablate, place)
            logits = logits.view(len(own), 2, shape.numel(), -1)
            odds = log_odds(logits[:, 0], answer[own][:, None].to(logits.device)).cpu()
            changed = ~answer[own[:, None], logits[:, 0].argmax(-1).cpu()]
            target = row.ids[row.at[part].to(row.ids.device) + 1]
            loss = -logits[:, 1].log_softmax(-1)[torch.arange(len(own)), :, target].cpu()
            values = (changed, row.odds[part, None] - odds, loss - row.loss[part, None])
            d = documents[row.document]
            for total, value, concept in zip(sums, values, (own, own, other), strict=True):
                total[d].index_add_(0, concept, value.double().view(-1, *shape))
            for count, concept in zip(counts, (own, other), strict=True):
                count[d].index_add_(0, concept, torch.ones(len(own), dtype=torch.float64))
    return Edited(counts[0], sums[0], sums[1], counts[1], sums[2])


def editing_table(
    lm: LM,
    saes: Mapping[str, Sequence[SAE]],
    tokens: Tokens | torch.Tensor,
    concepts: Sequence[Concept] | None = None,
    counts: Sequence[int] = COUNTS,
    to: str = "zero",
    most: int = 50,
    draws: int = 1000,
) -> pd.DataFrame:
    """What ablations of n latents do, for SAEs by name (those of one name differ in their seed),
    with 95 % intervals.

    tokens: rows of held-out text; every other document ranks, the others are edited; `most`
    positions a concept in each half. to: "zero", or "mean": the mean activation over the ranking
    half's positions of all concepts. Columns name, concept (the last: "all", the mean over
    concepts), ranking, quantity, n, mean, low, high. Quantities: "changed", share of positions;
    "fall", nats; "collateral", nats; "needed" and "needed for a nat", latents (n = 0): see
    :class:`Edited` and :func:`needed`. A count of d_sae or more takes all latents: what the latents
    can do together. Intervals: `over_seeds`.

    Raises ValueError for a concept without positions in either half, fewer than two concepts, an
    SAE that does not remember its place, or another `to`.
    """
    for sae in (sae for several in saes.values() for sae in several):
        check_autoencoder(sae)
    tokens, concepts = as_tokens(tokens), list(concepts or python_concepts(lm.tokenizer))
    lm.check_ids(tokens.ids)
    if to not in ("zero", "mean"):
        raise ValueError(f"latents can be set to 'zero' or 'mean', got {to!r}")
    if len(concepts) < 2:
        raise ValueError(
            "expected at least two concepts: what an edit does besides is measured on the others'"
        )
    places = {place_of(sae) for several in saes.values() for sae in several}
    known = {known_before(*place) for place in places} - {-1}
    _, number = tokens.document.unique(return_inverse=True)
    train, test = (
        find_positions(lm, tokens[number % 2 == half], concepts, sorted(known), most)
        for half in (0, 1)
    )
    answer, concept = answer_table(lm, concepts), torch.cat([row.concept for row in train])
    points = {place: gradients(lm, train, answer, place) for place in places}
    names = [concept.name for concept in concepts] + ["all"]
    columns = [(quantity, n) for quantity in ("changed", "fall", "collateral") for n in counts]
    columns += [("needed", 0), ("needed for a nat", 0)]
    rows = []
    for name, several in saes.items():
        found = []
        for sae in tqdm(several, desc=f"editing with {name}", unit="SAE", mininterval=1):
            place = sae.origin.site, sae.origin.layer
            sae = on_device(sae, lm.device)
            x, gradient = points[place]
            sets = torch.zeros(
                len(concepts), len(RANKINGS), len(counts), sae.d_sae, dtype=torch.bool
            )
            for c in range(len(concepts)):
                for r, order in enumerate(
                    rank(sae, x[concept == c], gradient[concept == c]).values()
                ):
                    for k, n in enumerate(counts):
                        sets[c, r, k, order[:n]] = True
            with torch.no_grad():
                level = sae.encode(x).mean(0) if to == "mean" else 0.0
            found.append(edit(lm, sae, test, sets, answer, place, level))
        interval = over_seeds(
            [functools.partial(one.statistic, counts=counts) for one in found],
            len(found[0].positions),
            draws,
        )
        rows += [
            (name, names[c], ranking, quantity, n, *(float(end[c, r, q]) for end in interval))
            for c in range(len(names))
            for r, ranking in enumerate(RANKINGS)
            for q, (quantity, n) in enumerate(columns)
        ]
    return pd.DataFrame(
        rows, columns=["name", "concept", "ranking", "quantity", "n", "mean", "low", "high"]
    )
