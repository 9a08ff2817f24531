"""What the parts of an SAE's error do to the language model: cross-entropy with reconstructions
spliced in from a position on.

Notable here:
- as in `metrics.py`, BOS, EOS and padding are neither replaced nor counted, and "loss at position
  t" is the cross-entropy of the token at t + 1. Positions before `start` are neither replaced nor
  counted: there a context is too short to be typical.
- sums are kept by document, so that shares of a rise in cross-entropy get their interval from
  drawing documents again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.lm import LM
from jumprelu.sites import record_blocks, resume_after, splice

Replace = Callable[[torch.Tensor], torch.Tensor]
"""Raw activations [n, d_in] to what takes their place, [n, d_in]."""


class Spliced(NamedTuple):
    """Sums over each document, float64. Statistics take weights, [draws, D], and return [draws]
    (`intervals.bootstrap`)."""

    names: list[str]
    tokens: torch.Tensor
    """Positions that are counted, [D]."""
    loss: torch.Tensor
    """Cross-entropy of the model itself, nats, [D]."""
    spliced: torch.Tensor
    """Cross-entropy with each variant, nats, [variants, D]."""
    missing: torch.Tensor
    """Σ‖x − variant(x)‖² where x was replaced, [variants, D]."""

    def rise(self, weights: torch.Tensor, name: str) -> torch.Tensor:
        """Cross-entropy with a variant minus the model's own; nats per token."""
        return (
            weights @ (self.spliced[self.names.index(name)] - self.loss) / (weights @ self.tokens)
        )

    def share(self, weights: torch.Tensor, name: str, of: str) -> torch.Tensor:
        """Rise with a variant over that with another."""
        return self.rise(weights, name) / self.rise(weights, of)

    def size(self, weights: torch.Tensor, name: str, of: str) -> torch.Tensor:
        """Squared error of a variant over that of another."""
        one, other = (weights @ self.missing[self.names.index(variant)] for variant in (name, of))
        return one / other


@torch.no_grad()
def splice_variants(
    lm: LM,
    tokens: Tokens | torch.Tensor,
    variants: Mapping[str, Replace],
    site: str,
    layer: int,
    start: int = 0,
    batch_rows: int | None = None,
) -> Spliced:
    """Cross-entropy on `tokens` with each variant in the place of the activations at (site, layer),
    from position `start` on.

    tokens: rows of ids, [n_rows, context_size]; variants: name → function of raw activations, such
    as an SAE, or x̂ plus a part of its error; they compute on the CPU. The model's own pass is
    computed once for all, the others from the site on.

    Raises ValueError if no position from `start` on is left to count, or as
    :func:`jumprelu.sites.splice` does.
    """
    tokens = as_tokens(tokens)
    lm.check_ids(tokens.ids)
    batch_rows = batch_rows or lm.rows_at_once(tokens.ids.shape[1])
    documents, document = tokens.document.unique(return_inverse=True)
    known = (
        layer if site == "resid_post" else layer - 1
    )  # the last block that splicing cannot change, or is about to replace
    count, own = (
        torch.zeros(len(documents), dtype=torch.float64, device=lm.device) for _ in range(2)
    )
    spliced, missing = (
        torch.zeros(len(variants), len(documents), dtype=torch.float64, device=lm.device)
        for _ in range(2)
    )
    for first in tqdm(
        range(0, len(tokens), batch_rows), desc="splicing", unit="batch", mininterval=1
    ):
        ids = tokens.ids[first : first + batch_rows].to(lm.device)
        replaced = ~lm.is_special(ids)
        replaced[:, :start] = False
        counted = replaced[:, :-1] & ~lm.is_special(ids)[:, 1:]
        rows = document[first : first + batch_rows, None].to(lm.device).expand_as(ids)
        target, owner = ids[:, 1:][counted], rows[:, :-1][counted]

        def losses(ids=ids, counted=counted, target=target) -> torch.Tensor:
            logits = lm.model(ids, use_cache=False).logits[:, :-1][counted].float()
            return F.cross_entropy(logits, target, reduction="none").double()

        with record_blocks(lm, [known] if known >= 0 else []) as blocks:
            own.index_add_(0, owner, losses())
        count.index_add_(0, owner, torch.ones_like(owner, dtype=torch.float64))
        for number, variant in enumerate(variants.values()):

            def replace(
                value: torch.Tensor, variant=variant, replaced=replaced, number=number, rows=rows
            ) -> torch.Tensor:
                x = value[replaced].float().cpu()
                new = variant(x)
                missing[number].index_add_(
                    0, rows[replaced], (x - new).double().square().sum(-1).to(lm.device)
                )
                return value.index_put((replaced,), new.to(value))

            with splice(lm, site, layer, replace), resume_after(lm, known, blocks.get(known)):
                spliced[number].index_add_(0, owner, losses())
    if not count.sum() > 0:
        raise ValueError(
            f"no position from {start} on has a next token to predict: rows have "
            f"{tokens.ids.shape[1]} positions; "
            "give longer rows or a smaller start"
        )
    used = count > 0
    return Spliced(
        list(variants), *(sums[..., used].cpu() for sums in (count, own, spliced, missing))
    )
