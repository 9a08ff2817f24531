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
- an edited position is a copy at the end of its row, which sees what the position sees and is seen
  by nobody. So one pass holds hundreds of edits, exactly, and begins behind what is known
  (:func:`jumprelu.sites.resume_after`).
- taking away everything would change every answer. Beside the changes stands what the same edit
  does to other concepts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.intervals import over_seeds
from jumprelu.lm import LM
from jumprelu.sae import SAE, check_autoencoder
from jumprelu.sites import Key, record_blocks, resume_after, splice

RANKINGS = ("attribution", "activation", "random")
COUNTS = (1, 2, 4, 8, 16, 32)
AT_ONCE = 512
"""Copies in a forward pass."""
PER_ROW = 5
"""Positions of a concept that one row may give, so that they come from many documents."""


class Concept(NamedTuple):
    name: str
    rule: Callable[[str], bool]
    """Of the text of the row up to and with the position that predicts."""
    answers: torch.Tensor
    """Token ids, int64 [n]."""


def open_bracket(text: str) -> str:
    """The innermost bracket that is open at the end of the text, or "". Strings and comments are
    read like code."""
    stack: list[str] = []
    for char in text:
        if char in "([{":
            stack.append(char)
        elif char in ")]}" and stack and stack[-1] + char in ("()", "[]", "{}"):
            stack.pop()
    return stack[-1] if stack else ""


def in_header(text: str) -> bool:
    """Whether the last line begins like a compound statement of Python and has no bracket open."""
    line = text.rsplit("\n", 1)[-1]
    header = re.match(r"\s*(def|class|if|elif|else|for|while|try|except|finally|with)\b", line)
    return bool(header) and not open_bracket(line)


def in_string(text: str, quote: str) -> bool:
    """Whether the last line holds an odd number of this quotation mark, and no three in a row."""
    line = text.rsplit("\n", 1)[-1]
    return line.count(quote) % 2 == 1 and quote * 3 not in line


RULES: dict[str, tuple[Callable[[str], bool], str]] = {
    "closing )": (lambda text: open_bracket(text) == "(", r" *\).*"),
    "closing ]": (lambda text: open_bracket(text) == "[", r" *\].*"),
    'closing "': (lambda text: in_string(text, '"'), r'".*'),
    "colon of a header": (in_header, r" *:(?!:).*"),
    "self": (lambda text: re.search(r"\n +def \w+\(?$", text) is not None, r"\(?self"),
    "import": (lambda text: re.search(r"(^|\n) *from [\w. ]*\w$", text) is not None, r" import"),
}
"""Name → (rule, what the whole text of an answer token matches), for Python source."""


def python_concepts(
    tokenizer: Any, rules: Mapping[str, tuple[Callable[[str], bool], str]] = RULES
) -> list[Concept]:
    """The concepts of `rules` with the answers that a tokenizer has. Raises ValueError for one
    without any."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    found = []
    for name, (rule, pattern) in rules.items():
        answers = [
            token for token, text in enumerate(texts) if re.fullmatch(pattern, text, re.DOTALL)
        ]
        if not answers:
            raise ValueError(
                f"no token of this tokenizer matches {pattern!r}, the answers of the concept {name!r}: leave it out"
            )
        found.append(Concept(name, rule, torch.tensor(answers)))
    return found


# ---- positions


class Row(NamedTuple):
    """A row and its positions, [C] each but for ids."""

    ids: torch.Tensor
    """[T]."""
    document: int
    at: torch.Tensor
    concept: torch.Tensor
    odds: torch.Tensor
    """The model's own log-odds of an answer."""
    loss: torch.Tensor
    """The model's own cross-entropy, nats."""
    blocks: dict[int, Any]
    """Outputs of blocks, for passes that begin there."""


