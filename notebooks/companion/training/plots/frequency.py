"""Figures of notebook 04: how often latents fire, and what the ones that fire often stand for."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from ...rails.figures import MARKERS, use_style
from ...rails.looks import ARCHITECTURES, architecture_look, error_bars
from ...rails.repeats import mean_interval

use_style()

BOUNDS = (0.01, 0.1)
"""Frequencies above which papers count latents: 1 % and 10 % of tokens."""

FULL = 1.05
"""Upper end of an axis of shares; an interval over three seeds may reach beyond."""


def _curves(data: pd.DataFrame) -> list[tuple[pd.DataFrame, dict[str, str]]]:
    """Rows of each architecture and the look of its curve: that of all figures, or for other names
    the style sheet's next."""
    looks = zip(
        plt.rcParams["axes.prop_cycle"],
        MARKERS,
        data.groupby("architecture", sort=False),
        strict=False,
    )
    return [
        (
            rows,
            {
                **(
                    architecture_look(name)
                    if name in ARCHITECTURES
                    else {**cycle, "marker": marker}
                ),
                "label": name,
            },
        )
        for cycle, marker, (name, rows) in looks
    ]


def frequency_histograms(data: pd.DataFrame) -> Figure:
    """Share of latents by frequency, a column an architecture, the others in grey; below, the
    frequent ones enlarged.

    Paper: JumpReLU, Figure 14.

    data: columns architecture, dead, log10_frequency, mean, low, high
    (`frequency.frequency_histogram`).
    """
    names = list(data.architecture.unique())
    fig, axes = plt.subplots(
        2,
        len(names),
        figsize=(2.3 * len(names) + 0.6, 4.4),
        sharex="row",
        sharey="row",
        squeeze=False,
    )
    alive = data[~data.dead]
    middles = np.sort(alive.log10_frequency.unique())
    half = -middles[-1]  # the last bin ends at log10 1 = 0
    edges = 10.0 ** np.append(middles - half, 0)
    for column, name in zip(axes.T, names, strict=True):
        never = data[data.dead & (data.architecture == name)].iloc[0]
        column[0].set_title(f"{name}\n{never['mean']:.1%} never fire")
        for ax in column:
            for other, rows in alive.groupby("architecture", sort=False):
                if other != name:
                    ax.stairs(rows["mean"], edges, color="#c4c6ca", linewidth=0.8, baseline=None)
            rows = alive[alive.architecture == name]
            if rows.low.notna().all():  # one seed has no interval
                ax.stairs(
                    rows.high,
                    edges,
                    baseline=rows.low.clip(lower=0),
                    fill=True,
                    color="#3f90da",
                    alpha=0.3,
                )
            ax.stairs(rows["mean"], edges, color="#3f90da", linewidth=1.4, baseline=None)
            ax.axvline(BOUNDS[1], color="#717581", linewidth=0.8, linestyle=":")
            ax.set_xscale("log")
    right = alive[alive.log10_frequency > np.log10(BOUNDS[1])]
    axes[0, 0].set(xlim=(edges[0], 1), ylim=(0, None), ylabel="share of latents")
    axes[1, 0].set(
        xlim=(BOUNDS[0] * 2.5, 1),
        ylim=(0, max(1e-3, 1.2 * right[["mean", "high"]].max(axis=None))),
        ylabel="the same, right end",
    )
    fig.supxlabel(f"share of tokens on which a latent fires (dotted: {BOUNDS[1]:.0%})", fontsize=9)
    return fig


def _over_l0(ax: plt.Axes, data: pd.DataFrame, column: str) -> None:
    """`column` against L0, a curve an architecture: mean and 95 % t-interval over seeds, of L0 as
    well.

    The runs of one seed differ in their sparsity; the n-th of each seed belong together. A
    collapsed run makes for wide intervals: those of L0 end at its tenth and its tenfold.
    """
    for rows, look in _curves(data):
        setting = rows.groupby("seed").cumcount()
        l0, value = (
            [mean_interval(one[name]) for _, one in rows.groupby(setting)]
            for name in ("l0", column)
        )
        ax.errorbar(
            [i.mean for i in l0],
            [i.mean for i in value],
            yerr=[i.half for i in value],
            xerr=[[min(i.half, 0.9 * i.mean) for i in l0], [min(i.half, 9 * i.mean) for i in l0]],
            capsize=2,
            elinewidth=0.8,
            **look,
        )
    ax.set(xscale="log", xlabel="L0")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda l0, _: f"{l0:g}"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def frequent_latents(data: pd.DataFrame) -> Figure:
    """Share of latents above each frequency against L0; mean and 95 % t-interval over seeds, of L0
    as well.

    Paper: JumpReLU, Figure 5.

    data: one row a run and bound: architecture, bound (a frequency), l0, seed, share. The runs
    of one seed differ in their sparsity; the n-th of each seed belong together.
    """
    bounds = sorted(data.bound.unique())
    fig, axes = plt.subplots(1, len(bounds), figsize=(4.2 * len(bounds), 3.2), squeeze=False)
    for ax, bound in zip(axes[0], bounds, strict=True):
        _over_l0(ax, data[data.bound == bound], "share")
        ax.set(title=f"fire on over {bound:.0%} of tokens", ylim=(0, min(ax.get_ylim()[1], FULL)))
    axes[0, 0].set_ylabel("share of latents")
    axes[0, 0].legend()
    return fig


