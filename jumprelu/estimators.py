"""JumpReLU and the step function, with the paper's straight-through pseudo-derivatives.

    JumpReLU_θ(z) = z·H(z − θ)          ð/ðθ = −(θ/ε)·K((z − θ)/ε)      ð/ðz = H(z − θ)
    step_θ(z)     =   H(z − θ)          ð/ðθ = −(1/ε)·K((z − θ)/ε)      ð/ðz = 0

(Rajamanoharan et al. 2024, arXiv 2407.14435, the section on training.) K is a kernel that
integrates to 1, ε its bandwidth. Both functions are piecewise constant in θ, so their true
derivative says nothing; averaged over a batch, the pseudo-derivatives are a kernel density estimate
of the derivative of the *expected* loss. No pseudo-gradient reaches z, so the L0 penalty trains
thresholds only; `ste_to_z=True` adds the term that is left out, for an ablation.

Comparisons are written as ones and zeros of z's own type, in place: booleans would be several times
as slow on a CPU.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

REACH = {"rectangle": 0.5, "triangular": 1.0, "gaussian": 9.0, "epanechnikov": 1.0}
"""K(u) is zero, or below 1e-17, beyond this |u|."""

KERNELS = tuple(REACH)


def check_kernel(name: str) -> None:
    """Raise ValueError for a name that is not in `KERNELS`."""
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}: expected one of {', '.join(KERNELS)}")


def kernel(u: Tensor, name: str = "rectangle") -> Tensor:
    """K(u), a density: non-negative, symmetric, integral 1; same shape as `u`.

    rectangle: H(u + ½) − H(u − ½), the paper's choice; triangular: (1 − |u|)₊; epanechnikov: ¾(1 −
    u²)₊; gaussian: exp(−u²/2)/√(2π). Raises ValueError for another name.
    """
    check_kernel(name)
    if name == "rectangle":
        return u.abs().lt_(0.5)
    if name == "triangular":
        return (1 - u.abs()).clamp_min(0)
    if name == "epanechnikov":
        return 0.75 * (1 - u * u).clamp_min(0)
    return torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


@torch.no_grad()
def heaviside(z: Tensor, threshold: Tensor | float) -> Tensor:
    """H(z − θ), ones and zeros in the type and shape of z, to which θ broadcasts; no gradient."""
    return torch.gt(z, threshold, out=torch.empty_like(z))


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient.sum_to_size(shape) if gradient.shape != shape else gradient


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, bandwidth, kernel_name, ste_to_z):
        ctx.save_for_backward(z, threshold)
        ctx.options = bandwidth, kernel_name, ste_to_z
        return heaviside(z, threshold).mul_(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        z, threshold = ctx.saved_tensors
        bandwidth, kernel_name, ste_to_z = ctx.options
        spike = kernel((z - threshold).div_(bandwidth), kernel_name)
        spike.mul_(threshold / bandwidth).mul_(gradient)
        to_z = heaviside(z, threshold).mul_(gradient)
        to_z = to_z.add_(spike) if ste_to_z else to_z
        return to_z, -_sum_to(spike, threshold.shape), None, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, bandwidth, kernel_name, ste_to_z):
        ctx.save_for_backward(z, threshold)
        ctx.options = bandwidth, kernel_name, ste_to_z
        return heaviside(z, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        z, threshold = ctx.saved_tensors
        bandwidth, kernel_name, ste_to_z = ctx.options
        spike = kernel((z - threshold).div_(bandwidth), kernel_name)
        spike.div_(bandwidth).mul_(gradient)
        return spike if ste_to_z else None, -_sum_to(spike, threshold.shape), None, None, None


def _checked(threshold: Tensor | float, bandwidth: float, kernel_name: str, z: Tensor) -> Tensor:
    if not bandwidth > 0:
        raise ValueError(
            f"bandwidth must be above 0, got {bandwidth}: the paper uses 0.001 for inputs with "
            "E‖x‖² = 1"
        )
    check_kernel(kernel_name)
    if not isinstance(threshold, Tensor):
        threshold = torch.tensor(threshold, dtype=z.dtype, device=z.device)
    try:
        threshold.expand(z.shape)
    except RuntimeError as error:
        raise ValueError(
            f"threshold of shape {tuple(threshold.shape)} does not fit pre-activations of shape "
            f"{tuple(z.shape)}: expected [d_sae] (one threshold a latent) or a scalar"
        ) from error
    return threshold


def jump_relu(
    z: Tensor,
    threshold: Tensor | float,
    bandwidth: float,
    kernel: str = "rectangle",
    ste_to_z: bool = False,
) -> Tensor:
    """z·H(z − θ), with a straight-through gradient to the threshold.

    z: pre-activations, any shape [..., d_sae]; threshold: [d_sae] or a scalar, in the units of z;
    bandwidth: ε > 0 in the units of z, used by the backward pass only. Returns the shape of z. At
    z = θ the latent is off. Raises ValueError for a bandwidth ≤ 0, an unknown kernel, and a
    threshold that does not broadcast to z; RuntimeError where its gradient is differentiated again.
    Source: Rajamanoharan et al. 2024, the definition of JumpReLU and its pseudo-derivative.
    """
    return _JumpReLU.apply(
        z, _checked(threshold, bandwidth, kernel, z), bandwidth, kernel, ste_to_z
    )


def step(
    z: Tensor,
    threshold: Tensor | float,
    bandwidth: float,
    kernel: str = "rectangle",
    ste_to_z: bool = False,
) -> Tensor:
    """H(z − θ), 1 where a latent is on and else 0; its sum over latents is L0. Arguments as for
    :func:`jump_relu`."""
    return _Step.apply(z, _checked(threshold, bandwidth, kernel, z), bandwidth, kernel, ste_to_z)
