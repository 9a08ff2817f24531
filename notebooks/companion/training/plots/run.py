"""Figures of notebook 02: training one JumpReLU SAE."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from ...rails.figures import use_style
from ...rails.looks import points_and_mean

use_style()


def _seed_curves(ax: plt.Axes, data: pd.DataFrame, y: str, label: str) -> None:
    """`y` over training tokens: one thin curve per seed, and their mean on top."""
    mean = data.groupby("tokens")[y].mean()
    (line,) = ax.plot(mean.index, mean, label=label)
    for _, rows in data.groupby("seed"):
        ax.plot(
            rows.tokens,
            rows[y],
            color=line.get_color(),
            linewidth=0.6,
            alpha=0.5,
            linestyle=line.get_linestyle(),
        )
    ax.set_xlabel("training tokens")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(4))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def training(data: pd.DataFrame) -> Figure:
    """Sparsity, fidelity and thresholds over training.

    Paper: none; the recipe of JumpReLU, section 5.

    Log rows of several seeds: columns seed, tokens, l0, fvu, dead, sparsity, threshold_p05,
    _p50, _p95.
    """
    fig, axes = plt.subplots(1, 5, figsize=(13, 2.8), layout="constrained")
    _seed_curves(axes[0], data, "sparsity", "λ")
    axes[0].set(ylabel="price of one active latent", title="λ")
    for ax, column, title in zip(
        axes[1:], ("l0", "fvu", "dead"), ("L0", "FVU", "dead latents"), strict=False
    ):
        _seed_curves(ax, data, column, "mean of seeds")
        ax.set(ylabel="share" if column == "dead" else title, title=title)
    axes[1].set_ylim(0, data.l0.quantile(0.98) * 1.3)  # the first steps can be far above
    axes[2].set_ylim(0, min(1.2, data.fvu.max() * 1.05))
    axes[3].set_ylim(-0.02, max(0.2, data.dead.max() * 1.2))
    for quantile, label in (
        ("threshold_p95", "95 %"),
        ("threshold_p50", "median"),
        ("threshold_p05", "5 %"),
    ):
        _seed_curves(axes[4], data, quantile, label)
    axes[4].set(ylabel="θ, unit of √E‖x‖²", title="thresholds", ylim=(0, None))
    axes[4].legend()
    return fig


def diagnostics(data: pd.DataFrame) -> Figure:
    """Who trains θ, how far it goes, and what pushes it.

    Paper: none.

    Columns seed, tokens, window_share, window_latents, threshold_travel, reconstruction_push,
    sparsity_push.
    """
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    _seed_curves(axes[0], data, "window_share", "pre-activations")
    _seed_curves(axes[0], data, "window_latents", "latents with any")
    axes[0].set(yscale="log", ylabel="share within reach of θ", title="who trains θ")
    _seed_curves(axes[1], data, "threshold_travel", "travel")
    axes[1].set(ylabel="mean |log θ − log θ_init|, nats", title="how far θ went")
    _seed_curves(axes[2], data[data.sparsity > 0], "reconstruction_push", "reconstruction")
    _seed_curves(axes[2], data[data.sparsity > 0], "sparsity_push", "sparsity")
    axes[2].set(yscale="log", ylabel="mean |gradient| of θ", title="what pushes θ")
    axes[0].legend()
    axes[2].legend()
    return fig


def thresholds(data: pd.DataFrame) -> Figure:
    """Thresholds after training, and how often their latents fire.

    Paper: none.

    One row a latent: threshold (unit of √E‖x‖²), frequency (share of tokens), initial (θ_init).
    """
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    bins = np.linspace(0.95 * data.threshold.min(), 1.05 * data.threshold.max(), 40)
    axes[0].hist(data.threshold, bins=bins)
    axes[0].axvline(data.initial.iloc[0], color="k", linestyle="--", label="θ at the start")
    axes[0].set(
        xlim=(0, None),
        xlabel="θ, unit of √E‖x‖²",
        ylabel="latents",
        title="thresholds after training",
    )
    axes[0].legend()
    alive = data[data.frequency > 0]
    axes[1].scatter(alive.frequency, alive.threshold, s=5, alpha=0.4, linewidths=0)
    axes[1].set(
        xscale="log",
        xlabel="share of tokens on which it fires",
        ylabel="θ, unit of √E‖x‖²",
        title="θ and frequency",
        ylim=(0, None),
    )
    return fig


def l0_by_token(data: pd.DataFrame) -> Figure:
    """L0 of each token, JumpReLU and TopK.

    Paper: none.

    Columns architecture, l0 (active latents of a token), share (of tokens).
    """
    fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, rows in data.groupby("architecture", sort=False):
        ax.plot(rows.l0, rows.share, label=name, drawstyle="steps-mid")
    ax.set(
        xlabel="active latents of a token",
        ylabel="share of tokens",
        xlim=(0, None),
        title="L0 is not the same for every token",
    )
    ax.legend()
    return fig


def shrinkage(data: pd.DataFrame) -> Figure:
    """Shrinkage of ReLU with L1 and of JumpReLU with L0.

    Paper: none; JumpReLU argues it in words.

    One row a run: architecture, l0, fvu, norm_ratio (Σ x·x̂ / Σ‖x̂‖², about the mean).
    """
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained")
    for ax, column, label in zip(
        axes,
        ("norm_ratio", "fvu", "l0"),
        ("Σ x·x̂ / Σ ‖x̂‖²  (1: not shrunk)", "FVU", "L0"),
        strict=True,
    ):
        points_and_mean(ax, data.architecture, data[column])
        ax.set_ylabel(label)
    axes[0].axhline(1, color="0.4", linewidth=0.8)
    axes[0].set_title("shrinkage")
    return fig
