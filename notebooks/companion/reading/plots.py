"""Figures of notebook 09: how well latents can be explained, and what they do."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..rails.figures import use_style
from ..rails.looks import architecture_look, error_bars

use_style()

GREY = "#717581"
SCORES = {
    "correlation": ("correlation", 0.0),
    "detection": ("detection, balanced accuracy", 0.5),
    "fuzzing": ("fuzzing, balanced accuracy", 0.5),
}
"""Score → (label, what chance gives)."""
POINTS = {
    0: {"label": "sparser", "color": "#3f90da", "marker": "o"},
    1: {"label": "denser", "color": "#bd1f01", "marker": "s"},
}


def _bars(rows: pd.DataFrame) -> np.ndarray:
    return np.maximum(np.array(error_bars(rows)), 0)


def interp_scores(data: pd.DataFrame) -> Figure:
    """Scores of explanations, by architecture and L0, beside baselines.

    Paper: JumpReLU, Figure 7.

    A row an architecture and L0, or a baseline: columns setting, l0_mean, score, mean, low,
    high.

    Scores of SCORES, filled, and with "shuffled_" before the name, hollow. A rule lies between
    SAEs and baselines.
    """
    rows = list(dict.fromkeys(zip(data.setting, data.l0_mean, strict=True)))
    rows.sort(
        key=lambda row: row[0] in ("random directions", "neurons", "random weights")
    )  # stable
    own = sum(row[0] not in ("random directions", "neurons", "random weights") for row in rows)
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 1.2 + 0.3 * len(rows)), sharey=True)
    at = {row: place for place, row in enumerate(rows)}
    for ax, (score, (label, chance)) in zip(axes, SCORES.items(), strict=True):
        for name, offset, look in (
            (f"shuffled_{score}", 0.16, {"fillstyle": "none", "color": GREY, "marker": "s"}),
            (score, -0.16, {"color": "#832db6", "marker": "o"}),
        ):
            some = data[data.score == name]
            y = [at[row] + offset for row in zip(some.setting, some.l0_mean, strict=True)]
            ax.errorbar(
                some["mean"], y, xerr=_bars(some), linestyle="", capsize=2, markersize=5, **look
            )
        ax.axvline(chance, color="black", linewidth=0.8, linestyle=":")
        ax.axhline(own - 0.5, color=GREY, linewidth=0.8)
        ax.set(xlabel=label)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [f"{name}, L0 {l0:.0f}" for name, l0 in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    handles = [
        Line2D(
            [], [], linestyle="", color="#832db6", marker="o", label="the latent's own explanation"
        ),
        Line2D(
            [], [], linestyle="", color=GREY, marker="s", fillstyle="none", label="another latent's"
        ),
        Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="chance"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    return fig


def interp_bands(data: pd.DataFrame) -> Figure:
    """Scores of explanations by how often latents fire.

    Paper: none; JumpReLU, section 1, says that very frequent latents are less interpretable.

    Scores by band of frequency: columns point, band, range (in words), score, mean, low, high,
    latents.
    """
    names = data.drop_duplicates("band").sort_values("band").range.tolist()
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))
    for ax, score in zip(axes, ("correlation", "detection"), strict=True):
        for point, look in POINTS.items():
            rows = data[(data.point == point) & (data.score == score)].sort_values("band")
            ax.errorbar(
                rows.band + 0.06 * (2 * point - 1),
                rows["mean"],
                yerr=_bars(rows),
                capsize=3,
                elinewidth=0.9,
                linestyle="-" if point else "--",
                fillstyle="full" if point else "none",
                **look,
            )
        ax.set_xticks(range(len(names)), names)
        ax.axhline(SCORES[score][1], color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="tokens on which the latent fires", ylabel=SCORES[score][0])
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def attribution_uniformity(data: pd.DataFrame) -> Figure:
    """How evenly active latents matter (r_L0), by architecture.

    Paper: JumpReLU, Figure 16.

    r_L0 against L0: columns architecture, point, l0, mean, low, high.
    """
    fig, ax = plt.subplots(figsize=(6.0, 3.6))
    for name, rows in data.groupby("architecture", sort=False):
        rows = rows.sort_values("l0")
        ax.errorbar(
            rows.l0,
            rows["mean"],
            yerr=_bars(rows),
            capsize=2,
            elinewidth=0.9,
            label=name,
            **architecture_look(name),
        )
    ax.set(xscale="log", xlabel="L0", ylabel="r_L0, share of the active latents that matter")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return fig


def editing(data: pd.DataFrame) -> Figure:
    """What taking away a few latents changes.

    Paper: JumpReLU, section 5.4 of the ICLR version.

    What taking n latents away does: columns name (architecture), ranking, quantity, n, mean,
    low, high.

    Lines: ranked by attribution, filled; grey: by chance, of all architectures alike.
    """
    labels = {
        "fall": "fall of the answers' log-odds (nats)",
        "changed": "share of first choices changed",
    }
    fig, axes = plt.subplots(1, 2, figsize=(8.8, 3.5))
    for ax, (quantity, label) in zip(axes, labels.items(), strict=True):
        some = data[data.quantity == quantity]
        for _, rows in some[some.ranking == "random"].groupby("name", sort=False):
            ax.plot(rows.n, rows["mean"], color=GREY, linewidth=0.8, linestyle=":")
        for name, rows in some[some.ranking == "attribution"].groupby("name", sort=False):
            ax.errorbar(
                rows.n,
                rows["mean"],
                yerr=_bars(rows),
                capsize=2,
                elinewidth=0.9,
                label=name,
                **architecture_look(name),
            )
        ax.set(xscale="log", xlabel="latents taken away", ylabel=label)
        ax.set_xticks(sorted(some.n.unique()), [f"{n:g}" for n in sorted(some.n.unique())])
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(
        [*handles, Line2D([], [], color=GREY, linestyle=":")],
        [*names, "ranked by chance"],
        loc="outside right center",
    )
    return fig


def absorption(data: pd.DataFrame) -> Figure:
    """Tokens whose general latent is silent.

    Paper: none; Chanin et al. 2024.

    Shares of tokens with a feature, by architecture: columns name, quantity (silent, absorbed),
    mean, low, high.
    """
    labels = {"silent": "all main latents are silent", "absorbed": "another latent carries it"}
    names = list(dict.fromkeys(data["name"]))
    fig, ax = plt.subplots(figsize=(6.4, 1.2 + 0.36 * len(names)))
    for offset, (quantity, label), look in zip(
        (0.13, -0.13), labels.items(), ("3f90da o none", "bd1f01 s full"), strict=True
    ):
        color, marker, fill = look.split()
        rows = data[data.quantity == quantity].set_index("name").loc[names]
        ax.errorbar(
            rows["mean"],
            np.arange(len(names)) + offset,
            xerr=_bars(rows),
            linestyle="",
            capsize=2,
            color=f"#{color}",
            marker=marker,
            fillstyle=fill,
            label=label,
        )
    ax.set_yticks(range(len(names)), names)
    ax.set(
        xlabel="share of the tokens that have the feature, mean over features",
        xlim=(0, None),
        ylim=(len(names) - 0.5, -0.5),
    )
    ax.grid(axis="y", visible=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig
