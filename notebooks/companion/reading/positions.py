"""Positions at which a concept is answered, and passes in which copies of positions are edited.

Notable here:
- an edited position is a copy at the end of its row, which sees what the position sees and is seen
  by nobody. So one pass holds hundreds of edits, exactly, and begins behind what is known
  (:func:`jumprelu.splicing.resume_after`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.sites import Key
from jumprelu.splicing import known_before, record_blocks, resume_after, splice

from .concepts import Concept

PER_ROW = 5
"""Positions of a concept that one row may give, so that they come from many documents."""


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
    answer = answer_table(lm, concepts)
    left, rows = [most] * len(concepts), []
    for ids, document in zip(
        tqdm(tokens.ids, desc="finding positions", unit="row", mininterval=1),
        tokens.document.tolist(),
        strict=True,
    ):
        ordinary = ~lm.is_special(ids)
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
            f"no position of {', '.join(none)} at which the model is right in {len(tokens)} rows: "
            "give more rows, or leave the concept out"
        )
    return rows


def answer_table(lm: LM, concepts: Sequence[Concept]) -> torch.Tensor:
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

    known = known_before(site, layer)
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
