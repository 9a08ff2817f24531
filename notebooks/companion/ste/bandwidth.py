"""What the bandwidth costs on Gaussian inputs: bias and noise of the straight-through gradient.

Notable here:
- the bias is exact (theorem.py) and only the variance is sampled. on_activations.py does the same
  on real activations.
- kernels are compared at an equal standard deviation, not only at an equal ε, which means different
  amounts of smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.estimators import KERNELS, REACH, kernel

from ..rails.repeats import mean_interval
from .theorem import Coder, Gaussian, exact_gradient, expected_estimate, influence, ste_gradients

if TYPE_CHECKING:
    pass

KERNEL_SD = {"rectangle": 12**-0.5, "triangular": 6**-0.5, "gaussian": 1.0, "epanechnikov": 5**-0.5}
"""Standard deviation of K(u) as a density of u: kernels are comparable at equal `bandwidth ·
KERNEL_SD`."""


def bandwidth_sweep(
    coder: Coder,
    inputs: Gaussian,
    sparsity: float,
    kernel_sds: Iterable[float],
    n: int,
    repeats: int,
    kernels: Iterable[str] = KERNELS,
    seed: int = 0,
) -> pd.DataFrame:
    """Bias (exact), variance and window share of both estimators over all latents, on `repeats` ×
    `n` samples.

    kernel_sds: standard deviations of the scaled kernel, in the units of x; the bandwidth is that
    over `KERNEL_SD`. Columns: estimator ("straight-through", by autograd; "exact I", the kernel
    estimate), kernel, kernel_sd, bandwidth, repeat, bias (‖E[estimate] − gradient‖ / ‖gradient‖),
    variance (of one sample: summed over latents, over ‖gradient‖²), share (of pre-activations
    within the kernel's reach; within two sd for the Gaussian). The relative error of a batch of N
    samples is sqrt(bias² + variance/N).
    """
    kernel_sds = list(kernel_sds)
    generator = torch.Generator().manual_seed(seed)
    gradient = exact_gradient(coder, inputs, sparsity)
    labels = {False: "straight-through", True: "exact I"}
    settings = [(name, sd, sd / KERNEL_SD[name]) for name in kernels for sd in kernel_sds]
    bias = [
        [
            (expected_estimate(coder, inputs, sparsity, width, name, exact) - gradient).norm()
            / gradient.norm()
            for exact in labels
        ]
        for name, _, width in settings
    ]
    rows = []
    for repeat in tqdm(range(repeats), desc="bandwidths"):
        # [settings, by autograd or exact, power 1 or 2, latents]
        moments = torch.zeros(len(settings), 2, 2, len(gradient), dtype=torch.float64)
        inside = torch.zeros(len(settings), dtype=torch.float64)
        for x in inputs.batches(n, generator):
            distance = x @ coder.W_enc + coder.b_enc - coder.threshold
            worth = influence(coder, x) - sparsity
            for k, (name, sd, width) in enumerate(settings):
                estimates = (
                    ste_gradients(coder, x, sparsity, width, name),
                    worth * kernel(distance / width, name) / width,
                )
                for exact, estimate in enumerate(estimates):
                    moments[k, exact, 0] += estimate.sum(0)
                    moments[k, exact, 1] += estimate.square().sum(0)
                reach = 2 * sd if name == "gaussian" else REACH[name] * width
                inside[k] += (distance.abs() < reach).double().mean(1).sum()
        variance = (moments[:, :, 1] / n - (moments[:, :, 0] / n).square()).sum(
            -1
        ) / gradient.square().sum()
        for k, (name, sd, width) in enumerate(settings):
            for exact, label in labels.items():
                numbers = bias[k][exact], variance[k, int(exact)], inside[k] / n
                rows.append((label, name, sd, width, repeat, *(v.item() for v in numbers)))
    return pd.DataFrame(
        rows,
        columns=[
            "estimator",
            "kernel",
            "kernel_sd",
            "bandwidth",
            "repeat",
            "bias",
            "variance",
            "share",
        ],
    )


def error_curves(sweep: pd.DataFrame, batch_sizes: Iterable[int]) -> pd.DataFrame:
    """Relative error sqrt(bias² + variance/N) of a gradient from N samples, with its parts, over a
    bandwidth sweep.

    Columns: estimator, kernel, kernel_sd, bandwidth, batch_size, bias, noise (its standard
    deviation), error with low and high (95 %, over repeats), share.
    """
    keys = ["estimator", "kernel", "kernel_sd", "bandwidth"]
    rows = []
    for key, group in sweep.groupby(keys, sort=False):
        bias, share, variance = (
            group.bias.mean(),
            group.share.mean(),
            mean_interval(group.variance.to_numpy()),
        )
        for size in batch_sizes:
            errors = (math.sqrt(bias**2 + max(v, 0.0) / size) for v in variance)
            rows.append((*key, size, bias, math.sqrt(variance.mean / size), *errors, share))
    return pd.DataFrame(
        rows, columns=[*keys, "batch_size", "bias", "noise", "error", "low", "high", "share"]
    )


def batch_errors(
    coder: Coder,
    inputs: Gaussian,
    sparsity: float,
    bandwidths: Iterable[float],
    batch_size: int,
    batches: int,
    seed: int = 0,
) -> pd.DataFrame:
    """The error that :func:`error_curves` predicts, met with: straight-through gradients of whole
    batches against the closed form, root mean square over `batches`. Columns: bandwidth,
    batch_size, mean, low, high (95 %)."""
    bandwidths = list(bandwidths)
    generator = torch.Generator().manual_seed(seed)
    gradient = exact_gradient(coder, inputs, sparsity)
    errors = torch.stack(
        [
            torch.stack([ste_gradients(coder, x, sparsity, width).mean(0) for width in bandwidths])
            - gradient
            for x in inputs.batches(batch_size * batches, generator, batch_size)
        ]
    )
    relative = mean_interval(errors.square().sum(2) / gradient.square().sum())
    columns = zip(bandwidths, *(np.sqrt(np.maximum(v, 0)) for v in relative), strict=True)
    return pd.DataFrame(
        [(width, batch_size, *values) for width, *values in columns],
        columns=["bandwidth", "batch_size", "mean", "low", "high"],
    )


def best_bandwidths(
    sweep: pd.DataFrame, batch_sizes: Iterable[int], kernel_name: str = "rectangle"
) -> pd.DataFrame:
    """The bandwidth of least error for each batch size, in each repeat of a
    :func:`bandwidth_sweep`.

    The least point of the grid, refined by a parabola in log ε through it and its neighbours.
    Raises ValueError where the least point is on the edge of the grid. Columns: estimator, repeat,
    batch_size, bandwidth, error.
    """
    rows = []
    for (estimator, repeat), group in sweep[sweep.kernel == kernel_name].groupby(
        ["estimator", "repeat"], sort=False
    ):
        group = group.sort_values("bandwidth")
        width = np.log(group.bandwidth.to_numpy())
        for batch_size in batch_sizes:
            error = 0.5 * np.log(
                group.bias.to_numpy() ** 2 + group.variance.to_numpy() / batch_size
            )
            best, least, at = least_point(width, error)
            if at in (0, len(width) - 1):
                raise ValueError(
                    f"the best bandwidth of {estimator} for batches of {batch_size} is on the edge "
                    "of the grid, "
                    f"{math.exp(width[at]):.3g}: extend kernel_sds on that side"
                )
            rows.append((estimator, repeat, batch_size, math.exp(best), math.exp(least)))
    return pd.DataFrame(rows, columns=["estimator", "repeat", "batch_size", "bandwidth", "error"])


def least_point(x: np.ndarray, y: np.ndarray) -> tuple[float, float, int]:
    """The least point of y over increasing x, refined by a parabola through it and its neighbours
    unless it is the first or the last: its x, its y and its index."""
    at = int(y.argmin())
    if at in (0, len(x) - 1):
        return float(x[at]), float(y[at]), at
    a, b, c = np.polyfit(x[at - 1 : at + 2] - x[at], y[at - 1 : at + 2], 2)
    return x[at] - b / (2 * a), c - b**2 / (4 * a), at


def slopes(best: pd.DataFrame) -> pd.DataFrame:
    """d log ε* / d log N in each repeat of :func:`best_bandwidths`, by least squares: columns
    estimator, repeat, value."""
    rows = [
        (*key, np.polyfit(np.log(group.batch_size.astype(float)), np.log(group.bandwidth), 1)[0])
        for key, group in best.groupby(["estimator", "repeat"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["estimator", "repeat", "value"])
