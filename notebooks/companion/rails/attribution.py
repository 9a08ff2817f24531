"""How evenly an SAE's active latents share in what the language model says next.

Attribution of latent i at a token: y_i = f_i · (W_dec ∇L)_i, ∇L the gradient with respect to the
reconstruction x̂ at that token, L the logit of the correct next token minus the mean logit.
Uniformity: p = |y| / Σ|y|, r_L0 = exp(entropy(p)) / ‖y‖₀. It is 1 where all active latents matter
alike, and 1/‖y‖₀ where one alone does.

Source: Gemma Scope (Lieberum et al. 2024), its evaluation of r_L0.

- the formulas are the paper's. From memory, because no text that could be read says it: the
  gradient is that of a token's own L, the prediction made at its position, and not of later ones
  that attend to it; and all of x is replaced by x̂ meanwhile.
- rows of a batch do not see each other. So one backward pass gives the gradient of one position in
  each row, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tqdm import tqdm

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE, check_autoencoder
from jumprelu.sites import capture
from jumprelu.splicing import known_before, on_device, place_of, record_blocks, resume_after, splice


class Uniformity(NamedTuple):
    """r_L0 token by token, on the CPU, each [n]."""

    value: torch.Tensor
    """r_L0, float64; NaN where no latent has an attribution."""
    l0: torch.Tensor
    """‖y‖₀."""
    row: torch.Tensor
    """The row of tokens."""

    def mean(self, weights: torch.Tensor) -> torch.Tensor:
        """Mean over tokens, [draws]; weights: how often each row was drawn, [draws, rows]
        (`intervals.bootstrap`)."""
        known = ~self.value.isnan()
        drawn = weights[:, self.row[known]]
        return drawn @ self.value[known] / drawn.sum(-1)


def uniformity(y: torch.Tensor) -> torch.Tensor:
    """r_L0 of attributions y, [..., d_sae] → [...], float64, from 1/‖y‖₀ to 1; NaN where all are
    0."""
    size = y.double().abs()
    p = size / size.sum(-1, keepdim=True)
    entropy = -torch.xlogy(p, p).sum(-1)
    return entropy.exp() / (size > 0).sum(-1)


def token_uniformity(
    sae: SAE,
    lm: LM,
    tokens: Tokens | torch.Tensor,
    per_row: int = 2,
    seed: int = 0,
    batch_rows: int | None = None,
) -> Uniformity:
    """r_L0 at `per_row` positions of each row, drawn at random among those with a next token to
    predict.

    tokens: rows of ids, [n_rows, context_size]; the SAE's origin says where it belongs. Special
    tokens are neither replaced nor drawn, nor is what comes before one. Raises ValueError if the
    SAE does not remember its place, or if a row has fewer than `per_row` such positions.
    """
    tokens = as_tokens(tokens)
    lm.check_ids(tokens.ids)
    check_autoencoder(sae)
    site, layer = place_of(sae)
    sae = on_device(sae, lm.device)
    batch_rows = batch_rows or lm.rows_at_once(tokens.ids.shape[1])
    ordinary = ~lm.is_special(tokens.ids)
    drawn = _draw(ordinary[:, :-1] & ordinary[:, 1:], per_row, seed)
    # the last block that splicing cannot change, or is about to replace
    known = known_before(site, layer)
    values, l0, rows = [], [], []
    starts = range(0, len(tokens), batch_rows)
    for start in tqdm(starts, desc="attributing", unit="batch", mininterval=1):
        some = (part[start : start + batch_rows] for part in (tokens.ids, ordinary, drawn))
        ids, keep, positions = (part.to(lm.device) for part in some)
        with record_blocks(lm, [known] if known >= 0 else []) as blocks:
            capture(lm, [(site, layer)], ids)  # no further than there
        for position in positions.T:
            with resume_after(lm, known, blocks.get(known)):
                y = _attributions(sae, lm, ids, keep, position, site, layer)
            values.append(uniformity(y).cpu())
            l0.append((y != 0).sum(-1).cpu())
            rows.append(torch.arange(start, start + len(ids)))
    return Uniformity(torch.cat(values), torch.cat(l0), torch.cat(rows))


def _draw(allowed: torch.Tensor, per_row: int, seed: int) -> torch.Tensor:
    """`per_row` places of each row where `allowed`, bool [rows, positions], without repetition:
    [rows, per_row]."""
    if allowed.sum(-1).min() < per_row:
        fewest = int(allowed.sum(-1).min())
        raise ValueError(
            f"a row has {fewest} positions with a next token to predict: give a smaller per_row"
        )
    scores = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(~allowed, -1).topk(per_row).indices


def _attributions(
    sae: SAE,
    lm: LM,
    ids: torch.Tensor,
    keep: torch.Tensor,
    position: torch.Tensor,
    site: str,
    layer: int,
) -> torch.Tensor:
    """y at one position of each row, [rows, d_sae]; ids, keep: [rows, positions]; position:
    [rows]."""
    at = torch.arange(len(ids), device=ids.device)
    # where they are among the tokens that are replaced
    own = (keep.flatten().cumsum(0) - 1).view(keep.shape)[at, position]
    found = {}

    def replace(value: torch.Tensor) -> torch.Tensor:
        x = value[keep].detach().to(sae.W_enc.dtype)
        with torch.no_grad():
            found["f"], x_hat = sae.encode(x[own]), sae(x)
        found["x_hat"] = x_hat.requires_grad_()
        return value.index_put((keep,), x_hat.to(value.dtype))

    with torch.enable_grad(), splice(lm, site, layer, replace):
        # logits of whole rows would be most of the work
        wanted, place = position.unique(return_inverse=True)
        logits = lm.model(ids, use_cache=False, logits_to_keep=wanted).logits[at, place].float()
        objective = logits[at, ids[at, position + 1]] - logits.mean(-1)
        (gradient,) = torch.autograd.grad(objective.sum(), found["x_hat"])
    return (found["f"] * (gradient[own] @ sae.W_dec.T)).detach()