def dead_latents(data: pd.DataFrame) -> Figure:
    """Share of latents that are dead against L0, a panel a way to count them; mean and 95 %
    t-interval over seeds.

    Paper: JumpReLU, Figure 13.

    data: one row a run and way to count: architecture, counted (the panel's title), l0, seed,
    share.
    """
    ways = list(data.counted.unique())
    fig, axes = plt.subplots(1, len(ways), figsize=(4.2 * len(ways), 3.2), squeeze=False)
    for ax, way in zip(axes[0], ways, strict=True):
        _over_l0(ax, data[data.counted == way], "share")
        ax.set_title(way)
        # Nothing dead is a line at 0, and not an axis of rounding errors
        ax.set_ylim(0, np.clip(ax.get_ylim()[1], 0.01, FULL))
    axes[0, 0].set_ylabel("share of latents")
    axes[0, -1].legend()
    return fig


def remedies(data: pd.DataFrame) -> Figure:
    """What other sparsity losses do to frequent latents, and their price; mean and 95 % t-interval
    over seeds.

    Paper: none; penalties against frequent latents.

    data: one row a run: architecture (the loss; the first is the plain one), seed, l0, dense_10
    (share of latents that fire on over 10 % of tokens), ratio (FVU over that of the plain loss
    at the run's L0; NaN outside of its range).
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for ax, column in zip(axes, ("dense_10", "ratio"), strict=True):
        _over_l0(ax, data, column)
    axes[0].set(ylabel="share of latents", title=f"fire on over {BOUNDS[1]:.0%} of tokens")
    axes[0].set_ylim(0, min(axes[0].get_ylim()[1], FULL))
    axes[1].set(ylabel="FVU over that of the plain loss", title="price at equal L0")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return fig


BAND_LABELS = {
    "mean_activation": "mean f where active",
    "threshold": "threshold θ",
    "norm_share": "share of the energy written",
    "by_token": "variance explained by\nthe token",
    "by_previous": "variance explained by\nthe token before",
    "by_position": "variance explained by\nthe position",
    "norm_correlation": "correlation with ‖x‖",
    "mean_cosine": "cosine of atom with x̄",
    "top_direction": "share of atom in the\nleading directions",
}


def latent_bands(data: pd.DataFrame) -> Figure:
    """What latents are like, by how often they fire: one panel a descriptor, mean and 95 %
    t-interval over seeds.

    Paper: none; JumpReLU, section 1, says that very frequent latents are less interpretable.

    data: columns band, quantity, mean, low, high, seeds, latents (`frequency.frequency_bands`);
    raw units.
    """
    bands = list(data.band.unique())[::-1]  # the rarest on the left
    number = data[data.quantity == "frequency"].set_index("band").latents
    fig, axes = plt.subplots(3, 3, figsize=(10, 6.6), sharex=True)
    for ax, (quantity, label) in zip(axes.flat, BAND_LABELS.items(), strict=True):
        rows = data[data.quantity == quantity].set_index("band").reindex(bands)
        ax.axhline(0, color="#717581", linewidth=0.8)
        ax.errorbar(
            range(len(bands)),
            rows["mean"],
            error_bars(rows),
            color="#3f90da",
            marker="o",
            linestyle="",
            capsize=4,
        )
        ax.set_title(label)
        ax.margins(x=0.15, y=0.15)
    for ax in axes[-1]:
        ax.set_xticks(range(len(bands)), [f"{band}\nn = {number[band]}" for band in bands])
    fig.supxlabel("latents, by the share of tokens on which they fire", fontsize=9)
    return fig
