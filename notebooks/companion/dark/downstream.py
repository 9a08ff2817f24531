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

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.lm import LM
from jumprelu.splicing import Splicer

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


class _Variant(NamedTuple):
    """A variant that computes on the CPU and adds up what it misses, by document."""

    fn: Replace
    document: torch.Tensor
    missing: torch.Tensor

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        x = value.float().cpu()
        new = self.fn(x)
        error = (x - new).double().square().sum(-1)
        self.missing.index_add_(0, self.document, error.to(self.missing.device))
        return new


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
    :func:`jumprelu.splicing.splice` does.
    """
    tokens = as_tokens(tokens)
    splicer = Splicer(lm, tokens, [(site, layer)], start, batch_rows)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, splicer.n_documents, dtype=torch.float64, device=lm.device)

    count, own, spliced, missing = zeros(), zeros(), zeros(len(variants)), zeros(len(variants))
    for batch, log_p in splicer:
        owner = batch.counted_document
        count.index_add_(0, owner, torch.ones_like(owner, dtype=torch.float64))
        own.index_add_(0, owner, batch.losses(log_p).double())
        for number, variant in enumerate(variants.values()):
            replace = _Variant(variant, batch.document[batch.keep], missing[number])
            losses = batch.losses(batch.spliced(site, layer, replace))
            spliced[number].index_add_(0, owner, losses.double())
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
