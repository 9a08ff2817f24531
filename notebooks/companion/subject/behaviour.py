"""What the subject model does: it continues prompts, and copies sequences that come twice."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from jumprelu.intervals import Interval
from jumprelu.lm import LM

from ..rails.lm_loss import token_losses
from ..rails.repeats import mean_interval
from .compression import token_bytes

PROMPTS = ("def ", "class ", "import ", '    """Return the ', "The ")


@torch.no_grad()
def samples(
    lm: LM,
    prompts: tuple[str, ...] = PROMPTS,
    new_tokens: int = 60,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[str]:
    """Each prompt with a sampled continuation; the global random state is left as it was.
    Temperature 0 is greedy."""
    texts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for prompt in prompts:
            inputs = lm.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(
                lm.device
            )
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0}
                if temperature > 0
                else {"do_sample": False}
            )
            pad = (
                lm.tokenizer.pad_token_id
                if lm.tokenizer.pad_token_id is not None
                else lm.tokenizer.eos_token_id
            )
            ids = lm.model.generate(
                **inputs, max_new_tokens=new_tokens, pad_token_id=pad, **sampling
            )
            texts.append(lm.tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def repeated_rows(lm: LM, n_rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Rows `<bos> r r`, r of `length` random ordinary tokens; shape [n_rows, 1 + 2·length]."""
    special = set(lm.tokenizer.all_special_ids)
    usable = torch.tensor(
        [i for i, piece in enumerate(token_bytes(lm.tokenizer)) if piece and i not in special]
    )
    r = usable[
        torch.randint(len(usable), (n_rows, length), generator=torch.Generator().manual_seed(seed))
    ]
    begin = (
        lm.tokenizer.bos_token_id
        if lm.tokenizer.bos_token_id is not None
        else lm.tokenizer.eos_token_id
    )
    return torch.cat([torch.full((n_rows, 1), begin), r, r], dim=1)


def repeated_losses(lm: LM, n_rows: int = 64, length: int = 100, seed: int = 0) -> pd.DataFrame:
    """Loss at every position of `repeated_rows`, nats per token: columns `row`, `position` (1
    follows BOS), `loss`."""
    losses = token_losses(lm, repeated_rows(lm, n_rows, length, seed)).numpy()
    row, position = np.indices(losses.shape)
    return pd.DataFrame(
        {"row": row.ravel(), "position": position.ravel() + 1, "loss": losses.ravel().astype(float)}
    )


def induction(losses: pd.DataFrame) -> pd.DataFrame:
    """Loss along random sequences that come twice; a model that copies predicts the second time
    better.

    losses: from `repeated_losses`. Columns: `position`, `copy` (1 or 2), `loss` in nats per token,
    mean over rows, and its 95 % interval `low`, `high`. Source: Olsson et al. 2022, arXiv
    2209.11895.
    """
    spread = [
        (position, mean_interval(rows.tolist()))
        for position, rows in losses.groupby("position").loss
    ]
    rows = [(position, x.mean, x.low, x.high) for position, x in spread]
    table = pd.DataFrame(rows, columns=["position", "loss", "low", "high"])
    return table.assign(copy=np.where(table.position <= len(table) // 2, 1, 2))


def induction_fall(losses: pd.DataFrame) -> tuple[Interval, Interval, Interval]:
    """Mean loss of the first copy, of the second, and the fall between them, paired by row; 95 %
    intervals over rows."""
    second = losses.position > losses.position.max() // 2
    copies = losses.groupby(["row", second]).loss.mean().unstack()
    return tuple(
        mean_interval(x.tolist())
        for x in (copies[False], copies[True], copies[False] - copies[True])
    )
