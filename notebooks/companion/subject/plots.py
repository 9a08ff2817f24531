"""Figures of notebook 00: the subject model."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..rails.figures import use_style
from ..rails.looks import look_of

use_style()

METHOD_LOOKS = {
    "language model": ("#3f90da", ""),
    "n-gram": ("#ffa90e", "//"),
    "compressor": ("#94a4a2", ".."),
}
SITE_LOOKS = {"resid_post": "3f90da - o", "mlp_out": "bd1f01 -- s", "attn_out": "832db6 -. ^"}


def lm_training(data: pd.DataFrame) -> Figure:
    """The language model's training log.

    Paper: none; a check of the embedded model.

    data: columns tokens, train_loss and heldout_loss (nats per token, NaN where not measured),
    lr_factor; no rows for a model that came without a log.
    """
    fig, (loss, rate) = plt.subplots(1, 2, figsize=(7.6, 3.0), width_ratios=(2, 1))
    loss.set(
        xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token)", title="loss"
    )
    rate.set(
        xlabel="training tokens (millions)", ylabel="learning rate / its maximum", title="schedule"
    )
    if data.empty:
        loss.text(
            0.5,
            0.5,
            "this model came without a training log",
            ha="center",
            va="center",
            transform=loss.transAxes,
        )
        return fig
    held = data[data.heldout_loss.notna()]
    loss.plot(
        data.tokens / 1e6,
        data.train_loss,
        color="#3f90da",
        linewidth=1,
        label="training rows, each seen once",
    )
    loss.plot(
        held.tokens / 1e6,
        held.heldout_loss,
        color="#bd1f01",
        linestyle="--",
        marker="o",
        markersize=2.5,
        label="validation documents",
    )
    # the first steps would hide the rest
    late = data[data.tokens > 0.05 * data.tokens.max()]
    loss.set_ylim(0.95 * late.train_loss.min(), 1.05 * late.train_loss.max())
    loss.legend()
    rate.plot(data.tokens / 1e6, data.lr_factor, color="#717581")
    rate.set_ylim(0, 1.05)
    return fig


def bits_per_byte(data: pd.DataFrame) -> Figure:
    """Held-out bits per byte of the embedded model, of compressors and of n-grams.

    Paper: none; a check of the embedded model.

    Bits per byte of each method on the same bytes.

    data: columns method, kind, bits_per_byte, low, high (95 %); drawn from the bottom up.
    """
    fig, ax = plt.subplots(figsize=(6.4, 0.45 * len(data) + 0.9))
    for kind, (color, hatch) in METHOD_LOOKS.items():
        one = data[data.kind == kind]
        ax.barh(
            one.index, one.bits_per_byte, color=color, hatch=hatch, edgecolor="white", label=kind
        )
    ax.errorbar(
        data.bits_per_byte,
        data.index,
        xerr=[data.bits_per_byte - data.low, data.high - data.bits_per_byte],
        fmt="none",
        ecolor="black",
        elinewidth=1.2,
        capsize=3,
    )
    for y, row in data.iterrows():
        ax.text(row.high, y, f"  {row.bits_per_byte:.2f}", va="center")
    ax.set_yticks(data.index, data.method)
    ax.set(
        xlabel="bits per byte of held-out text (95 % interval over groups of documents)",
        xlim=(0, 1.12 * data.high.max()),
    )
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, 1.14), ncols=3)
    return fig


def induction(data: pd.DataFrame) -> Figure:
    """Loss along random sequences that are repeated.

    Paper: none; a check of the embedded model.

    data: columns position, copy (1 or 2), loss, low, high (nats per token, 95 %).
    """
    fig, ax = plt.subplots()
    for (copy, one), look in zip(data.groupby("copy"), ("3f90da - o", "bd1f01 -- s"), strict=True):
        look = look_of(look) | {"marker": ""}
        ax.plot(one.position, one.loss, **look, label=("first time", "second time")[copy - 1])
        ax.fill_between(
            one.position, one.low, one.high, color=look["color"], alpha=0.2, linewidth=0
        )
    ax.axvline(len(data) / 2 + 0.5, color="#717581", linewidth=0.8)
    ax.set(
        xlabel="position in the row (BOS is 0)",
        ylabel="cross-entropy (nats per token)",
        ylim=(0, None),
    )
    ax.legend(title="random tokens, shown for the")
    return fig


def sites(data: pd.DataFrame) -> Figure:
    """Scale of the activations at the three sites, by layer.

    Paper: none; a check of the embedded model.

    data: columns site, layer, mean_square (E‖x‖²), mean_share (‖E x‖²/E‖x‖²), first_ratio (norm
    at the first position over that at the others).
    """
    labels = {
        "mean_square": "E‖x‖²",
        "mean_share": "‖E x‖² / E‖x‖²",
        "first_ratio": "norm at BOS / norm elsewhere",
    }
    fig, axes = plt.subplots(1, 3, figsize=(9.0, 3.0))
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for site, look in SITE_LOOKS.items():
            one = data[data.site == site]
            ax.plot(one.layer, one[column], **look_of(look), label=site)
        ax.set(xlabel="layer", ylabel=label)
        ax.locator_params(axis="x", integer=True)
    axes[0].set(yscale="log", title="scale")
    axes[1].set(ylim=(0, 1), title="share of the mean")
    axes[2].set(ylim=(0, None), title="first position")
    axes[0].legend()
    return fig
