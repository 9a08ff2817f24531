"""Bias and noise of the straight-through gradient on real activations, and along a training run.

Notable here:
- no closed form is known: the straight-through gradient is held against finite differences of the
  loss on the same batches.
- the squared length of a measured mean vector would count its noise as signal.
  `repeats.squared_length` does not, so no bias measures as zero on average, and may come out
  below it.
- near an optimum the gradient is near zero, and errors relative to it say nothing: along a run they
  are absolute."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.estimators import jump_relu, step
from jumprelu.sae import SAE, check_autoencoder

from ..rails.repeats import jackknife, leave_one_out, mean_interval, squared_length
from .bandwidth import least_point
from .theorem import Coder, worth_terms

if TYPE_CHECKING:
    from jumprelu.activations import Activations


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
        z, on, without, norms = worth_terms(coder, x)
        # ∂‖x − x̂‖²/∂f_i, the same for every bandwidth
        to_f = -2 * (without - z * on * norms)[:, latents]
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
            f"{batches} batches of {batch_size} and one to choose latents by need "
            f"{(batches + 1) * batch_size} "
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
            f"no measurement at bandwidth {reference}, only at "
            f"{sorted(measured.bandwidth.unique())}: "
            "choose one of these as the reference"
        )
    gradient = _by_batch(measured, reference, "difference")
    if not gradient.any():
        raise ValueError(
            f"at bandwidth {reference} no pre-activation was in the window of any measured latent: "
            "choose a wider "
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
            f"SAEs of shares {sorted(sae_by_share)} of a run, but a sparsity for "
            f"{sorted(sparsity_by_share)}: "
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
        # [batches, bandwidths, latents]
        estimates = np.stack([_by_batch(one, width, "ste") for width in widths], axis=1)

        log_best = functools.partial(_log_best, widths=widths, averaged=averaged)
        found = jackknife(leave_one_out(log_best, estimates, gradient))
        _, least, at = _log_least(estimates, gradient, widths, averaged)
        low = math.nan if at == 0 else math.exp(found.low)
        high = math.nan if at == len(widths) - 1 else math.exp(found.high)
        rows.append(
            (share, math.exp(found.mean), low, high, at in (0, len(widths) - 1), math.exp(least))
        )
    return pd.DataFrame(rows, columns=["share", "best", "best_low", "best_high", "edge", "least"])


def _log_best(
    estimates: np.ndarray, gradient: np.ndarray, widths: np.ndarray, averaged: float
) -> float:
    """The first of what :func:`_log_least` returns."""
    return _log_least(estimates, gradient, widths, averaged)[0]


def _log_least(
    estimates: np.ndarray, gradient: np.ndarray, widths: np.ndarray, averaged: float
) -> tuple[float, float, int]:
    """The least error over bandwidths: log of the bandwidth, log of the error, index of the least
    bandwidth of the grid.

    estimates: [batches, bandwidths, latents]; gradient: [batches, latents]; widths: [bandwidths].
    """
    by_width = np.moveaxis(estimates - gradient[:, None], 1, 0)
    bias2 = np.array([squared_length(errors) for errors in by_width]) / gradient.shape[1]
    noise = estimates.var(0, ddof=1).mean(-1)
    return least_point(np.log(widths), 0.5 * np.log(_squared_error(bias2, noise, averaged)))


def _squared_error(
    bias2: float | np.ndarray, noise: float | np.ndarray, averaged: float
) -> float | np.ndarray:
    if not averaged > 0:
        raise ValueError(f"averaged is a number of batches above 0, got {averaged}")
    return np.maximum(bias2, 0) + noise / averaged
