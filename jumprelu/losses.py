"""Losses of sparse autoencoders: pure functions of tensors, each a mean over the batch.

Reconstruction is summed over dimensions, so with inputs scaled to E‖x‖² = 1 a loss of 1 is
"explains nothing", and a sparsity coefficient λ is the price of one active latent in that unit.

What is said to be [batch, d_sae] may also be the entries of a :class:`jumprelu.sparse.Support`,
given as `layout`; `threshold` is then that of each entry.
"""

from __future__ import annotations

import torch

from .estimators import step
from .sparse import Dense, Support

DENSE = Dense()
Layout = Dense | Support


def reconstruction(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """‖x − x̂‖², summed over d_in, averaged over the batch; x, x_hat: [batch, d_in]; returns a
    scalar."""
    return (x - x_hat).square().sum(-1).mean()


def l1(acts: torch.Tensor, norms: torch.Tensor, layout: Layout = DENSE) -> torch.Tensor:
    """Σ_i f_i‖d_i‖: the reparameterisation-invariant L1 (RI-L1) of the paper's Gated and ReLU
    baselines.

    acts: [batch, d_sae], non-negative; norms: [d_sae], ‖d_i‖. With unit-norm atoms this is the
    plain L1 norm.
    """
    return layout.per_token(acts * layout.at(norms)).mean()


def l0(
    pre: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    kernel: str = "rectangle",
    ste_to_z: bool = False,
    layout: Layout = DENSE,
) -> torch.Tensor:
    """‖f‖₀ per token, shape [batch], differentiable in the threshold (Rajamanoharan et al. 2024,
    the loss).

    The step is applied to the pre-activations [batch, d_sae], never to the activations: those have
    already jumped, and half of the window would be empty.
    """
    return layout.per_token(step(pre, threshold, bandwidth, kernel, ste_to_z))


def l0_target(l0: torch.Tensor, target: float, per_sample: bool) -> torch.Tensor:
    """(‖f‖₀/target − 1)²: of each token (`per_sample`) or of the batch's mean; l0: [batch].

    What we have of the paper (second-hand) can be read either way, so both are here.
    """
    return (l0 / target - 1).square().mean() if per_sample else (l0.mean() / target - 1).square()


def l0_quadratic(l0: torch.Tensor, target: float) -> torch.Tensor:
    """(2/target)·(‖f‖₀ − target)², per token, then averaged: Gemma Scope 2's penalty (second-hand);
    l0: [batch]."""
    return 2 / target * (l0 - target).square().mean()


def frequency_penalty(
    active: torch.Tensor, reference: float, layout: Layout = DENSE
) -> torch.Tensor:
    """Σ_i ω_i(1 + ω_i/ω₀), ω_i the share of the batch on which latent i is active: quadratic in
    frequency.

    L0 is Σ ω_i: it fixes the mean frequency and not the spread. The quadratic term makes a latent
    that fires on more than ω₀ = `reference` of the tokens dearer than several rare ones. active:
    output of :func:`jumprelu.step`, [batch, d_sae]. The idea is from a later note of the paper's
    group; the form is ours.
    """
    frequency = layout.per_latent(active)
    return (frequency * (1 + frequency / reference)).sum()


def tanh_penalty(
    acts: torch.Tensor, norms: torch.Tensor, scale: float = 4.0, layout: Layout = DENSE
) -> torch.Tensor:
    """Σ_i tanh(c·f_i‖d_i‖), c = `scale`: Anthropic's smooth stand-in for L0 (January 2025
    update)."""
    return layout.per_token(torch.tanh(scale * acts * layout.at(norms))).mean()


def preactivation(pre: torch.Tensor, threshold: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Σ_i max(θ_i − π_i, 0)·‖d_i‖: pulls latents that never fire back to life (same source as
    `tanh_penalty`)."""
    return ((threshold - pre).clamp_min(0) * norms).sum(-1).mean()


def auxk(residual: torch.Tensor, pre: torch.Tensor, atoms: torch.Tensor, k: int) -> torch.Tensor:
    """‖e − ê‖² with ê the reconstruction of the residual from the `k` largest of the *dead* latents
    (Gao et al. 2024).

    residual: [batch, d_in] (detached here); pre: [batch, dead], atoms: [dead, d_in], those of the
    dead latents only. Zero if nothing is dead.
    """
    if not len(atoms):
        return residual.new_zeros(())
    values, index = pre.clamp_min(0).topk(min(k, len(atoms)), dim=-1)
    return reconstruction(
        residual.detach(), torch.zeros_like(pre).scatter(-1, index, values) @ atoms
    )
