"""What latents are compared with: directions and neurons that fire as often, and a model whose
weights are random."""

from __future__ import annotations

import copy

import torch

from jumprelu.corpus import Tokens, as_tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE, Origin
from jumprelu.sites import capture


@torch.no_grad()
def activations(lm: LM, tokens: Tokens | torch.Tensor, site: str, layer: int) -> torch.Tensor:
    """The model's activations at all tokens but special ones, [n, d_in], in memory: for a few
    rows."""
    tokens = as_tokens(tokens)
    keep = ~lm.is_special(tokens.ids)
    parts = [
        capture(lm, [(site, layer)], ids)[site, layer][kept.to(lm.device)].float().cpu()
        for ids, kept in zip(tokens.ids.split(8), keep.split(8), strict=True)
    ]
    return torch.cat(parts)


def as_latents(
    x: torch.Tensor, vectors: torch.Tensor, frequency: torch.Tensor, origin: Origin
) -> SAE:
    """Directions as latents: each is x's part along its vector, about the mean, where that is among
    the highest `frequency`.

    x: [n, d_in]; vectors: [m, d_in], made unit; frequency: [m], shares of tokens. Where the share
    would reach below 0, a latent fires on what is positive.
    """
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    offset = -unit @ x.mean(0)
    ordered = (x @ unit.T + offset).sort(0, descending=True).values
    last = (
        (frequency.double() * len(x)).round().long().clamp(0, len(x) - 1)
    )  # the first that is too low
    threshold = ordered.gather(0, last[None])[0].clamp_min(0)
    return SAE(unit.T, offset, unit, x.mean(0), threshold, origin=origin)


def random_directions(sae: SAE, x: torch.Tensor, seed: int = 0) -> SAE:
    """As many random unit vectors as the SAE has latents, each as latent that fires as often on x
    as the SAE's of its number."""
    vectors = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    return as_latents(
        x,
        vectors,
        frequency_on(sae, x),
        sae.origin._replace(architecture="random directions", training=None),
    )


def neurons(sae: SAE, x: torch.Tensor, seed: int = 0) -> SAE:
    """The dimensions of the site's own basis as latents; each fires as often on x as some live
    latent of the SAE."""
    frequency = frequency_on(sae, x)
    frequency = frequency[frequency > 0]
    drawn = frequency[
        torch.randint(len(frequency), (sae.d_in,), generator=torch.Generator().manual_seed(seed))
    ]
    return as_latents(
        x, torch.eye(sae.d_in), drawn, sae.origin._replace(architecture="neurons", training=None)
    )


@torch.no_grad()
def frequency_on(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Share of the rows of x at which each latent fires, float64 [d_sae]."""
    fired = [
        torch.bincount(sae.encode(some, sparse=True).indices()[1], minlength=sae.d_sae)
        for some in x.split(2**13)
    ]
    return torch.stack(fired).sum(0).double() / len(x)


def random_weights(lm: LM, seed: int = 0) -> LM:
    """A model of the same architecture as untrained, with the same tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(lm.model)(copy.deepcopy(lm.model.config))
    return LM(
        model.to(lm.device, lm.dtype).requires_grad_(False),
        lm.tokenizer,
        f"{lm.name}, random weights",
    )