def log_odds(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """log of the probability of all answers over that of all other tokens, [...]; both [...,
    vocabulary], answer bool."""
    return logits.masked_fill(~answer, -torch.inf).logsumexp(-1) - logits.masked_fill(
        answer, -torch.inf
    ).logsumexp(-1)


@torch.no_grad()
def find_positions(
    lm: LM, tokens: Tokens, concepts: Sequence[Concept], layers: Sequence[int] = (), most: int = 50
) -> list[Row]:
    """Rows with the positions of the concepts, at most `most` of each, those that come first; and
    outputs of `layers`.

    A position belongs to the first concept whose rule holds there, whose answers the next token is
    among and the model's first choice too. Raises ValueError for a concept without positions.
    """
    words = {token: lm.tokenizer.decode([token]) for token in tokens.ids.unique().tolist()}
    answer = _answers(lm, concepts)
    left, rows = [most] * len(concepts), []
    for ids, document in zip(
        tqdm(tokens.ids, desc="finding positions", unit="row", mininterval=1),
        tokens.document.tolist(),
        strict=True,
    ):
        ordinary = ~torch.isin(ids, torch.tensor(lm.special_ids))
        pieces = [
            words[token] if kept else ""
            for token, kept in zip(ids.tolist(), ordinary.tolist(), strict=True)
        ]
        places = [
            (t, c)
            for t in range(len(ids) - 1)
            if ordinary[t]
            for c, concept in enumerate(concepts)
            if left[c] and answer[c, ids[t + 1]] and concept.rule("".join(pieces[: t + 1]))
        ]
        if not places:
            continue
        at, concept = torch.tensor(places).T
        ids = ids.to(lm.device)
        with record_blocks(lm, layers) as blocks:
            logits = lm.model(ids[None], use_cache=False).logits[0, at.to(lm.device)].float()
        right, seen = answer[concept, logits.argmax(-1).cpu()].tolist(), set()
        kept, here = [], [PER_ROW] * len(concepts)
        for number, (t, c) in enumerate(places):
            if right[number] and left[c] and here[c] and t not in seen:
                seen.add(t)
                left[c] -= 1
                here[c] -= 1
                kept.append(number)
        if kept:
            at, concept, logits = at[kept], concept[kept], logits[kept]
            loss = F.cross_entropy(logits, ids[at.to(ids.device) + 1], reduction="none")
            rows.append(
                Row(
                    ids,
                    document,
                    at,
                    concept,
                    log_odds(logits, answer[concept].to(ids.device)).cpu(),
                    loss.cpu(),
                    dict(blocks),
                )
            )
    none = [concept.name for concept, n in zip(concepts, left, strict=True) if n == most]
    if none:
        raise ValueError(
            f"no position of {', '.join(none)} at which the model is right in {len(tokens)} rows: give more rows, "
            "or leave the concept out"
        )
    return rows


def _answers(lm: LM, concepts: Sequence[Concept]) -> torch.Tensor:
    """bool [concepts, vocabulary]."""
    answer = torch.zeros(len(concepts), lm.config.vocab_size, dtype=torch.bool)
    for own, concept in zip(answer, concepts, strict=True):
        own[concept.answers] = True
    return answer


def copied_logits(
    lm: LM, row: Row, at: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor], place: Key
) -> torch.Tensor:
    """Logits [C, vocabulary] at copies of the positions `at` [C] of a row, at each of which `fn`
    replaces the activation.

    fn: [C, width] → [C, width], of the copies at `place`. A copy attends to what stands before its
    position, and to itself.
    """
    (site, layer), n, device = place, len(row.ids), lm.device
    at = at.to(device)
    position = torch.cat([torch.arange(n, device=device), at])
    number = torch.arange(len(position), device=device)
    seen = (position[None, :] < position[:, None]) & (number[None, :] < n) | (
        number[None, :] == number[:, None]
    )
    window = getattr(lm.config, "sliding_window", None)
    near = seen if window is None else seen & (position[:, None] - position[None, :] < window)
    full, sliding = (
        torch.zeros(allowed.shape, dtype=lm.dtype, device=device).masked_fill(
            ~allowed, torch.finfo(lm.dtype).min
        )[None, None]
        for allowed in (seen, near)
    )
    by_type = {"full_attention": full, "sliding_attention": sliding}
    mask = (
        by_type
        if "sliding_attention" in (getattr(lm.config, "layer_types", None) or ())
        else sliding
    )

    known = layer if site == "resid_post" else layer - 1
    output = row.blocks.get(known)
    if output is None:
        known = -1
    else:
        first, rest = (
            (output, None) if isinstance(output, torch.Tensor) else (output[0], output[1:])
        )
        first = torch.cat([first, first[:, at]], 1)
        output = first if rest is None else (first, *rest)

    def replace(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, :n], fn(value[0, n:])[None].to(value.dtype)], 1)

    with splice(lm, site, layer, replace), resume_after(lm, known, output):
        out = lm.model(
            torch.cat([row.ids, row.ids[at]])[None],
            attention_mask=mask,
            position_ids=position[None],
            use_cache=False,
            logits_to_keep=len(at),
        )
    return out.logits[0].float()


# ---- ranking and ablation


def gradients(
    lm: LM, rows: Sequence[Row], answer: torch.Tensor, place: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations at the rows' positions, [P, width], and the gradients of the log-odds of each
    position's own concept there."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row in rows:
        held = {}

        def keep(value: torch.Tensor, held=held) -> torch.Tensor:
            held["x"] = value.detach().requires_grad_()
            return held["x"]

        with torch.enable_grad():
            odds = log_odds(
                copied_logits(lm, row, row.at, keep, place), answer[row.concept].to(lm.device)
            )
            found.append((held["x"].detach(), torch.autograd.grad(odds.sum(), held["x"])[0]))
    return torch.cat([x for x, _ in found]), torch.cat([gradient for _, gradient in found])


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
    scores = {
        "attribution": (f * (gradient @ sae.W_dec.T)).mean(0),
        "activation": f.mean(0) * sae.W_dec.norm(dim=-1),
        "random": often.log() - (-noise.log()).log(),
    }  # fmt: skip  (the Gumbel trick)
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
    places = {(sae.origin.site, sae.origin.layer) for several in saes.values() for sae in several}
    if any(None in place for place in places):
        raise ValueError(
            "an SAE does not remember where it was trained: make it with SAE(..., origin=Origin(site=, layer=))"
        )
    known = {layer if site == "resid_post" else layer - 1 for site, layer in places} - {-1}
    _, number = tokens.document.unique(return_inverse=True)
    train, test = (
        find_positions(lm, tokens[number % 2 == half], concepts, sorted(known), most)
        for half in (0, 1)
    )
    answer, concept = _answers(lm, concepts), torch.cat([row.concept for row in train])
    points = {place: gradients(lm, train, answer, place) for place in places}
    names = [concept.name for concept in concepts] + ["all"]
    columns = [(quantity, n) for quantity in ("changed", "fall", "collateral") for n in counts]
    columns += [("needed", 0), ("needed for a nat", 0)]
    rows = []
    for name, several in saes.items():
        found = []
        for sae in tqdm(several, desc=f"editing with {name}", unit="SAE", mininterval=1):
            place = sae.origin.site, sae.origin.layer
            sae = sae if sae.W_enc.device == lm.device else copy.deepcopy(sae).to(lm.device)
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
            [lambda weights, one=one: one.statistic(weights, counts) for one in found],
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
