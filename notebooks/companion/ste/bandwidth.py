"""What the bandwidth costs: bias and noise of the straight-through gradient, on Gaussian inputs and
on real activations.

Notable here:
- on Gaussian inputs the bias is exact (theorem.py) and only the variance is sampled. On real
  activations no closed form is known: the straight-through gradient is held against finite
  differences of the loss on the same batches.
- the squared length of a measured mean vector would count its noise as signal.
  `intervals.squared_length` does not, so no bias measures as zero on average, and may come out
  below it.
- near an optimum the gradient is near zero, and errors relative to it say nothing: along a run they
  are absolute.
- kernels are compared at an equal standard deviation, not only at an equal ε, which means different
  amounts of smoothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.estimators import KERNELS, REACH, jump_relu, kernel, step
from jumprelu.intervals import jackknife, leave_one_out, mean_interval, squared_length
from jumprelu.sae import SAE, check_autoencoder

from .theorem import (
    Coder,
    Gaussian,
    exact_gradient,
    expected_estimate,
    influence,
    parts,
    ste_gradients,
)

if TYPE_CHECKING:
    from jumprelu.activations import Activations

KERNEL_SD = {"rectangle": 12**-0.5, "triangular": 6**-0.5, "gaussian": 1.0, "epanechnikov": 5**-0.5}
"""Standard deviation of K(u) as a density of u: kernels are comparable at equal `bandwidth ·
KERNEL_SD`."""

# ---- bias and variance over bandwidth


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
        moments = torch.zeros(
            len(settings), 2, 2, len(gradient), dtype=torch.float64
        )  # setting, exact?, power
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
            best, least, at = _least_point(width, error)
            if at in (0, len(width) - 1):
                raise ValueError(
                    f"the best bandwidth of {estimator} for batches of {batch_size} is on the edge of the grid, "
                    f"{math.exp(width[at]):.3g}: extend kernel_sds on that side"
                )
            rows.append((estimator, repeat, batch_size, math.exp(best), math.exp(least)))
    return pd.DataFrame(rows, columns=["estimator", "repeat", "batch_size", "bandwidth", "error"])


def _least_point(x: np.ndarray, y: np.ndarray) -> tuple[float, float, int]:
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


# ---- the same on real activations


def normalised(sae: SAE) -> Coder:
    """An SAE of this package in the units of its training, where E‖x‖² = 1: x there is raw x /
    `sae.input_scale`.

    On the CPU, where the stored activations are read to and where checks are made.
    """
    check_autoencoder(sae)
    scale = float(sae.input_scale)
    W_enc, b_enc, W_dec, b_dec, threshold = (
        getattr(sae, name).detach().cpu()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    return Coder(W_enc, b_enc / scale, W_dec, b_dec / scale, threshold / scale)


def busiest_latents(coder: Coder, x: torch.Tensor, width: float, count: int) -> torch.Tensor:
    """The `count` latents with most rows of x [n, d_in] within width/2 of their threshold: indices,
    increasing."""
    near = ((x @ coder.W_enc + coder.b_enc - coder.threshold).abs() < width / 2).sum(0)
    return near.topk(min(count, len(near))).indices.sort().values


def measure_gradients(
    coder: Coder,
    batches: Iterable[torch.Tensor],
    sparsity: float,
    bandwidths: Iterable[float],
    latents: torch.Tensor,
    kernel: str = "rectangle",
) -> pd.DataFrame:
    """Straight-through gradients, as training computes them, beside finite differences of the same
    batches' loss.

    batches: each [n, d_in], in the coder's units. Differences use h = ε/2, so that both see the
    same window. One row per batch, bandwidth and latent: columns batch, bandwidth, latent, ste,
    difference, share (of rows in the window).
    """
    bandwidths = list(bandwidths)
    tables = []
    for b, x in enumerate(tqdm(batches, desc="gradients")):
        z, on, without, norms = parts(coder, x)
        to_f = (
            -2 * (without - z * on * norms)[:, latents]
        )  # ∂‖x − x̂‖²/∂f_i, the same for every bandwidth
        z, without, norms, theta = (
            z[:, latents],
            without[:, latents],
            norms[latents],
            coder.threshold[latents],
        )
        for width in bandwidths:
            threshold = theta.clone().requires_grad_()
            f, l0 = jump_relu(z, threshold, width, kernel), step(z, threshold, width, kernel)
            gradients = torch.autograd.grad(
                [f, l0], threshold, [to_f, torch.full_like(l0, sparsity)]
            )[0]
            crossed = (z > theta - width / 2) & (z <= theta + width / 2)
            differences = crossed * (2 * z * without - z**2 * norms - sparsity) / width
            tables.append(
                pd.DataFrame(
                    {
                        "batch": b,
                        "bandwidth": width,
                        "latent": latents.numpy(),
                        "ste": (gradients / len(x)).double().numpy(),
                        "difference": differences.double().mean(0).numpy(),
                        "share": crossed.double().mean(0).numpy(),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def gradients_on(
    acts: Activations | torch.Tensor,
    sae: SAE,
    sparsity: float,
    bandwidths: Iterable[float],
    latents: int,
    batch_size: int,
    batches: int,
    seed: int = 0,
) -> pd.DataFrame:
    """:func:`measure_gradients` of an SAE's busiest latents on `batches` shuffled batches of raw
    activations.

    acts: an activation store, or a tensor [n, d_in]; sparsity and bandwidths in units of E‖x‖² = 1.
    The latents are chosen by their traffic at the middle bandwidth on one further batch, so that
    choosing biases nothing. Raises ValueError when there are fewer rows than batches need, because
    a row must not come twice.
    """
    bandwidths = list(bandwidths)
    if len(acts) < (batches + 1) * batch_size:
        raise ValueError(
            f"{batches} batches of {batch_size} and one to choose latents by need {(batches + 1) * batch_size} "
            f"activations, got {len(acts)}: harvest more, or ask for fewer or smaller batches"
        )
    if isinstance(acts, torch.Tensor):
        order = torch.randperm(len(acts), generator=torch.Generator().manual_seed(seed))
        stream = iter(acts[order].split(batch_size))
    else:
        stream = acts.batches(batch_size, seed)
    coder = normalised(sae)
    chosen = busiest_latents(
        coder, next(stream) / sae.input_scale, sorted(bandwidths)[len(bandwidths) // 2], latents
    )
    scaled = (x / sae.input_scale for x in itertools.islice(stream, batches))
    return measure_gradients(coder, scaled, sparsity, bandwidths, chosen)


def _by_batch(measured: pd.DataFrame, bandwidth: float, column: str) -> np.ndarray:
    """[batches, latents]."""
    return (
        measured[measured.bandwidth == bandwidth]
        .pivot(index="batch", columns="latent", values=column)
        .to_numpy()
    )


def agreement(measured: pd.DataFrame) -> pd.DataFrame:
    """Per bandwidth and latent of :func:`measure_gradients`: columns bandwidth, latent, quantity
    ("ste", "difference", "gap" = ste − difference on the same batches), mean, low, high (95 %
    together over the latents of a bandwidth)."""
    tables = []
    for width in measured.bandwidth.unique():
        ste, difference = (_by_batch(measured, width, column) for column in ("ste", "difference"))
        latents = np.sort(measured.latent.unique())
        for quantity, samples in (
            ("ste", ste),
            ("difference", difference),
            ("gap", ste - difference),
        ):
            found = mean_interval(samples, comparisons=len(latents))
            tables.append(
                pd.DataFrame(
                    {"bandwidth": width, "latent": latents, "quantity": quantity, **found._asdict()}
                )
            )
    return pd.concat(tables, ignore_index=True)


def _reference_gradient(measured: pd.DataFrame, reference: float) -> np.ndarray:
    """Finite differences at bandwidth `reference`, [batches, latents]. ValueError if not measured,
    or all zero."""
    if reference not in set(measured.bandwidth):
        raise ValueError(
            f"no measurement at bandwidth {reference}, only at {sorted(measured.bandwidth.unique())}: "
            "choose one of these as the reference"
        )
    gradient = _by_batch(measured, reference, "difference")
    if not gradient.any():
        raise ValueError(
            f"at bandwidth {reference} no pre-activation was in the window of any measured latent: choose a wider "
            "reference, more batches or larger ones"
        )
    return gradient


def measured_errors(
    measured: pd.DataFrame, reference: float, relative: bool = True
) -> pd.DataFrame:
    """Bias and noise of the straight-through gradient over all measured latents, relative to the
    gradient's length.

    The gradient is the finite difference at bandwidth `reference` (h = reference/2). Rows: quantity
    "bias" (to that reference), "gap" (to the difference over the *same* window), each squared,
    unbiased and with a jackknife interval over batches, and "noise" (squared standard deviation of
    one batch). Columns: bandwidth, quantity, mean, low, high, share. With relative=False they are
    means over latents in (loss per unit of θ)². Raises ValueError for a reference that was not
    measured.
    """
    gradient = _reference_gradient(measured, reference)
    unit = squared_length if relative else (lambda g: g.shape[1])
    rows = []
    for width in measured.bandwidth.unique():
        ste, difference = (_by_batch(measured, width, column) for column in ("ste", "difference"))
        share = measured[measured.bandwidth == width].share.mean()
        statistics = {
            "bias": (lambda v, g: squared_length(v) / unit(g), ste - gradient),
            "gap": (lambda v, g: squared_length(v) / unit(g), ste - difference),
            "noise": (lambda v, g: v.var(0, ddof=1).sum() / unit(g), ste),
        }
        for quantity, (statistic, samples) in statistics.items():
            rows.append(
                (
                    width,
                    quantity,
                    *(float(v) for v in jackknife(leave_one_out(statistic, samples, gradient))),
                    share,
                )
            )
    return pd.DataFrame(rows, columns=["bandwidth", "quantity", "mean", "low", "high", "share"])


# ---- along a training run


def gradients_along(
    acts: Activations | torch.Tensor,
    sae_by_share: dict[float, SAE],
    sparsity_by_share: dict[float, float],
    bandwidths: Iterable[float],
    latents: int,
    batch_size: int,
    batches: int,
    seed: int = 0,
) -> pd.DataFrame:
    """:func:`gradients_on` for snapshots of one run, on the same batches: its columns after
    run_share, increasing.

    sae_by_share: share of the run → the SAE there, as `TrainConfig.stop_after` gives it;
    sparsity_by_share: λ there, as :func:`jumprelu.recipe.sparsity_at` gives it. Each snapshot is
    measured at its own busiest latents, those that training moves then. Raises ValueError for
    shares that only one of the two has, and what `gradients_on` does.
    """
    bandwidths = list(bandwidths)
    if not sae_by_share or set(sae_by_share) != set(sparsity_by_share):
        raise ValueError(
            f"SAEs of shares {sorted(sae_by_share)} of a run, but a sparsity for {sorted(sparsity_by_share)}: "
            "give both for the same shares, and at least one"
        )
    tables = []
    for share in sorted(sae_by_share):
        one = gradients_on(
            acts,
            sae_by_share[share],
            sparsity_by_share[share],
            bandwidths,
            latents,
            batch_size,
            batches,
            seed,
        )
        one.insert(0, "run_share", share)
        tables.append(one)
    return pd.concat(tables, ignore_index=True)


def along_run(measured: pd.DataFrame, reference: float, averaged: float = 1.0) -> pd.DataFrame:
    """Bias, noise and error of the straight-through gradient at each share of a run and bandwidth,
    in absolute units.

    measured: of :func:`gradients_along`; the gradient is the finite difference at bandwidth
    `reference`. Columns: share (of the run), bandwidth, bias2 and gradient2 (squares, unbiased,
    each with _low and _high, 95 %), noise (variance of one batch), error = √(max(bias2, 0) +
    noise/averaged), relative_error (over the gradient's length; NaN where that cannot be told from
    0), share_in_window, averaged. All are means over latents: bias2, gradient2 and noise in (loss
    per unit of θ)².

    averaged: batches whose gradients a parameter feels as one. Adam with β₁ = 0 averages none by
    itself, hence 1; but what moves by lr a step averages over about as many steps as it needs to
    come where the gradient is another one.
    """
    rows = []
    for share, one in measured.groupby("run_share"):
        gradient = _reference_gradient(one, reference)
        length = jackknife(leave_one_out(lambda g: squared_length(g) / g.shape[1], gradient))
        for width, errors in measured_errors(one, reference, relative=False).groupby("bandwidth"):
            bias, noise = (errors[errors.quantity == name].iloc[0] for name in ("bias", "noise"))
            error = math.sqrt(_squared_error(bias["mean"], noise["mean"], averaged))
            relative = error / math.sqrt(length.mean) if length.low > 0 else math.nan
            rows.append(
                (
                    share,
                    width,
                    *bias[["mean", "low", "high"]],
                    noise["mean"],
                    *length,
                    error,
                    relative,
                    bias.share,
                    averaged,
                )
            )
    return pd.DataFrame(
        rows,
        columns=[
            "share",
            "bandwidth",
            "bias2",
            "bias2_low",
            "bias2_high",
            "noise",
            "gradient2",
            "gradient2_low",
            "gradient2_high",
            "error",
            "relative_error",
            "share_in_window",
            "averaged",
        ],
    )


def best_along(measured: pd.DataFrame, reference: float, averaged: float = 1.0) -> pd.DataFrame:
    """The bandwidth of least error at each share of a run: arguments as for :func:`along_run`,
    whose error it is.

    The least point of the grid, refined as in :func:`best_bandwidths`, with a jackknife interval
    over batches of its logarithm. Columns: share, best, best_low, best_high (95 %), edge, least
    (the error there, loss per unit of θ). On the edge of the grid (`edge` is True) `best` is only a
    bound, and the end of the interval on that side NaN: unknown.
    """
    rows = []
    for share, one in measured.groupby("run_share"):
        gradient = _reference_gradient(one, reference)
        widths = np.sort(one.bandwidth.unique())
        estimates = np.stack(
            [_by_batch(one, width, "ste") for width in widths], axis=1
        )  # [batches, bandwidths, latents]

        def log_best(
            estimates: np.ndarray, gradient: np.ndarray, widths: np.ndarray = widths
        ) -> tuple[float, float, int]:
            bias2 = (
                np.array(
                    [squared_length(v) for v in np.moveaxis(estimates - gradient[:, None], 1, 0)]
                )
                / gradient.shape[1]
            )
            noise = estimates.var(0, ddof=1).mean(-1)
            return _least_point(
                np.log(widths), 0.5 * np.log(_squared_error(bias2, noise, averaged))
            )

        found = jackknife(
            leave_one_out(lambda *samples: log_best(*samples)[0], estimates, gradient)
        )
        _, least, at = log_best(estimates, gradient)
        low = math.nan if at == 0 else math.exp(found.low)
        high = math.nan if at == len(widths) - 1 else math.exp(found.high)
        rows.append(
            (share, math.exp(found.mean), low, high, at in (0, len(widths) - 1), math.exp(least))
        )
    return pd.DataFrame(rows, columns=["share", "best", "best_low", "best_high", "edge", "least"])


def _squared_error(
    bias2: float | np.ndarray, noise: float | np.ndarray, averaged: float
) -> float | np.ndarray:
    if not averaged > 0:
        raise ValueError(f"averaged is a number of batches above 0, got {averaged}")
    return np.maximum(bias2, 0) + noise / averaged
