"""Figures of notebook 06: what of an SAE's error is a linear function of the activation."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...rails.figures import use_style
from ...rails.looks import architecture_look, ticks_at

use_style()

GREY = "#717581"

LEAST_FVU = 1e-4
"""Where an axis of FVU ends: linear controls have a nonlinear error of rounding alone."""

LEAST_R2 = -0.2
"""Where an axis of R² ends: on other documents a useless prediction may be worse than the mean by
any factor."""

FVU_NL, VECTOR_R2, NORM_R2 = "FVU$_\\mathrm{nl}$", "R² of the error, pooled", "R² of ‖error‖²"

FVU_LOOKS = {
    "fvu": {"label": "FVU", "color": "#3f90da", "marker": "o"},
    "fvu_nonlinear": {"label": FVU_NL, "color": "#bd1f01", "marker": "s", "fillstyle": "none"},
}
R2_LOOKS = {
    "vector_r2": {"label": VECTOR_R2, "color": "#832db6", "marker": "D"},
    "norm_r2": {"label": NORM_R2, "color": "#e76300", "marker": "^"},
}
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


def _points(
    ax: plt.Axes,
    at: pd.Series | np.ndarray,
    rows: pd.DataFrame,
    least: float,
    across: bool = False,
    **look,
) -> None:
    """Means and their intervals; a mean below `least` is a hollow triangle there, which points to
    where it lies.

    at: the other coordinate of each row; across: values on the x axis, `at` on the y axis.
    """
    low, mean, high = (
        rows[column].clip(lower=least).to_numpy() for column in ("low", "mean", "high")
    )
    at, below = np.asarray(at, dtype=float), (rows["mean"] < least).to_numpy()
    ends = np.maximum([mean - low, high - mean], 0)
    ends[:, rows.high < least] = np.nan
    bars = {"xerr" if across else "yerr": ends}
    ax.errorbar(
        *((mean, at) if across else (at, mean)), **bars, capsize=2, markevery=list(~below), **look
    )
    if below.any():
        ax.plot(
            *((mean[below], at[below]) if across else (at[below], mean[below])),
            linestyle="",
            fillstyle="none",
            color=look["color"],
            marker="<" if across else "v",
            markersize=7,
            clip_on=False,
        )


def _r2_limits(data: pd.DataFrame) -> tuple[float, float]:
    """Limits of an axis of R²: from 1 down to the lowest mean or low of `data`, but not below
    :data:`LEAST_R2`."""
    lowest = max(data[["mean", "low"]].min(axis=None), LEAST_R2)
    return lowest - 0.05 * (1 - lowest) - 0.01, 1 + 0.04 * (1 - lowest) + 0.01


def _l0_axis(ax: plt.Axes, l0: pd.Series) -> None:
    """Logarithmic x axis over `l0`, marked in plain numbers, the roundest of which at least three
    are in view."""
    low, high = 0.8 * l0.min(), 1.25 * l0.max()
    tens = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)):
        marks = [mark for mark in np.outer(tens, steps).ravel() if low <= mark <= high]
        if len(marks) >= 3:
            break
    ax.set(xscale="log", xlim=(low, high), xlabel="L0")
    ax.set_xticks(marks, [f"{mark:.3g}" for mark in marks])
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def _apart(number: int, many: int) -> float:
    """Factor of L0 by which the `number`-th of `many` curves is moved, so that intervals at one L0
    can be told apart."""
    return 1.02 ** (number - (many - 1) / 2)


def _names_down(ax: plt.Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _above(
    ax: plt.Axes, handles: list | None = None, ncols: int = 2, title: str | None = None
) -> None:
    """The legend above an axes, where it hides no point."""
    found = handles or ax.get_legend_handles_labels()[0]
    ax.legend(
        handles=found,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=ncols,
        columnspacing=1.2,
        borderaxespad=0.2,
        title=title,
        title_fontsize=8,
        alignment="left",
    )


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
        _points(
            axes[panel],
            at,
            rows,
            LEAST_R2 if panel else LEAST_FVU,
            across=True,
            linestyle="",
            **look,
        )
    _names_down(axes[0], names)
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
    _above(axes[0], handles, ncols=3)
    for ax, (column, look) in zip(axes[1:], R2_LOOKS.items(), strict=True):
        ax.set(xlabel=look["label"], xlim=_r2_limits(data[data.quantity.isin(R2_LOOKS)]))
        ax.axvline(0, color=GREY, linewidth=0.8)
        if (data[data.quantity == column]["mean"] < LEAST_R2).any():
            hollow = {
                "linestyle": "",
                "marker": "<",
                "fillstyle": "none",
                "color": look["color"],
                "markersize": 7,
            }
            _above(ax, [Line2D([], [], label=f"below {LEAST_R2:g}".replace("-", "−"), **hollow)])
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
            _points(
                axes[panel],
                rows.l0 * _apart(number, len(names)),
                rows,
                0 if panel == 2 else LEAST_R2,
                label=name if panel == 0 else None,
                **look,
            )
    for ax, label in zip(axes, (VECTOR_R2, NORM_R2, "share of the variance of x"), strict=True):
        _l0_axis(ax, data.l0)
        ax.set_ylabel(label)
    for ax in axes[:2]:
        ax.set_ylim(_r2_limits(data[data.quantity.isin(R2_LOOKS)]))
    axes[2].set_ylim(
        0, 1.2 * data[data.quantity == "fvu"]["mean"].max()
    )  # a collapsed seed would take all the room
    _above(
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
            _points(
                ax,
                at.iloc[order],
                rows.iloc[order],
                0 if column == "fvu_nonlinear" else LEAST_R2,
                label=name if ax is axes[0] else None,
                elinewidth=0.9,
                **architecture_look(name),
            )
        ax.set(xlim=(0, min(1.06 * fvu.max(), 2.5 * fvu.median())), xlabel="FVU")
    axes[0].set(ylabel=VECTOR_R2, ylim=_r2_limits(of["vector_r2"]))
    axes[1].set(ylabel=FVU_NL, ylim=(0, 1.2 * of["fvu_nonlinear"]["mean"].max()))
    axes[1].axline((0, 0), slope=1, color=GREY, linewidth=0.9, linestyle=":")
    _above(
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
    points = ax.scatter(
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
    bar = fig.colorbar(points, ax=ax)
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
            _points(
                ax,
                rows.l0 * _apart(number, len(NORM_LOOKS)),
                rows,
                LEAST_R2,
                linewidth=1.3,
                elinewidth=0.8,
                **look,
            )
        _l0_axis(ax, data.l0)
        ax.set_title(name)
    axes[0, 0].set(
        ylabel="R² as predicted from x", ylim=_r2_limits(data[data.quantity.isin(NORM_LOOKS)])
    )
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right center", handlelength=3.5
    )
    return fig


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
    _points(axes[0], of["fvu"].d_sae, of["fvu"], 0, linestyle="", **FVU_LOOKS["fvu"])
    known = f"exponent of the law: {_plus_minus(single.loc['exponent'])}"
    if single["mean"].notna()["miss"]:  # unknown from too few widths
        known += f"\nFVU of the widest over its prediction: {_plus_minus(single.loc['miss'])}"
    _above(
        axes[0],
        [Line2D([], [], linestyle="", **FVU_LOOKS["fvu"]), curve, dashed, *areas],
        ncols=3,
        title=known,
    )

    for panel, looks, least in ((1, FVU_LOOKS, 0), (2, R2_LOOKS, LEAST_R2)):
        for (column, look), line in zip(looks.items(), ("-", "--"), strict=True):
            _points(axes[panel], of[column].d_sae, of[column], least, linestyle=line, **look)
        _above(axes[panel], ncols=1 if panel == 2 else 2)
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
    axes[2].set_ylim(_r2_limits(measured[measured.quantity.isin(R2_LOOKS)]))
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
        image = ax.imshow(
            shades, cmap="Blues", vmin=0, vmax=1.6, aspect="equal"
        )  # 1 is light enough for black text
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


def dark_baselines(data: pd.DataFrame) -> Figure:
    """What else predicts the norm of the error.

    Paper: Dark matter, Figure 13.

    R² of ‖error‖² of one SAE from x and from simpler things: columns predictor, mean, low, high.
    """
    names = list(data.predictor)
    fig, ax = plt.subplots(figsize=(6.4, 0.8 + 0.36 * len(names)))
    ax.barh(range(len(names)), data["mean"].clip(lower=LEAST_R2), height=0.5, color="#c4c6ca")
    _points(
        ax,
        np.arange(len(names)),
        data,
        LEAST_R2,
        across=True,
        linestyle="",
        **R2_LOOKS["norm_r2"] | {"label": None},
    )
    ax.axvline(0, color="black", linewidth=0.8)
    _names_down(ax, names)
    ax.set(
        xlim=_r2_limits(data.assign(low=data.low.clip(upper=0).fillna(0))),
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
            _points(
                ax,
                at,
                rows,
                0 if ax is axes[2] else LEAST_R2,
                across=True,
                linestyle="",
                label=label,
                **look,
            )
    _names_down(axes[0], names)
    for ax, column in ((axes[0], "vector_r2"), (axes[1], "norm_r2")):
        ax.set(
            xlabel=R2_LOOKS[column]["label"], xlim=_r2_limits(data[data.quantity.isin(R2_LOOKS)])
        )
    axes[2].set(xlabel=FVU_NL, xlim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=many)
    return fig
