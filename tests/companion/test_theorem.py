"""The theorem's closed forms against algebra, sampling and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from companion.ste import theorem
from companion.ste.lemma import lemma_numeric, lemma_symbolic

from jumprelu.estimators import KERNELS

CODER, INPUTS, LAMBDA = theorem.random_coder(4, 6, threshold=0.3), theorem.random_gaussian(4), 0.05


def samples(n: int, seed: int = 0) -> torch.Tensor:
    return torch.cat(list(INPUTS.batches(n, torch.Generator().manual_seed(seed))))


def test_lemma_by_algebra_and_by_counting():
    symbolic = lemma_symbolic()
    assert len(symbolic) == 3 and symbolic.holds.all(), symbolic.difference.tolist()
    found = lemma_numeric(np.array([0.3, 0.9, 1.5]), 0.02, 2**18)
    assert ((found.low <= found.theory) & (found.theory <= found.high)).all()
    assert (found.high - found.low).max() < 0.1  # narrow enough to mean something


def test_theorem_by_algebra():
    found = theorem.theorem_symbolic()
    assert len(found) == 3 and found.holds.all(), found.difference.tolist()


def test_exact_gradient_is_what_finite_differences_and_autograd_find():
    found = theorem.theorem_numeric(
        CODER, INPUTS, LAMBDA, [0.02, 0.3], half_step=0.01, n=2**18, batch=2**12
    )
    inside = (found.low <= found.exact) & (found.exact <= found.high)
    ste = found.method == "straight-through"
    assert inside[~ste].all()
    assert inside[ste & (found.bandwidth == 0.02)].all()
    assert not inside[ste & (found.bandwidth == 0.3)].all()  # a wide window is biased ...
    assert ((found.low <= found.expected) & (found.expected <= found.high))[
        ste
    ].all()  # ... by what quadrature says


@pytest.mark.parametrize("kernel", KERNELS)
def test_orders_of_the_bias(kernel):
    """First order for autograd's gradient, with the coefficient of the symbolic result; second for
    the exact I."""
    gradient = theorem.exact_gradient(CODER, INPUTS, LAMBDA)
    kappa = {
        "rectangle": 1 / 8,
        "triangular": 1 / 6,
        "gaussian": 1 / math.sqrt(2 * math.pi),
        "epanechnikov": 3 / 16,
    }[kernel]
    mean = INPUTS.mean @ CODER.W_enc + CODER.b_enc
    variance = (CODER.W_enc * (INPUTS.covariance @ CODER.W_enc)).sum(0)
    theta = CODER.threshold
    density = torch.exp(-0.5 * (theta - mean) ** 2 / variance) / (2 * math.pi * variance).sqrt()
    slope = density * (1 - theta * (theta - mean) / variance)  # d(θp)/dθ
    width = 1e-3
    bias = theorem.expected_estimate(CODER, INPUTS, LAMBDA, width, kernel) - gradient
    assert torch.allclose(
        bias / width, -2 * kappa * theta * CODER.W_dec.square().sum(1) * slope, rtol=0.05, atol=2e-3
    )
    wide, narrow = (
        theorem.expected_estimate(CODER, INPUTS, LAMBDA, w, kernel, exact=True) - gradient
        for w in (0.04, 0.02)
    )
    assert torch.allclose(wide / narrow, torch.full_like(wide, 4.0), rtol=0.05)


def test_gradient_is_the_kernel_estimate_to_rounding_and_only_as_it_is():
    found = theorem.identity_errors(CODER, samples(2000), LAMBDA, [0.05, 0.3, 2.0])
    assert len(found) == 12
    assert (found.as_it_is < 1e-12).all()
    assert (found.exact > 1e-3).all()


def test_influence_at_the_threshold_is_the_mean_of_on_and_off():
    """H(0) = ½: at π = θ the exact I is halfway between autograd's with the latent on and with it
    off."""
    x, one = samples(1), torch.eye(6, dtype=torch.float64)
    z = x @ CODER.W_enc + CODER.b_enc
    for i in range(6):
        theta = CODER.threshold.clone()
        theta[i] = z[0, i].abs()
        at = CODER._replace(threshold=theta, b_enc=CODER.b_enc + one[i] * (theta[i] - z[0, i]))
        off, on = (at._replace(b_enc=at.b_enc + one[i] * shift) for shift in (-1e-9, 1e-9))
        seen = (theorem.influence(off, x, exact=False) + theorem.influence(on, x, exact=False)) / 2
        assert math.isclose(
            seen[0, i].item(), theorem.influence(at, x)[0, i].item(), rel_tol=1e-6, abs_tol=1e-8
        )
