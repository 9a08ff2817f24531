"""Where the straight-through estimator comes from: the theorem behind it, checked by algebra and by
counting.

    L(x) = ‖x − x̂‖² + λ·L0
    I_i = 2θ_i d_i·r₋ᵢ − θ_i²‖d_i‖²
    ∂E[L]/∂θ_i = (E[I_i | π_i = θ_i] − λ)·p_i(θ_i)

(Rajamanoharan et al. 2024, arXiv 2407.14435, the section on training.) π_i is a latent's
pre-activation with density p_i, d_i its decoder row, r₋ᵢ the residual with latent i off. I_i is
what latent i is worth at its threshold: how much squared error it removes by being on.

Notable here:
- for Gaussian inputs everything is known exactly, for any number of latents
  (:func:`exact_gradient`, :func:`expected_estimate`), so bias is computed, not estimated.
- autograd cannot see r₋ᵢ. It uses the residual as it is: with the latent on above the threshold and
  off below. The average of the two sides is I_i (the paper's H(0) = ½) only at the threshold
  itself; at a bandwidth ε the two sides leave a bias of *first* order in ε, −2κ θ‖d‖²·d(θp)/dθ·ε
  with κ = ∫₀^∞ uK(u)du. A kernel estimate of the exact I_i has a bias of second order.
- random numbers come from one explicit generator a call, and checks run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.estimators import KERNELS, REACH, jump_relu, kernel, step

from ..rails.repeats import mean_interval


class Coder(NamedTuple):
    """The weights of a JumpReLU SAE in the units of its input x, whatever trained it."""

    W_enc: torch.Tensor
    """[d_in, d_sae]."""
    b_enc: torch.Tensor
    """[d_sae]."""
    W_dec: torch.Tensor
    """[d_sae, d_in]."""
    b_dec: torch.Tensor
    """[d_in]."""
    threshold: torch.Tensor
    """[d_sae], above 0."""


def random_coder(d_in: int, d_sae: int, threshold: float, seed: int = 0) -> Coder:
    """Unit-norm random atoms, an encoder near their transpose, small biases; float64."""
    generator = torch.Generator().manual_seed(seed)
    W_dec, noise = torch.randn(2, d_sae, d_in, generator=generator, dtype=torch.float64)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    b_enc, b_dec = (
        0.05 * torch.randn(n, generator=generator, dtype=torch.float64) for n in (d_sae, d_in)
    )
    return Coder(
        (W_dec + 0.1 * noise).T.contiguous(),
        b_enc,
        W_dec,
        b_dec,
        torch.full((d_sae,), threshold, dtype=torch.float64),
    )


def loss(
    coder: Coder,
    x: torch.Tensor,
    sparsity: float,
    threshold: torch.Tensor | None = None,
    bandwidth: float = 1.0,
    kernel: str = "rectangle",
) -> torch.Tensor:
    """‖x − x̂‖² + sparsity·L0 of each row of x [n, d_in]: [n]. `threshold`, [d_sae] or [n, d_sae],
    replaces the coder's; its gradient is the straight-through one, and `bandwidth` and `kernel`
    matter to that alone."""
    threshold = coder.threshold if threshold is None else threshold
    z = x @ coder.W_enc + coder.b_enc
    f = jump_relu(z, threshold, bandwidth, kernel)
    l0 = step(z, threshold, bandwidth, kernel).sum(1)
    return (x - f @ coder.W_dec - coder.b_dec).square().sum(1) + sparsity * l0


def ste_gradients(
    coder: Coder, x: torch.Tensor, sparsity: float, bandwidth: float, kernel: str = "rectangle"
) -> torch.Tensor:
    """The straight-through gradient of each sample's loss to each threshold, by autograd: [n,
    d_sae].

    Every sample gets thresholds of its own, so one backward pass gives every sample's gradient;
    their mean over samples is what a training step uses.
    """
    threshold = coder.threshold.expand(len(x), -1).clone().requires_grad_()
    total = loss(coder, x, sparsity, threshold, bandwidth, kernel).sum()
    return torch.autograd.grad(total, threshold)[0]


class WorthTerms(NamedTuple):
    """What :func:`worth_terms` returns."""

    z: torch.Tensor
    """Pre-activations, [n, d_sae]."""
    on: torch.Tensor
    """z > θ, [n, d_sae]."""
    without: torch.Tensor
    """d_i·r₋ᵢ, [n, d_sae]."""
    norms: torch.Tensor
    """‖d_i‖², [d_sae]."""


def worth_terms(coder: Coder, x: torch.Tensor) -> WorthTerms:
    """What the worth of each latent is made of, for inputs x [n, d_in]."""
    z = x @ coder.W_enc + coder.b_enc
    on = z > coder.threshold
    norms = coder.W_dec.square().sum(1)
    residual = x - (z * on) @ coder.W_dec - coder.b_dec
    return WorthTerms(z, on, residual @ coder.W_dec.T + z * on * norms, norms)


def influence(coder: Coder, x: torch.Tensor, exact: bool = True) -> torch.Tensor:
    """I_i of each sample and latent, [n, d_sae].

    exact: 2θ_i d_i·r₋ᵢ − θ_i²‖d_i‖², latent i taken out of the residual. Otherwise 2θ_i d_i·(x −
    x̂) with the residual as it is, latent i on or off: what autograd sees. At π_i = θ_i and with
    H(0) = ½ the two are equal.
    """
    z, on, without, norms = worth_terms(coder, x)
    theta = coder.threshold
    return (
        2 * theta * without - theta**2 * norms if exact else 2 * theta * (without - z * on * norms)
    )


def kernel_estimates(
    coder: Coder,
    x: torch.Tensor,
    sparsity: float,
    bandwidth: float,
    kernel_name: str = "rectangle",
    exact: bool = True,
) -> torch.Tensor:
    """(1/ε)·(I_i − λ)·K((π_i − θ_i)/ε) of each sample and latent, [n, d_sae]; `exact` as for
    :func:`influence`.

    Its mean over samples is the kernel density estimate of (E[I_i | π_i = θ_i] − λ)·p_i(θ_i).
    """
    z = x @ coder.W_enc + coder.b_enc
    weight = kernel((z - coder.threshold) / bandwidth, kernel_name) / bandwidth
    return (influence(coder, x, exact) - sparsity) * weight


def finite_differences(
    coder: Coder, x: torch.Tensor, sparsity: float, half_step: float
) -> torch.Tensor:
    """(L(θ + h e_i) − L(θ − h e_i)) / 2h of each sample and latent, the loss evaluated twice a
    latent: [n, d_sae].

    Both sides see the same samples (common random numbers).
    """
    columns = []
    for latent in range(len(coder.threshold)):
        shift = torch.zeros_like(coder.threshold)
        shift[latent] = half_step
        above, below = (loss(coder, x, sparsity, coder.threshold + s) for s in (shift, -shift))
        columns.append((above - below) / (2 * half_step))
    return torch.stack(columns, 1)


class Gaussian(NamedTuple):
    """Inputs x ~ N(mean, covariance): with these the expected gradient is known exactly."""

    mean: torch.Tensor
    """[d_in]."""
    covariance: torch.Tensor
    """[d_in, d_in]."""

    def batches(
        self, n: int, generator: torch.Generator, batch: int = 2**15
    ) -> Iterator[torch.Tensor]:
        """`n` samples in float64, at most `batch` of them, [batch, d_in], in memory at once."""
        root = torch.linalg.cholesky(self.covariance)
        for start in range(0, n, batch):
            noise = torch.randn(
                min(batch, n - start), len(self.mean), generator=generator, dtype=torch.float64
            )
            yield self.mean + noise @ root.T


def random_gaussian(d_in: int, seed: int = 0) -> Gaussian:
    """A random mean and covariance with E‖x‖² = 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    mean = 0.3 * torch.randn(d_in, generator=generator, dtype=torch.float64)
    root = torch.eye(d_in, dtype=torch.float64) + 0.4 * torch.randn(
        d_in, d_in, generator=generator, dtype=torch.float64
    )
    covariance = root @ root.T
    scale = (mean.square().sum() + covariance.trace()).sqrt()
    return Gaussian(mean / scale, covariance / scale**2)


