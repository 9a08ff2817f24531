"""Figures of notebook 06: what of an SAE's error is a linear function of the activation."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...rails.figures import use_style
from ...rails.looks import GREY, architecture_look, l0_axis
from .axes import (
    FVU_LOOKS,
    FVU_NL,
    LEAST_FVU,
    LEAST_R2,
    NORM_R2,
    R2_LOOKS,
    VECTOR_R2,
    legend_above,
    moved_apart,
    names_down,
    points,
    r2_limits,
)

use_style()

NORM_LOOKS = {
    "x": {"label": "‖x‖²", "color": GREY, "linestyle": ":", "marker": "o"},
    "sae": {"label": "‖Sae(x)‖²", "color": "#3f90da", "linestyle": "--", "marker": "s"},
    "error": {"label": "‖error‖²", "color": "#e76300", "linestyle": "-", "marker": "^"},
    "linear": {"label": "‖linear error‖²", "color": "#a96b59", "linestyle": "-.", "marker": "D"},
    "nonlinear": {
        "label": "‖nonlinear error‖²",
        "color": "#bd1f01",
        "linestyle": (0, (6, 1.5, 1, 1.5, 1, 1.5)),
        "marker": "v",
    },
}


def dark_controls(data: pd.DataFrame) -> Figure:
    """Errors of SAEs that are linear, random, or trained on shuffled data.

    Paper: none.

    SAEs and controls: columns name, quantity (fvu, fvu_nonlinear, vector_r2, norm_r2 are shown),
    mean, low, high.
    """
    names = list(dict.fromkeys(data["name"]))
    fig, axes = plt.subplots(
        1, 3, figsize=(10.5, 1.1 + 0.32 * len(names)), sharey=True, width_ratios=(1.5, 1, 1)
    )
    looks = [(0, column, look) for column, look in FVU_LOOKS.items()]
    looks += [(panel, column, look) for panel, (column, look) in enumerate(R2_LOOKS.items(), 1)]
    for panel, column, look in looks:
        rows = data[data.quantity == column]
        offset = 0 if panel else {"fvu": -0.12, "fvu_nonlinear": 0.12}[column]
        at = np.array([names.index(name) for name in rows["name"]]) + offset
        points(
            axes[panel],
            at,
            rows,
            LEAST_R2 if panel else LEAST_FVU,
            across=True,
            linestyle="",
            **look,
        )
    names_down(axes[0], names)
    axes[0].set(xscale="log", xlabel="share of the variance of x")
    handles = [Line2D([], [], linestyle="", **look) for look in FVU_LOOKS.values()]
    if (data[data.quantity.isin(FVU_LOOKS)]["mean"] < LEAST_FVU).any():
        axes[0].set_xlim(left=LEAST_FVU / 1.6)
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="<",
                fillstyle="none",
                color="#bd1f01",
                markersize=7,
                label="below $10^{-4}$",
            )
        )
    legend_above(axes[0], handles, ncols=3)
    for ax, (column, look) in zip(axes[1:], R2_LOOKS.items(), strict=True):
        ax.set(xlabel=look["label"], xlim=r2_limits(data[data.quantity.isin(R2_LOOKS)]))
        ax.axvline(0, color=GREY, linewidth=0.8)
        if (data[data.quantity == column]["mean"] < LEAST_R2).any():
            hollow = {
                "linestyle": "",
                "marker": "<",
                "fillstyle": "none",
                "color": look["color"],
                "markersize": 7,
            }
            legend_above(
                ax, [Line2D([], [], label=f"below {LEAST_R2:g}".replace("-", "−"), **hollow)]
            )
    return fig


def dark_architectures(data: pd.DataFrame) -> Figure:
    """How much of an SAE's error is linear in x, by architecture and L0.

    Paper: Dark matter, Figure 2.

    Against L0: columns architecture, point, quantity (vector_r2, norm_r2, fvu, fvu_nonlinear),
    l0, mean, low, high.

    Architectures are drawn a little apart in L0, so that their intervals can be told apart.
    """
    names = list(dict.fromkeys(data.architecture))
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.7))
    panels = [
        (0, "vector_r2", {}),
        (1, "norm_r2", {}),
        (2, "fvu", {"linewidth": 2.2}),
        (2, "fvu_nonlinear", {"linewidth": 0.9, "fillstyle": "none"}),
    ]
    for panel, column, change in panels:
        for number, name in enumerate(names):
            rows = data[(data.architecture == name) & (data.quantity == column)].sort_values("l0")
            look = architecture_look(name) | change | {"elinewidth": 0.9}
            points(
                axes[panel],
                rows.l0 * moved_apart(number, len(names)),
                rows,
                0 if panel == 2 else LEAST_R2,
                label=name if panel == 0 else None,
                **look,
            )
    for ax, label in zip(axes, (VECTOR_R2, NORM_R2, "share of the variance of x"), strict=True):
        l0_axis(ax, data.l0)
        ax.set_ylabel(label)
    for ax in axes[:2]:
        ax.set_ylim(r2_limits(data[data.quantity.isin(R2_LOOKS)]))
    # A collapsed seed would take all the room.
    axes[2].set_ylim(0, 1.2 * data[data.quantity == "fvu"]["mean"].max())
    legend_above(
        axes[2],
        [
            Line2D([], [], color="black", marker="o", linewidth=2.2, label="FVU"),
            Line2D(
                [], [], color="black", marker="o", linewidth=0.9, fillstyle="none", label=FVU_NL
            ),
        ],
    )
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        handlelength=3,
    )
    return fig


def dark_matched(data: pd.DataFrame) -> Figure:
    """How much of an SAE's error is linear in x, by architecture, at equal FVU.

    Paper: none.

    Against FVU: columns architecture, point, quantity (vector_r2, fvu_nonlinear, and fvu for the
    x axis), mean, low, high.
    """
    names = list(dict.fromkeys(data.architecture))
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.7))
    keyed = data.set_index(["architecture", "point"])
    of = {name: keyed[keyed.quantity == name] for name in ("fvu", "vector_r2", "fvu_nonlinear")}
    fvu = of["fvu"]["mean"]
    for ax, column in zip(axes, ("vector_r2", "fvu_nonlinear"), strict=True):
        for name in names:
            rows = of[column].loc[name]
            at = fvu.loc[name].reindex(rows.index)
            order = at.argsort()
            points(
                ax,
                at.iloc[order],
                rows.iloc[order],
                0 if column == "fvu_nonlinear" else LEAST_R2,
                label=name if ax is axes[0] else None,
                elinewidth=0.9,
                **architecture_look(name),
            )
        ax.set(xlim=(0, min(1.06 * fvu.max(), 2.5 * fvu.median())), xlabel="FVU")
    axes[0].set(ylabel=VECTOR_R2, ylim=r2_limits(of["vector_r2"]))
    axes[1].set(ylabel=FVU_NL, ylim=(0, 1.2 * of["fvu_nonlinear"]["mean"].max()))
    axes[1].axline((0, 0), slope=1, color=GREY, linewidth=0.9, linestyle=":")
    legend_above(
        axes[1],
        [
            Line2D(
                [],
                [],
                color=GREY,
                linewidth=0.9,
                linestyle=":",
                label="all of the error is nonlinear",
            )
        ],
    )
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        handlelength=3,
    )
    return fig


def dark_directions(data: pd.DataFrame) -> Figure:
    """Latents beside the direction that predicts the norm of the error.

    Paper: Dark matter, Figure 14.

    Latents beside the direction that predicts ‖error‖²: columns latent, along, active_mean,
    frequency. One point a latent.
    """
    drawn = data[data.active_mean > 0]
    fig, ax = plt.subplots(figsize=(6.4, 3.8))
    dots = ax.scatter(
        drawn.active_mean,
        drawn.along,
        c=np.log10(drawn.frequency),
        s=14,
        cmap="viridis",
        linewidths=0,
    )
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xscale("log")
    for set_formatter in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    ax.set(
        xlabel="mean activation of the latent where it is active",
        ylabel="change of the predicted ‖error‖²\nby one unit of the latent",
    )
    bar = fig.colorbar(dots, ax=ax)
    bar.set_label("log₁₀ of its frequency")
    return fig


def dark_norms(data: pd.DataFrame) -> Figure:
    """Five squared norms predicted from x.

    Paper: Dark matter, Figure 6.

    R² of squared norms, a panel an architecture: columns architecture, point, quantity (of
    NORM_LOOKS), l0, mean, low, high.

    Curves are drawn a little apart in L0, so that their intervals can be told apart.
    """
    groups = list(data.groupby("architecture", sort=False))
    fig, axes = plt.subplots(
        1, len(groups), figsize=(1.5 + 1.8 * len(groups), 3.1), sharey=True, squeeze=False
    )
    for ax, (name, runs) in zip(axes[0], groups, strict=True):
        for number, (column, look) in enumerate(NORM_LOOKS.items()):
            rows = runs[runs.quantity == column].sort_values("l0")
            points(
                ax,
                rows.l0 * moved_apart(number, len(NORM_LOOKS)),
                rows,
                LEAST_R2,
                linewidth=1.3,
                elinewidth=0.8,
                **look,
            )
        l0_axis(ax, data.l0)
        ax.set_title(name)
    axes[0, 0].set(
        ylabel="R² as predicted from x", ylim=r2_limits(data[data.quantity.isin(NORM_LOOKS)])
    )
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right center", handlelength=3.5
    )
    return fig


def dark_baselines(data: pd.DataFrame) -> Figure:
    """What else predicts the norm of the error.

    Paper: Dark matter, Figure 13.

    R² of ‖error‖² of one SAE from x and from simpler things: columns predictor, mean, low, high.
    """
    names = list(data.predictor)
    fig, ax = plt.subplots(figsize=(6.4, 0.8 + 0.36 * len(names)))
    ax.barh(range(len(names)), data["mean"].clip(lower=LEAST_R2), height=0.5, color="#c4c6ca")
    points(
        ax,
        np.arange(len(names)),
        data,
        LEAST_R2,
        across=True,
        linestyle="",
        **R2_LOOKS["norm_r2"] | {"label": None},
    )
    ax.axvline(0, color="black", linewidth=0.8)
    names_down(ax, names)
    ax.set(
        xlim=r2_limits(data.assign(low=data.low.clip(upper=0).fillna(0))),
        xlabel=f"{NORM_R2} on other documents",
    )
    ax.grid(axis="y", visible=False)
    return fig


def dark_places(data: pd.DataFrame) -> Figure:
    """How linear the error is at every layer and site.

    Paper: Dark matter, Figure 3.

    A row a place, a marker a sparsity: columns architecture (the place), point, quantity, l0,
    mean, low, high.

    Quantities vector_r2, norm_r2 and fvu_nonlinear are shown. Sparsities are numbered by their
    L0 at each place.
    """
    names = list(dict.fromkeys(data.architecture))
    shown = data.assign(
        order=data.groupby(["architecture", "quantity"]).l0.rank(method="first").astype(int) - 1
    )
    many = int(shown.order.max()) + 1
    words = {1: ("",), 2: ("lower ", "higher ")}.get(many, ("",) * many)
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 1.2 + 0.36 * len(names)), sharey=True)
    looks = [
        {"color": "#3f90da", "marker": "o"},
        {"color": "#bd1f01", "marker": "s", "fillstyle": "none"},
        {"color": "#ffa90e", "marker": "^"},
        {"color": "#832db6", "marker": "D", "fillstyle": "none"},
    ]
    for order, look in zip(range(many), looks, strict=False):
        l0 = shown[shown.order == order].l0
        ends = [f"{end:.3g}" for end in (l0.min(), l0.max())]
        label = f"{words[order]}L0 ({' to '.join(dict.fromkeys(ends))})"
        for ax, column in zip(axes, ("vector_r2", "norm_r2", "fvu_nonlinear"), strict=True):
            rows = shown[(shown.order == order) & (shown.quantity == column)]
            at = np.array([names.index(name) for name in rows.architecture]) + 0.24 * (
                order - (many - 1) / 2
            )
            points(
                ax,
                at,
                rows,
                0 if ax is axes[2] else LEAST_R2,
                across=True,
                linestyle="",
                label=label,
                **look,
            )
    names_down(axes[0], names)
    for ax, column in ((axes[0], "vector_r2"), (axes[1], "norm_r2")):
        ax.set(xlabel=R2_LOOKS[column]["label"], xlim=r2_limits(data[data.quantity.isin(R2_LOOKS)]))
    axes[2].set(xlabel=FVU_NL, xlim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=many)
    return fig
