"""Losses of sparse autoencoders: pure functions of tensors, each a mean over the batch.

Reconstruction is summed over dimensions, so with inputs scaled to E‖x‖² = 1 a loss of 1 is
"explains nothing", and a sparsity coefficient λ is the price of one active latent in that unit.

Instead of a matrix [batch, d_sae], the losses with a `layout` also take the entries, [n], of a
:class:`jumprelu.support.Support`; `threshold` is then that of each entry.
"""

import torch
from torch import Tensor

from .estimators import step
from .support import DENSE, Layout


def reconstruction(x: Tensor, x_hat: Tensor) -> Tensor:
    """‖x − x̂‖², summed over d_in, averaged over the batch, a scalar; x, x_hat: [batch, d_in]."""
    return (x - x_hat).square().sum(-1).mean()


def l1(acts: Tensor, norms: Tensor, layout: Layout = DENSE) -> Tensor:
    """Σ_i f_i‖d_i‖: the reparameterisation-invariant L1 (RI-L1) of the paper's Gated and ReLU
    baselines. acts: [batch, d_sae], non-negative; norms: [d_sae], ‖d_i‖."""
    return layout.per_token(acts * layout.at(norms)).mean()


def l0(
    pre: Tensor,
    threshold: Tensor,
    bandwidth: float,
    kernel: str = "rectangle",
    ste_to_z: bool = False,
    layout: Layout = DENSE,
) -> Tensor:
    """‖f‖₀ per token, [batch], differentiable in the threshold (Rajamanoharan et al. 2024, the
    loss). pre: [batch, d_sae]; activations would not do: those have already jumped, and half of the
    window would be empty."""
    return layout.per_token(step(pre, threshold, bandwidth, kernel, ste_to_z))


def l0_target(l0: Tensor, target: float, per_sample: bool) -> Tensor:
    """(‖f‖₀/target − 1)²: of each token (`per_sample`; Rajamanoharan et al. 2024, the section on
    target L0) or of the batch's mean; l0: [batch]."""
    return (l0 / target - 1).square().mean() if per_sample else (l0.mean() / target - 1).square()


def frequency_penalty(active: Tensor, reference: float, layout: Layout = DENSE) -> Tensor:
    """Σ_i ω_i(1 + ω_i/ω₀), ω_i the share of the batch on which latent i is active: a latent that
    fires on more than ω₀ = `reference` of the tokens is dearer than several rare ones.

    active: output of :func:`jumprelu.step`, [batch, d_sae]. The idea is from a later note of the
    paper's group; the form is ours.
    """
    frequency = layout.per_latent(active)
    return (frequency * (1 + frequency / reference)).sum()


def auxk(residual: Tensor, pre: Tensor, atoms: Tensor, k: int) -> Tensor:
    """‖e − ê‖² with ê the reconstruction of the residual from the `k` largest of the *dead* latents
    (Gao et al. 2024); zero if nothing is dead.

    residual: [batch, d_in] (detached here); pre: [batch, dead], atoms: [dead, d_in].
    """
    if not len(atoms):
        return residual.new_zeros(())
    values, index = pre.clamp_min(0).topk(min(k, len(atoms)), dim=-1)
    x_hat = torch.zeros_like(pre).scatter(-1, index, values) @ atoms
    return reconstruction(residual.detach(), x_hat)
