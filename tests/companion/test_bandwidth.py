"""Bias and noise over bandwidth against whole batches and known rates; measurements against the
loss itself."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from companion.ste import bandwidth, on_activations, theorem

from jumprelu.sae import SAE, Origin

CODER, INPUTS, LAMBDA = theorem.random_coder(4, 6, threshold=0.3), theorem.random_gaussian(4), 0.05


def samples(n: int, seed: int = 0) -> torch.Tensor:
    return torch.cat(list(INPUTS.batches(n, torch.Generator().manual_seed(seed))))


# ---- Gaussian inputs


def test_sweep_agrees_with_whole_batches():
    sweep = bandwidth.bandwidth_sweep(
        CODER, INPUTS, LAMBDA, [0.03, 0.1], n=2**13, repeats=4, kernels=["rectangle"]
    )
    curves = bandwidth.error_curves(sweep, [512])
    curves = curves[curves.estimator == "straight-through"]
    drawn = bandwidth.batch_errors(CODER, INPUTS, LAMBDA, curves.bandwidth, 512, 200, seed=1)
    assert ((drawn.low < curves.high.to_numpy()) & (curves.low.to_numpy() < drawn.high)).all()
    x = samples(2**13, seed=7)
    near = (
        ((x @ CODER.W_enc + CODER.b_enc - CODER.threshold).abs() < curves.bandwidth.iloc[0] / 2)
        .double()
        .mean()
    )
    assert math.isclose(near, curves.share.iloc[0], rel_tol=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_best_bandwidth_follows_the_rate_of_its_bias(order):
    widths = np.geomspace(0.01, 1, 41)
    sweep = pd.DataFrame(
        {
            "estimator": "e",
            "kernel": "rectangle",
            "bandwidth": widths,
            "repeat": 0,
            "bias": widths**order,
            "variance": 1 / widths,
        }
    )
    best = bandwidth.best_bandwidths(sweep, [100, 1000, 10000])
    expected = (1 / (2 * order * best.batch_size)) ** (1 / (2 * order + 1))
    assert np.allclose(
        best.bandwidth, expected, rtol=5e-3
    )  # the parabola is exact only in the limit of a fine grid
    assert math.isclose(bandwidth.slopes(best).value[0], -1 / (2 * order + 1), rel_tol=1e-2)
    with pytest.raises(ValueError, match="on the edge of the grid"):
        bandwidth.best_bandwidths(sweep, [10**12])


# ---- real activations


def test_measured_gradients_are_those_of_training_and_of_the_loss():
    x = samples(3000)
    found = on_activations.measure_gradients(CODER, [x], LAMBDA, [0.1, 0.4], torch.tensor([1, 4]))
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
        sae = SAE(
            W_enc,
            b_enc * scale,
            W_dec,
            b_dec * scale,
            threshold * scale,
            origin=Origin(input_scale=scale),
        )
        tables.append(
            on_activations.gradients_on(
                x * scale, sae, LAMBDA, [0.2], latents=3, batch_size=1000, batches=3
            )
        )
    assert tables[0].batch.nunique() == 3 and tables[0].latent.nunique() == 3
    assert np.allclose(tables[0].ste, tables[1].ste, rtol=0.02)
    with pytest.raises(ValueError, match="need 5000 activations, got 4000"):
        on_activations.gradients_on(x, sae, LAMBDA, [0.2], latents=3, batch_size=1000, batches=4)


def test_errors_and_agreement_of_known_measurements():
    rng = np.random.default_rng(0)
    rows = [
        (b, width, latent, 1 + bias + rng.normal(0, 0.1), 1 + rng.normal(0, 0.1), 0.1)
        for b in range(40)
        for width, bias in ((0.1, 0.0), (0.4, 0.5))
        for latent in range(20)
    ]
    measured = pd.DataFrame(
        rows, columns=["batch", "bandwidth", "latent", "ste", "difference", "share"]
    )
    errors = on_activations.measured_errors(measured, 0.1).set_index(["quantity", "bandwidth"])
    assert abs(errors.loc[("bias", 0.1), "mean"]) < 0.002
    for quantity in ("bias", "gap"):
        assert errors.loc[(quantity, 0.4), "low"] < 0.25 < errors.loc[(quantity, 0.4), "high"]
    assert errors.loc[("noise", 0.1), "low"] < 0.01 < errors.loc[("noise", 0.1), "high"]
    gap = on_activations.agreement(measured).query("quantity == 'gap'")
    assert ((gap.low < 0) & (gap.high > 0))[gap.bandwidth == 0.1].mean() >= 0.9
    assert (gap.low > 0)[gap.bandwidth == 0.4].all()
    with pytest.raises(ValueError, match="no measurement at bandwidth 0.2"):
        on_activations.measured_errors(measured, 0.2)
    absolute = on_activations.measured_errors(measured, 0.1, relative=False).set_index(
        ["quantity", "bandwidth"]
    )
    assert (
        absolute.loc[("bias", 0.4), "low"] < 0.25 < absolute.loc[("bias", 0.4), "high"]
    )  # of each latent, on average
    assert absolute.loc[("noise", 0.4), "low"] < 0.01 < absolute.loc[("noise", 0.4), "high"]
    tripled = measured.assign(ste=3 * measured.ste, difference=3 * measured.difference)
    again = on_activations.measured_errors(tripled, 0.1).set_index(["quantity", "bandwidth"])
    assert np.allclose(again, errors)  # a ratio; and in absolute units nine times as much
    assert np.allclose(
        on_activations.measured_errors(tripled, 0.1, relative=False)["mean"], 9 * absolute["mean"]
    )
    with pytest.raises(ValueError, match="no pre-activation was in the window"):
        on_activations.measured_errors(measured.assign(difference=0.0), 0.1)


# ---- along a training run


def test_along_a_run_against_closed_forms():
    """Gaussian inputs, on which a snapshot's gradient and the estimator's bias are known, at two
    thresholds and two λ."""
    shares, sparsities = (0.25, 1.0), {0.25: 0.0, 1.0: 0.2}
    coders = {
        share: CODER._replace(threshold=CODER.threshold * factor)
        for share, factor in zip(shares, (1.0, 2.0), strict=True)
    }
    saes = {share: SAE(*coder, origin=Origin(input_scale=1.0)) for share, coder in coders.items()}
    widths, size = [0.05, 0.4, 0.8], 500
    measured = on_activations.gradients_along(
        samples(25_000), saes, sparsities, widths, latents=6, batch_size=size, batches=48
    )
    assert measured.groupby(["run_share", "bandwidth"]).size().eq(48 * 6).all() and list(
        measured.run_share.unique()
    ) == [0.25, 1]
    found = on_activations.along_run(measured, reference=0.05, averaged=4)
    fresh = samples(20_000, seed=9)
    for share, coder in coders.items():
        gradient = theorem.exact_gradient(coder, INPUTS, sparsities[share])
        for row in found[found.share == share].itertuples():
            bias = (
                theorem.expected_estimate(
                    coder, INPUTS, sparsities[share], row.bandwidth, "rectangle"
                )
                - gradient
            )
            assert row.bias2_low < bias.square().mean() < row.bias2_high
            assert row.gradient2_low < gradient.square().mean() < row.gradient2_high
            noise = (
                theorem.ste_gradients(coder, fresh, sparsities[share], row.bandwidth).var(0).mean()
                / size
            )
            assert row.noise == pytest.approx(noise.item(), rel=0.3)
            near = (
                ((fresh @ coder.W_enc + coder.b_enc - coder.threshold).abs() < row.bandwidth / 2)
                .double()
                .mean()
            )
            assert row.share_in_window == pytest.approx(near.item(), rel=0.1)
            assert row.error == pytest.approx(math.sqrt(max(row.bias2, 0) + row.noise / 4))
            assert row.relative_error == pytest.approx(row.error / math.sqrt(row.gradient2))
    with pytest.raises(
        ValueError, match=r"SAEs of shares \[0.25, 1.0\] of a run, but a sparsity for \[0.25\]"
    ):
        on_activations.gradients_along(
            samples(100), saes, {0.25: 0.0}, widths, latents=6, batch_size=10, batches=2
        )
    with pytest.raises(ValueError, match="averaged is a number of batches above 0, got 0"):
        on_activations.along_run(measured, reference=0.05, averaged=0)


def snapshots(
    slopes: dict[float, float], widths: np.ndarray, signal: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """Measurements of a run whose bias is slope·ε in each of 30 latents and whose noise of one
    batch is 0.01/ε."""
    rng = np.random.default_rng(seed)
    tables = []
    for share, slope in slopes.items():
        b, width, latent = (
            grid.ravel()
            for grid in np.meshgrid(np.arange(40), widths, np.arange(30), indexing="ij")
        )
        ste = signal + slope * width + rng.normal(0, 0.1 / np.sqrt(width))
        tables.append(
            pd.DataFrame(
                {
                    "run_share": share,
                    "batch": b,
                    "bandwidth": width,
                    "latent": latent,
                    "ste": ste,
                    "difference": signal + rng.normal(0, 0.01, len(b)),
                    "share": width,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("averaged", [1, 8])
def test_best_bandwidth_along_a_run_of_known_bias(averaged):
    """s²ε² + 0.01/(Nε) is least at ε³ = 0.01/(2s²N): as the bias grows the window must narrow."""
    slopes, widths = {0.2: 0.25, 0.6: 0.5, 1.0: 2.0}, np.geomspace(0.01, 2, 16)
    best = on_activations.best_along(snapshots(slopes, widths), widths[0], averaged).set_index(
        "share"
    )
    expected = {
        share: (0.01 / (2 * slope**2 * averaged)) ** (1 / 3) for share, slope in slopes.items()
    }
    for share, width in expected.items():
        row = best.loc[share]
        assert (
            row.best == pytest.approx(width, rel=0.2)
            and row.best_low < row.best < row.best_high
            and not row.edge
        )
        assert row.least == pytest.approx(
            math.sqrt((slopes[share] * width) ** 2 + 0.01 / width / averaged), rel=0.05
        )
    assert best.best_high[1.0] < best.best_low[0.2]


def test_intervals_of_the_best_bandwidth_hold_it():
    """At 95 %, less what the parabola is off by on a coarse grid: 15 of 20 draws is far below what
    comes, 5 of 20 above."""
    widths, expected = np.geomspace(0.02, 2, 12), (0.01 / (2 * 0.5**2)) ** (1 / 3)
    found = [
        on_activations.best_along(snapshots({1.0: 0.5}, widths, seed=seed), widths[0]).iloc[0]
        for seed in range(20)
    ]
    assert sum(row.best_low < expected < row.best_high for row in found) >= 15
    assert sum(row.best_low < 2 * expected < row.best_high for row in found) <= 5


def test_best_bandwidth_on_the_edge_of_the_grid_is_a_bound():
    widths = np.geomspace(0.1, 1, 6)
    best = on_activations.best_along(snapshots({0.1: 0.0, 0.9: 20.0}, widths), widths[0])
    assert best.edge.all() and np.allclose(best.best, widths[[-1, 0]])
    assert best.best_low.isna().tolist() == [False, True] and best.best_high.isna().tolist() == [
        True,
        False,
    ]


def test_errors_relative_to_no_gradient_are_not_given():
    widths = np.array([0.1, 0.4])
    found = on_activations.along_run(snapshots({0.5: 0.5}, widths, signal=0.0), 0.1)
    assert found.relative_error.isna().all() and (found.gradient2_low <= 0).all()
    assert np.allclose(found.error, np.sqrt(0.25 * widths**2 + 0.01 / widths), rtol=0.05)
