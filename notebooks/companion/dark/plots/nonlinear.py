"""Figures of notebook 07: what the nonlinear part of an SAE's error is."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ...rails.figures import use_style
from ...rails.looks import GREY, architecture_look, error_bars, points_and_mean, ticks_at

use_style()

VECTOR_LOOKS = {
    "error": {"label": "error", "color": "#e76300", "marker": "^"},
    "linear": {"label": "linear error", "color": "#a96b59", "marker": "D"},
    "nonlinear": {"label": "nonlinear error", "color": "#bd1f01", "marker": "v"},
}
MISSING_LOOKS = {
    "linear": {"label": "linear error", "marker": "D", "fillstyle": "none"},
    "nonlinear": {"label": "nonlinear error", "marker": "v", "fillstyle": "full"},
}
PURSUIT_LOOKS = {
    "fvu": {"label": "FVU", "color": "#3f90da", "linestyle": "-", "marker": "o"},
    "fvu_nonlinear": {
        "label": "FVU$_\\mathrm{nl}$",
        "color": "#bd1f01",
        "linestyle": "--",
        "marker": "s",
        "fillstyle": "none",
    },
}


def _bars(rows: pd.DataFrame) -> np.ndarray:
    """Lengths of error bars, [2, n]; of few documents a bootstrap's ends may both lie on one side
    of the estimate."""
    return np.maximum(error_bars(rows), 0)


def _limits(
    rows: pd.DataFrame, always: tuple[float, ...], lowest: float, highest: float
) -> tuple[float, float]:
    """Limits of an axis with every mean and the values `always`; intervals are seen as far as
    `lowest` and `highest` only."""
    seen = pd.concat(
        [
            rows["mean"],
            rows.low.clip(lower=lowest),
            rows.high.clip(upper=highest),
            pd.Series(always),
        ]
    )
    margin = 0.04 * (seen.max() - seen.min())
    return seen.min() - margin, seen.max() + margin


def dark_parts(data: pd.DataFrame) -> Figure:
    """SAEs trained on x and on each part of an SAE's error.

    Paper: Dark matter, section 5.2 and Figure 7.

    SAEs trained on x and on each part of an SAE's error: columns part (x, linear, nonlinear),
    seed, quantity, value.

    Quantities FVU; purity, purity by chance and correlation (of latents, mean). Points of seeds,
    and their mean with a 95 % t-interval.
    """
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.4))
    labels = {
        "FVU": "FVU, share of the variance\nof what it is trained on",
        "purity": "mean purity of latents, share of their\ntop tokens that are the same",
        "correlation": "mean correlation of latents with\nwhat rules say of them",
    }
    for ax, (quantity, label) in zip(axes, labels.items(), strict=True):
        rows = data[data.quantity == quantity]
        points_and_mean(
            ax,
            rows.part.map({"x": "x", "linear": "linear\nerror", "nonlinear": "nonlinear\nerror"}),
            rows.value,
        )
        ax.set_ylim(0, np.clip(ax.get_ylim()[1], 1.08 * rows.value.max(), 1.6 * rows.value.max()))
        ax.set(
            xlabel="what the SAE is trained on",
            ylabel=label,
            xlim=(-0.6, rows.part.nunique() - 0.4),
        )
        ax.grid(axis="x", visible=False)
    chance = data[data.quantity == "purity by chance"].groupby("part", sort=False).value.mean()
    at = np.arange(len(chance))
    line = axes[1].hlines(chance, at - 0.3, at + 0.3, color=GREY, linestyle="--", label="by chance")
    axes[1].legend(handles=[line], loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return fig


def dark_harm(data: pd.DataFrame) -> Figure:
    """What parts of the error do to the model beside their size, and the ratio of both against L0
    and against width.

    Paper: Dark matter, Figure 8.

    data: columns missing (linear, nonlinear), quantity (harm, size, harm over size), mean, low,
    high, architecture, l0, d_sae and along ("L0" or "width"), a row a quantity and SAE. Other
    rows, such as the rise with both missing, are not drawn. SAEs of one architecture are joined.
    In the right panels curves are a little apart, so that intervals can be told apart.
    """
    drawn = data[data.missing.isin(MISSING_LOOKS)]
    fig, axes = plt.subplots(1, 3, figsize=(11.5, 4.2), width_ratios=(1.2, 1, 1))
    for ax, along, by in ((axes[1], "L0", "l0"), (axes[2], "width", "d_sae")):
        curves = list(drawn[drawn.along == along].groupby(["architecture", "missing"], sort=False))
        for number, ((name, part), rows) in enumerate(curves):
            rows = rows.sort_values(by, kind="stable")
            harm, size, ratio = (
                rows[rows.quantity == quantity] for quantity in ("harm", "size", "harm over size")
            )
            look = architecture_look(name)
            apart = ratio[by] * 1.025 ** (number - (len(curves) - 1) / 2)
            for panel, x, y, bars in (
                (axes[0], size["mean"], harm["mean"], {"xerr": _bars(size), "yerr": _bars(harm)}),
                (ax, apart, ratio["mean"], {"yerr": _bars(ratio)}),
            ):
                panel.errorbar(
                    x, y, **bars, **look | {"marker": ""}, linewidth=1.2, elinewidth=0.7, capsize=2
                )
                panel.scatter(
                    x,
                    y,
                    s=26,
                    marker=MISSING_LOOKS[part]["marker"],
                    edgecolor=look["color"],
                    zorder=3,
                    facecolor=look["color"] if part == "nonlinear" else "white",
                )
        ax.axhline(1, color=GREY, linewidth=0.9, linestyle=":")
    harm, size, ratio = (
        drawn[drawn.quantity == quantity] for quantity in ("harm", "size", "harm over size")
    )
    axes[0].axline((0, 0), slope=1, color=GREY, linewidth=0.9, linestyle=":")
    axes[0].set(
        xlabel="size: share of the squared error",
        ylabel="harm: share of the rise in cross-entropy,\n"
        "mean of missing alone and restored alone",
        xlim=_limits(size, (), -0.5, 1.5),
        ylim=_limits(harm, (), -0.5, 2),
    )
    l0 = data[data.along == "L0"].l0
    axes[1].set(
        xscale="log", xlim=(0.8 * l0.min(), 1.25 * l0.max()), xlabel="L0", ylabel="harm over size"
    )
    axes[1].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].xaxis.set_minor_locator(ticker.NullLocator())
    ladder = data[data.along == "width"]
    ticks_at(axes[2], ladder.d_sae)
    axes[2].set(
        xlim=(ladder.d_sae.min() / 1.3, ladder.d_sae.max() * 1.3),
        xlabel=f"width d_sae (L0 = {ladder.l0.mean():.3g})",
    )
    for ax in axes[1:]:
        ax.set_ylim(_limits(ratio, (0, 1), -0.5, 3))
    names = list(dict.fromkeys(drawn.architecture))
    handles = [
        Line2D([], [], label=name, **architecture_look(name) | {"marker": ""}) for name in names
    ]
    handles += [
        Line2D([], [], linestyle="", color="black", markersize=6, **look)
        for look in MISSING_LOOKS.values()
    ]
    handles.append(
        Line2D([], [], color=GREY, linewidth=0.9, linestyle=":", label="harm in proportion to size")
    )
    fig.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 7), columnspacing=1.4
    )
    return fig


def dark_pursuit(data: pd.DataFrame) -> Figure:
    """Gradient pursuit beside the encoder, at equal L0.

    Paper: Dark matter, Figure 9a.

    Ratios, pursuit over encoder at equal L0, by width: columns d_sae, quantity (fvu,
    fvu_nonlinear), mean, low, high.
    """
    fig, ax = plt.subplots()
    for (quantity, look), apart in zip(PURSUIT_LOOKS.items(), (0.98, 1.02), strict=True):
        rows = data[data.quantity == quantity].sort_values("d_sae")
        ax.errorbar(
            rows.d_sae * apart, rows["mean"], yerr=_bars(rows), capsize=3, elinewidth=0.9, **look
        )
    ticks_at(ax, data.d_sae)
    ax.axhline(1, color=GREY, linewidth=0.9, linestyle=":")
    ax.set(
        xlim=(data.d_sae.min() / 1.3, data.d_sae.max() * 1.3),
        ylim=_limits(data, (1,), 0.5, 1.5),
        xlabel="width d_sae",
        ylabel="ratio, pursuit over encoder\n(below 1: pursuit is the better one)",
    )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=3)
    return fig


def dark_sources(data: pd.DataFrame) -> Figure:
    """How much of an error outputs of earlier components explain.

    Paper: Dark matter, Figure 9b.

    R² of an error and its parts from outputs of SAEs elsewhere: columns source, vector (of
    VECTOR_LOOKS), mean, low, high.

    A source whose name ends in "the same SAE" is hatched, its markers hollow: what it explains
    is in part so by construction.
    """
    data = data[data.vector.isin(VECTOR_LOOKS)]
    names = list(dict.fromkeys(data.source))
    same = data.source.str.endswith("the same SAE")
    fig, ax = plt.subplots(figsize=(7.4, 1.1 + 0.55 * len(names)))
    for (vector, look), offset in zip(VECTOR_LOOKS.items(), (-0.24, 0, 0.24), strict=True):
        for chosen, fill in ((~same, "full"), (same, "none")):
            rows = data[chosen & (data.vector == vector)]
            at = np.array([names.index(name) for name in rows.source]) + offset
            ax.errorbar(
                rows["mean"],
                at,
                xerr=_bars(rows),
                capsize=2,
                elinewidth=1,
                linestyle="",
                markersize=5,
                **look,
                fillstyle=fill,
            )
    handles = [Line2D([], [], linestyle="", markersize=5, **look) for look in VECTOR_LOOKS.values()]
    hatched = {"facecolor": "none", "edgecolor": "#cfcfcf", "hatch": "////", "linewidth": 0}
    for name in data.source[same].unique():
        ax.axhspan(names.index(name) - 0.46, names.index(name) + 0.46, **hatched, zorder=0)
    if same.any():
        handles.append(Patch(**hatched, label="true in part by construction"))
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(names)), [name.replace(": ", ":\n") for name in names])
    ax.set(
        ylim=(len(names) - 0.5, -0.5),
        xlim=_limits(data, (0, 1), -0.2, 1),
        xlabel="R² on other documents",
    )
    ax.grid(axis="y", visible=False)
    fig.legend(
        handles=handles, loc="outside upper center", ncols=4, columnspacing=1.4, handletextpad=0.5
    )
    return fig


KNOB_LOOKS = {
    "input": {"label": "dense noise in x", "color": "#3f90da", "linestyle": "-", "marker": "o"},
    "absent": {
        "label": "features that the SAE lacks",
        "color": "#ffa90e",
        "linestyle": "--",
        "marker": "s",
    },
    "output": {"label": "noise in Sae(x)", "color": "#bd1f01", "linestyle": "-.", "marker": "^"},
}


def dark_synthetic(data: pd.DataFrame) -> Figure:
    """Linear and nonlinear error where what makes it is known, and of real SAEs.

    Paper: Dark matter, Figure 15 and Table 1.

    data: columns kind ("synthetic", "real"), seed, input, absent, output (shares of the
    variance), fvu_linear, fvu_nonlinear, a row a combination and seed, combinations in the same
    order in each. Lines: one thing added alone, mean over seeds; grey: two or three together.
    """
    fig, ax = plt.subplots(figsize=(6.8, 4.2))
    synthetic = data[data.kind == "synthetic"]
    synthetic = synthetic.groupby(synthetic.groupby("seed").cumcount())[
        [*KNOB_LOOKS, "fvu_linear", "fvu_nonlinear"]
    ].mean()
    alone = (synthetic[list(KNOB_LOOKS)] > 0).sum(axis=1) <= 1
    ax.scatter(
        synthetic.fvu_linear[~alone],
        synthetic.fvu_nonlinear[~alone],
        s=9,
        color="#c4c6ca",
        label="two or three of these",
    )
    for knob, look in KNOB_LOOKS.items():
        others = [other for other in KNOB_LOOKS if other != knob]
        rows = synthetic[(synthetic[others] == 0).all(axis=1)].sort_values(knob)
        ax.plot(rows.fvu_linear, rows.fvu_nonlinear, markersize=5, **look)
    real = data[data.kind == "real"]
    ax.scatter(
        real.fvu_linear,
        real.fvu_nonlinear,
        marker="*",
        s=110,
        color="black",
        zorder=4,
        label="real SAEs on real x",
    )
    ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(
        xlabel="linear error, FVU − FVU$_\\mathrm{nl}$",
        ylabel="nonlinear error, FVU$_\\mathrm{nl}$",
    )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return fig
