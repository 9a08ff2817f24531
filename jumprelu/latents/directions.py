"""What a latent's atom points at: tokens that it promotes or suppresses, and other atoms near it.

- logit effects are the "logit lens" of an atom (nostalgebraist 2020): d · diag(γ) · W_U,
  mean-centred over the vocabulary, with γ the final norm's weight, folded in. It is an
  approximation: later blocks, the norm's division and a soft cap on the logits are left out, and
  for `attn_out` of Gemma 2 the norm after attention, so only the order of the tokens and their
  relative size mean something.
- γ is measured by running the norm, so Gemma's 1 + weight, RMSNorm and LayerNorm need no case of
  their own.
"""

from typing import NamedTuple

import torch

from ..lm import LM
from ..sae import SAE
from ..sites import locate
from ..splicing import place_of

FINAL_NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm")
"""Where the families of jumprelu.sites.FAMILIES keep the norm before the unembedding."""
BLOCK = 256
"""Atoms at once."""


class Effects(NamedTuple):
    """The k tokens that each of m atoms promotes most (top) and suppresses most (bottom), strongest
    first: ids, int64 [m, k], and the mean-centred change of the logit for a unit of activation, up
    to the norm's division, float32 [m, k]."""

    top: torch.Tensor
    top_value: torch.Tensor
    bottom: torch.Tensor
    bottom_value: torch.Tensor


class Near(NamedTuple):
    """The k other atoms nearest to each of m atoms, nearest first: int64 and float32 [m, k]."""

    latents: torch.Tensor
    cosine: torch.Tensor


@torch.no_grad()
def logit_effects(lm: LM, sae: SAE, latents: torch.Tensor, k: int = 10) -> Effects:
    """Tokens that the atoms of `latents` [m] promote and suppress, through final norm and
    unembedding alone.

    An atom of attn_out passes the block's output projection first.

    Raises ValueError for an SAE that does not remember its place, a site, layer or model that is
    not known, and for an SAE of another width.
    """
    site, layer = place_of(sae)
    place = locate(lm, site, layer)
    to_stream = place.module if site == "attn_out" else None
    heads = lm.config.num_attention_heads
    width = heads * getattr(lm.config, "head_dim", lm.d_model // heads)
    if sae.d_in != (width if to_stream is not None else lm.d_model):
        raise ValueError(
            f"the SAE has d_in = {sae.d_in}, which is not the width of {site} in {lm.name}"
        )
    norms = [module for name, module in lm.model.named_modules() if name in FINAL_NORMS]
    if not norms:
        kind = type(lm.model).__name__
        raise ValueError(f"{kind} has none of {FINAL_NORMS}: add its final norm to FINAL_NORMS")
    gain, centred = final_gain(norms[0], lm.d_model), isinstance(norms[0], torch.nn.LayerNorm)
    unembedding = lm.model.get_output_embeddings().weight.float()
    unembedding = (unembedding - unembedding.mean(0)) * gain  # [vocabulary, d_model]
    k = min(k, len(unembedding))
    blocks = []
    for atoms in sae.W_dec[latents.to(sae.W_dec.device)].split(BLOCK):
        atoms = atoms.to(unembedding.device, lm.dtype)
        if to_stream is not None:
            atoms = to_stream(atoms) - to_stream(torch.zeros_like(atoms[:1]))  # without its bias
        atoms = atoms.float()
        logits = (atoms - atoms.mean(-1, keepdim=True) if centred else atoms) @ unembedding.T
        (top_value, top), (bottom_value, bottom) = logits.topk(k), logits.topk(k, largest=False)
        blocks.append(Effects(top, top_value, bottom, bottom_value))
    return Effects(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))


def final_gain(norm: torch.nn.Module, d_model: int) -> torch.Tensor:
    """γ of a norm, float32 [d_model], from what it makes of a vector of ±1: mean 0, mean square 1
    (d_model is even)."""
    parameter = next(norm.parameters())
    sign = torch.ones(d_model, dtype=parameter.dtype, device=parameter.device)
    sign[1::2] = -1
    return (sign * (norm(sign[None]) - norm(torch.zeros_like(sign)[None]))[0]).float()


@torch.no_grad()
def nearest(sae: SAE, latents: torch.Tensor, k: int = 8) -> Near:
    """The atoms nearest by cosine to each of `latents` [m], among these, without itself; fewer than
    k if there are fewer."""
    atoms = torch.nn.functional.normalize(sae.W_dec[latents.to(sae.W_dec.device)].float(), dim=-1)
    k = min(k, len(atoms) - 1)
    blocks = []
    for start in range(0, len(atoms), BLOCK):
        cosine = atoms[start : start + BLOCK] @ atoms.T
        cosine[torch.arange(len(cosine)), start + torch.arange(len(cosine))] = -2
        blocks.append(cosine.topk(k))
    values, indices = (torch.cat(parts).cpu() for parts in zip(*blocks, strict=True))
    return Near(latents[indices], values)
