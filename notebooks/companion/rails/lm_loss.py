"""The language model's own loss on rows of tokens."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from tqdm import tqdm

from jumprelu.lm import LM


@torch.no_grad()
def token_losses(lm: LM, ids: torch.Tensor, batch_rows: int | None = None) -> torch.Tensor:
    """Cross-entropy of every token but the first given those before it, in nats; ids [n_rows, T] →
    [n_rows, T − 1].

    batch_rows: rows at once; by default as many as :meth:`LM.rows_at_once` says.
    """
    batch_rows = batch_rows or lm.rows_at_once(ids.shape[1])
    losses = []
    for rows in tqdm(ids.split(batch_rows), desc="scoring text", unit="batch", mininterval=2):
        rows = rows.to(lm.device)
        logits = lm.model(rows, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").cpu())
    return torch.cat(losses)
