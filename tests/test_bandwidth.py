"""Bias and noise over bandwidth against whole batches and known rates; measurements against the loss itself."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from jumprelu import bandwidth, theorem
from jumprelu.sae import SAE, Origin

CODER, INPUTS, LAMBDA = theorem.random_coder(4, 6, threshold=0.3), theorem.random_gaussian(4), 0.05


def samples(n: int, seed: int = 0) -> torch.Tensor:
    return torch.cat(list(INPUTS.batches(n, torch.Generator().manual_seed(seed))))


# ---- Gaussian inputs ---------------------------------------------------------------------------------------------


def test_sweep_agrees_with_whole_batches():
    sweep = bandwidth.bandwidth_sweep(CODER, INPUTS, LAMBDA, [0.03, 0.1], n=2**13, repeats=4, kernels=["rectangle"])
    curves = bandwidth.error_curves(sweep, [512])
    curves = curves[curves.estimator == "straight-through"]
    drawn = bandwidth.batch_errors(CODER, INPUTS, LAMBDA, curves.bandwidth, 512, 200, seed=1)
    assert ((drawn.low < curves.high.to_numpy()) & (curves.low.to_numpy() < drawn.high)).all()
    x = samples(2**13, seed=7)
    near = ((x @ CODER.W_enc + CODER.b_enc - CODER.threshold).abs() < curves.bandwidth.iloc[0] / 2).double().mean()
    assert math.isclose(near, curves.share.iloc[0], rel_tol=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_best_bandwidth_follows_the_rate_of_its_bias(order):
    widths = np.geomspace(0.01, 1, 41)
    sweep = pd.DataFrame({"estimator": "e", "kernel": "rectangle", "bandwidth": widths, "repeat": 0,
                          "bias": widths**order, "variance": 1 / widths})  # fmt: skip
    best = bandwidth.best_bandwidths(sweep, [100, 1000, 10000])
    expected = (1 / (2 * order * best.batch_size)) ** (1 / (2 * order + 1))
    assert np.allclose(best.bandwidth, expected, rtol=5e-3)  # the parabola is exact only in the limit of a fine grid
    assert math.isclose(bandwidth.slopes(best).value[0], -1 / (2 * order + 1), rel_tol=1e-2)
    with pytest.raises(ValueError, match="on the edge of the grid"):
        bandwidth.best_bandwidths(sweep, [10**12])


# ---- real activations --------------------------------------------------------------------------------------------


def test_measured_gradients_are_those_of_training_and_of_the_loss():
    x = samples(3000)
    found = bandwidth.measure_gradients(CODER, [x], LAMBDA, [0.1, 0.4], torch.tensor([1, 4]))
    for width, rows in found.groupby("bandwidth"):
        ste = theorem.ste_gradients(CODER, x, LAMBDA, width).mean(0)[[1, 4]]
        difference = theorem.finite_differences(CODER, x, LAMBDA, width / 2).mean(0)[[1, 4]]
        assert np.allclose(rows.ste, ste, rtol=1e-10)
        assert np.allclose(rows.difference, difference, rtol=1e-8)


def test_gradients_on_takes_raw_units():
    """The same SAE and activations in other raw units give the same normalised gradients."""
    x = samples(4000).float()
    weights = [w.float() for w in CODER]
    tables = []
    for scale in (1.0, 20.0):
        W_enc, b_enc, W_dec, b_dec, threshold = weights
        sae = SAE(W_enc, b_enc * scale, W_dec, b_dec * scale, threshold * scale, origin=Origin(input_scale=scale))
        tables.append(bandwidth.gradients_on(x * scale, sae, LAMBDA, [0.2], latents=3, batch_size=1000, batches=3))
    assert tables[0].batch.nunique() == 3 and tables[0].latent.nunique() == 3
    assert np.allclose(tables[0].ste, tables[1].ste, rtol=0.02)
    with pytest.raises(ValueError, match="need 5000 activations, got 4000"):
        bandwidth.gradients_on(x, sae, LAMBDA, [0.2], latents=3, batch_size=1000, batches=4)


def test_errors_and_agreement_of_known_measurements():
    rng = np.random.default_rng(0)
    rows = [
        (b, width, latent, 1 + bias + rng.normal(0, 0.1), 1 + rng.normal(0, 0.1), 0.1)
        for b in range(40) for width, bias in ((0.1, 0.0), (0.4, 0.5)) for latent in range(20)
    ]  # fmt: skip
    measured = pd.DataFrame(rows, columns=["batch", "bandwidth", "latent", "ste", "difference", "share"])
    errors = bandwidth.measured_errors(measured, 0.1).set_index(["quantity", "bandwidth"])
    assert abs(errors.loc[("bias", 0.1), "mean"]) < 0.002
    for quantity in ("bias", "gap"):
        assert errors.loc[(quantity, 0.4), "low"] < 0.25 < errors.loc[(quantity, 0.4), "high"]
    assert errors.loc[("noise", 0.1), "low"] < 0.01 < errors.loc[("noise", 0.1), "high"]
    gap = bandwidth.agreement(measured).query("quantity == 'gap'")
    assert ((gap.low < 0) & (gap.high > 0))[gap.bandwidth == 0.1].mean() >= 0.9
    assert (gap.low > 0)[gap.bandwidth == 0.4].all()
    with pytest.raises(ValueError, match="no measurement at bandwidth 0.2"):
        bandwidth.measured_errors(measured, 0.2)