def _given_pre_activation(
    coder: Coder, inputs: Gaussian, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(E[d_i·r₋ᵢ | π_i = y], p_i(y)), each [n, d_sae], for y [n, d_sae].

    Given π_i every other pre-activation is normal, and E[z·H(z − θ)] of a normal z with mean m and
    standard deviation s is m·Φ((m − θ)/s) + s·φ((m − θ)/s).
    """
    mean = inputs.mean @ coder.W_enc + coder.b_enc
    with_x = inputs.covariance @ coder.W_enc  # [d_in, d_sae]: Cov(x, π_i)
    covariance = coder.W_enc.T @ with_x
    variance = covariance.diagonal()
    density = torch.exp(-0.5 * (y - mean) ** 2 / variance) / (2 * math.pi * variance).sqrt()
    overlap = coder.W_dec @ coder.W_dec.T
    without = []
    for i in range(len(variance)):
        surprise = ((y[:, i] - mean[i]) / variance[i])[:, None]
        m = mean + surprise * covariance[i]  # of every latent, given π_i: [n, d_sae]
        s = (variance - covariance[i] ** 2 / variance[i]).clamp_min(1e-300).sqrt()
        t = (m - coder.threshold) / s
        f = m * torch.special.ndtr(t) + s * torch.exp(-0.5 * t**2) / math.sqrt(2 * math.pi)
        f[:, i] = 0
        x = inputs.mean + surprise * with_x[:, i] - coder.b_dec
        without.append(x @ coder.W_dec[i] - f @ overlap[i])
    return torch.stack(without, 1), density


def exact_gradient(coder: Coder, inputs: Gaussian, sparsity: float) -> torch.Tensor:
    """∂E[L]/∂θ_i = (E[I_i | π_i = θ_i] − λ)·p_i(θ_i) for Gaussian inputs, without sampling:
    [d_sae]."""
    without, density = _given_pre_activation(coder, inputs, coder.threshold[None])
    theta, norms = coder.threshold, coder.W_dec.square().sum(1)
    return ((2 * theta * without - theta**2 * norms - sparsity) * density)[0]


def expected_estimate(
    coder: Coder,
    inputs: Gaussian,
    sparsity: float,
    bandwidth: float,
    kernel_name: str = "rectangle",
    exact: bool = False,
    nodes: int = 48,
) -> torch.Tensor:
    """The mean of :func:`kernel_estimates` over Gaussian inputs, by quadrature on each side of θ:
    [d_sae].

    exact=False gives the mean of the straight-through gradient.
    """
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    half = REACH[kernel_name] / 2
    u, weights = (
        torch.cat([half * (points - 1), half * (points + 1)]),
        torch.cat([weights, weights]) * half,
    )
    y = coder.threshold + bandwidth * u[:, None]
    without, density = _given_pre_activation(coder, inputs, y)
    theta, norms = coder.threshold, coder.W_dec.square().sum(1)
    worth = (
        2 * theta * without - theta**2 * norms
        if exact
        else 2 * theta * (without - y * norms * (y > theta))
    )
    return ((weights * kernel(u, kernel_name))[:, None] * (worth - sparsity) * density).sum(0)


def theorem_symbolic() -> pd.DataFrame:
    """The theorem by sympy where one latent's expected loss has a closed form, and the order of
    each estimate's bias.

    Rows: (1) π normal, d·r₋ = a·π + c + noise, ‖d‖² = n: the derivative of the closed form against
    the theorem; (2) the first-order term in ε of the mean straight-through gradient, for any
    density p, any smooth R(π) = E[d·r₋ | π] and any symmetric kernel with κ = ∫₀^∞ uK(u)du, against
    −2κθn·d(θp)/dθ; (3) the same term for the kernel estimate of the exact I, against 0. Columns:
    statement, found, difference, holds.
    """
    import sympy as sp

    theta, sigma, n, epsilon, kappa = sp.symbols("theta sigma n epsilon kappa", positive=True)
    y, u, a, c, lam = sp.symbols("y u a c lambda", real=True)
    density = sp.exp(-(y**2) / (2 * sigma**2)) / (sigma * sp.sqrt(2 * sp.pi))
    # The mean over the noise of ‖r₋‖² − ‖r₋ − πd‖² − λ
    gain_when_on = 2 * y * (a * y + c) - n * y**2 - lam
    derivative = sp.diff(-sp.integrate(sp.expand(gain_when_on) * density, (y, theta, sp.oo)), theta)
    theorem = (2 * theta * (a * theta + c) - theta**2 * n - lam) * density.subs(y, theta)
    p, R = sp.Function("p"), sp.Function("R")

    def first_order(worth: Callable[[sp.Expr, int], sp.Expr]) -> sp.Expr:
        """Coefficient of ε in ∫K(u)·(worth − λ)·p(θ + εu)du: on each side of 0, ∫uK du = ∓κ."""
        total = sp.Integer(0)
        for on, moment in ((0, -kappa), (1, kappa)):
            slope = sp.diff(
                (worth(theta + epsilon * u, on) - lam) * p(theta + epsilon * u), epsilon
            )
            total += sp.expand(slope.subs(epsilon, 0).doit()).coeff(u, 1) * moment
        return sp.simplify(total)

    rows = []
    for statement, found, claimed in (
        ("dE[L]/dθ = (E[I | π = θ] − λ)·p(θ)", derivative, theorem),
        (
            "straight-through gradient: bias of order ε",
            first_order(lambda at, on: 2 * theta * (R(at) - at * n * on)),
            -2 * kappa * theta * n * sp.diff(theta * p(theta), theta),
        ),
        (
            "kernel estimate of the exact I: bias of order ε",
            first_order(lambda at, on: 2 * theta * R(at) - theta**2 * n),
            sp.Integer(0),
        ),
    ):
        difference = sp.simplify(found - claimed)
        rows.append((statement, str(sp.simplify(found)), str(difference), difference == 0))
    return pd.DataFrame(rows, columns=["statement", "found", "difference", "holds"])


def theorem_numeric(
    coder: Coder,
    inputs: Gaussian,
    sparsity: float,
    bandwidths: Iterable[float],
    half_step: float,
    n: int,
    seed: int = 0,
    batch: int = 2**14,
) -> pd.DataFrame:
    """Every threshold's gradient by three roads: closed form, finite differences of the sampled
    loss, straight-through.

    One stream of `n` samples serves all. The intervals come from its batches and hold together over
    latents at 95 %. Columns: latent, method ("finite difference", "straight-through"), bandwidth
    (2h for differences), exact (the closed form of ∂E[L]/∂θ), expected (the closed form of the
    straight-through mean; NaN for differences), mean, low, high.
    """
    bandwidths = list(bandwidths)
    generator = torch.Generator().manual_seed(seed)
    found: dict[float | None, list[torch.Tensor]] = {width: [] for width in [None, *bandwidths]}
    for x in tqdm(inputs.batches(n, generator, batch), total=math.ceil(n / batch), desc="theorem"):
        found[None].append(finite_differences(coder, x, sparsity, half_step).mean(0))
        for width in bandwidths:
            found[width].append(ste_gradients(coder, x, sparsity, width).mean(0))
    exact = exact_gradient(coder, inputs, sparsity).numpy()
    rows = []
    for width, means in found.items():
        method = "finite difference" if width is None else "straight-through"
        expected = (
            exact * np.nan
            if width is None
            else expected_estimate(coder, inputs, sparsity, width).numpy()
        )
        per_latent = zip(
            exact, expected, *mean_interval(torch.stack(means), comparisons=len(exact)), strict=True
        )
        rows += [
            (i, method, 2 * half_step if width is None else width, *values)
            for i, values in enumerate(per_latent)
        ]
    return pd.DataFrame(
        rows, columns=["latent", "method", "bandwidth", "exact", "expected", "mean", "low", "high"]
    )


def identity_errors(
    coder: Coder, x: torch.Tensor, sparsity: float, bandwidths: Iterable[float]
) -> pd.DataFrame:
    """How far autograd's batch gradient is from the kernel estimate, with the residual as it is and
    with the exact I.

    Columns: kernel, bandwidth, as_it_is and exact: ‖difference‖ / ‖gradient‖ over latents. The
    first is rounding. The second is not: sample by sample the two I differ by θ²‖d‖² − 2θπ‖d‖²·H(π
    − θ), which cancels only on average.
    """
    rows = []
    for name in KERNELS:
        for width in bandwidths:
            gradient = ste_gradients(coder, x, sparsity, width, name).mean(0)
            estimates = [
                kernel_estimates(coder, x, sparsity, width, name, exact).mean(0)
                for exact in (False, True)
            ]
            rows.append(
                (
                    name,
                    width,
                    *(((gradient - e).norm() / gradient.norm()).item() for e in estimates),
                )
            )
    return pd.DataFrame(rows, columns=["kernel", "bandwidth", "as_it_is", "exact"])
