"""Figures of notebook 06 over SAEs of several widths."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...rails.figures import use_style
from ...rails.looks import ticks_at
from .axes import FVU_LOOKS, LEAST_R2, R2_LOOKS, legend_above, points, r2_limits

use_style()


def _areas(ax: plt.Axes, broken: pd.DataFrame) -> list:
    """FVU by width in three parts, from the bottom: nonlinear, linear and absent; returns them for
    the legend, top first.

    A linear part below 0 (the law's offset is lower than FVU_nl) lies on top of the nonlinear one.
    """
    parts = broken.pivot(index="d_sae", columns="component", values="mean").sort_index()
    offset = parts.nonlinear + parts.linear
    looks = {
        "absent": (offset, offset + parts.absent, "#ffa90e", "..", "not learned yet"),
        "linear": (parts.nonlinear, offset, "#3f90da", "//", "linear error"),
        "nonlinear": (0 * offset, parts.nonlinear, "#bd1f01", "\\\\\\", "nonlinear error"),
    }
    if (parts.linear < 0).any():
        looks["linear"] = (*looks["linear"][:-1], "linear error, below 0")
    return [
        ax.fill_between(
            parts.index,
            bottom,
            top,
            facecolor=(color, 0.25),
            edgecolor=(color, 0.6),
            hatch=hatch,
            linewidth=0,
            label=label,
        )
        for bottom, top, color, hatch, label in looks.values()
    ]


def _plus_minus(row: pd.Series) -> str:
    """Mean ± half the interval, or the mean alone where there is none."""
    half = (row.high - row.low) / 2
    return f"{row['mean']:.2f}" + (f" ± {half:.2f}" if half == half else "")


def dark_breakdown(data: pd.DataFrame) -> Figure:
    """FVU by width: features not yet learned, linear error, nonlinear error.

    Paper: Dark matter, Figure 1.

    By width: the breakdown of FVU and its law, FVU and FVU_nl, and R². Two kinds of rows, told
    apart by the column kind.

    "measured": columns architecture (the width, as a number or a string), point, quantity, l0,
    mean, low, high. "breakdown": component, d_sae, mean, low, high; components absent, linear,
    nonlinear and law at each width, offset, exponent and miss once. The three boundaries of the
    areas are FVU_nl (intervals: the middle panel), the offset (its band) and FVU (its bars).
    """
    measured, broken = data[data.kind == "measured"], data[data.kind == "breakdown"]
    measured = measured.assign(d_sae=pd.to_numeric(measured.architecture)).sort_values("d_sae")
    of = {name: rows for name, rows in measured.groupby("quantity")}
    broken = broken.assign(d_sae=pd.to_numeric(broken.d_sae)).sort_values("d_sae")
    law, single = (
        broken[broken.component == "law"],
        broken.drop_duplicates("component").set_index("component"),
    )

    fig, axes = plt.subplots(1, 3, figsize=(10.5, 4.1), width_ratios=(1.5, 1, 1))
    areas = _areas(axes[0], broken[broken.component.isin(["absent", "linear", "nonlinear"])])
    offset = single.loc["offset"]
    if offset.low == offset.low:
        axes[0].axhspan(
            offset.low,
            offset.high,
            facecolor=("#832db6", 0.12),
            edgecolor="#832db6",
            linestyle=":",
            linewidth=0.8,
        )
    dashed = axes[0].axhline(
        offset["mean"], color="#832db6", linestyle="--", label="offset of the law"
    )
    (curve,) = axes[0].plot(
        law.d_sae, law["mean"], color="black", linestyle="-.", linewidth=1.2, label="law"
    )
    points(axes[0], of["fvu"].d_sae, of["fvu"], 0, linestyle="", **FVU_LOOKS["fvu"])
    known = f"exponent of the law: {_plus_minus(single.loc['exponent'])}"
    if single["mean"].notna()["miss"]:  # unknown from too few widths
        known += f"\nFVU of the widest over its prediction: {_plus_minus(single.loc['miss'])}"
    legend_above(
        axes[0],
        [Line2D([], [], linestyle="", **FVU_LOOKS["fvu"]), curve, dashed, *areas],
        ncols=3,
        title=known,
    )

    for panel, looks, least in ((1, FVU_LOOKS, 0), (2, R2_LOOKS, LEAST_R2)):
        for (column, look), line in zip(looks.items(), ("-", "--"), strict=True):
            points(axes[panel], of[column].d_sae, of[column], least, linestyle=line, **look)
        legend_above(axes[panel], ncols=1 if panel == 2 else 2)
    top = 1.05 * max(
        of["fvu"]["mean"].max() * 1.02, min(of["fvu"].high.max(), 1.5 * of["fvu"]["mean"].max())
    )
    for ax, label in zip(
        axes, (*["share of the variance of x"] * 2, "R² as predicted from x"), strict=True
    ):
        ticks_at(ax, measured.d_sae)
        ax.set(xlabel=f"width d_sae (L0 = {measured.l0.mean():.3g})", ylabel=label)
    for ax in axes[:2]:
        ax.set_ylim(0, top)
    axes[2].set_ylim(r2_limits(measured[measured.quantity.isin(R2_LOOKS)]))
    return fig


def _cell(ax: plt.Axes, x: int, y: int, row: pd.Series, **style) -> None:
    half = (row.high - row.low) / 2
    digits = 3 if half < 0.0095 else 2
    text = f"{row['mean']:.{digits}f}" + (
        f"\n±{half:.{digits}f}".replace("±0.", "±.") if half == half else ""
    )
    ax.text(x, y, text.replace("-", "−"), ha="center", va="center", fontsize=7.5, **style)


def dark_pairs(data: pd.DataFrame) -> Figure:
    """A wide SAE's error norm from a narrower one's, token by token.

    Paper: Dark matter, Figure 4.

    A wide SAE's ‖error‖ from a narrower one's: columns narrow, wide, quantity (error, nonlinear,
    x), mean, low, high.

    Cells have the mean and half the interval. The quantity x, R² from ‖x‖ alone, has narrow =
    wide: the diagonal.
    """
    widths = sorted(set(data.narrow) | set(data.wide))
    side = min(4.4, 0.72 * len(widths) + 0.3)
    fig, axes = plt.subplots(
        1, 2, figsize=(2 * max(side, 2.4) + 1.7, max(side, 1.6) + 0.8), sharey=True
    )
    titles = (
        "R² of the wide SAE's ‖error‖ from the\nnarrow one's; framed, italic: from ‖x‖ alone",
        "Share of the rest that the narrow\nSAE's ‖nonlinear error‖ explains",
    )
    for ax, quantities, title in zip(axes, (("error", "x"), ("nonlinear",)), titles, strict=True):
        shades = np.full((len(widths), len(widths)), np.nan)
        for _, row in data[data.quantity.isin(quantities)].iterrows():
            x, y = widths.index(row.narrow), widths.index(row.wide)
            shades[y, x] = min(max(row["mean"], 0), 1)
            alone = row.quantity == "x"
            _cell(ax, x, y, row, fontstyle="italic" if alone else "normal")
            if alone:
                ax.add_patch(
                    plt.Rectangle(
                        (x - 0.45, y - 0.45),
                        0.9,
                        0.9,
                        fill=False,
                        edgecolor="#bd1f01",
                        linestyle="--",
                    )
                )
        # A share of 1 is light enough for black text.
        image = ax.imshow(shades, cmap="Blues", vmin=0, vmax=1.6, aspect="equal")
        ax.set_xticks(range(len(widths)), [f"{width:g}" for width in widths])
        ax.set_yticks(range(len(widths)), [f"{width:g}" for width in widths])
        ax.grid(False)
        ax.set_title(title, fontsize=8.5)
        ax.set_xlabel("width of the narrow SAE")
    axes[0].set_ylabel("width of the wide SAE")
    bar = fig.colorbar(
        image, ax=axes, shrink=0.7, boundaries=np.linspace(0, 1, 101), ticks=(0, 0.5, 1)
    )
    bar.set_label("R², share")
    return fig
