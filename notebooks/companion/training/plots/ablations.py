"""Figures of notebook 05: the recipe taken apart, and bandwidths that fall."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jumprelu.intervals import Interval

from ...rails.figures import MARKERS, use_style
from ...rails.looks import error_bars, ticks_at
from ...rails.repeats import mean_interval

use_style()


def _intervals_of(
    groups: Iterable[tuple[float, pd.DataFrame]], column: str
) -> list[tuple[float, Interval]]:
    """(x, interval over seeds) of a column, in each group that has it."""
    return [
        (x, mean_interval(rows[column].dropna()))
        for x, rows in groups
        if rows[column].notna().any()
    ]


def ablations(data: pd.DataFrame) -> Figure:
    """One change to the recipe at a time.

    Paper: JumpReLU, Figure 17 (kernels) and, in the ICLR version, Appendix H.

    One row a run: architecture (the change), seed, l0, fvu, dead, ratio (FVU over the recipe's
    at that L0; may be NaN).
    """
    names = list(dict.fromkeys(data.architecture))
    fig, axes = plt.subplots(
        1, 3, figsize=(10.5, 0.8 + 0.29 * len(names)), sharey=True, width_ratios=(2.2, 1, 1)
    )
    for row, (_, runs) in enumerate(data.groupby("architecture", sort=False)):
        known = runs.ratio.dropna()
        if len(known):
            found = mean_interval(known)
            axes[0].errorbar(
                found.mean, row, xerr=found.half, color="#3f90da", marker="o", capsize=3
            )
            axes[0].plot(known, np.full(len(known), row + 0.22), "|", color="#717581", markersize=5)
        else:
            axes[0].annotate(
                "L0 out of the recipe's range", (1, row), fontsize=7, va="center", color="#717581"
            )
        for ax, column, color in ((axes[1], "l0", "#a96b59"), (axes[2], "dead", "#bd1f01")):
            found = mean_interval(runs[column])
            ax.errorbar(
                found.mean,
                row,
                xerr=min(found.half, found.mean) if found.half == found.half else None,
                color=color,
                marker="s",
                capsize=3,
            )
    axes[0].axvline(1, color="#717581", linewidth=0.8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set(xscale="log", xlabel="FVU over the recipe's at equal L0 (above 1: worse)")
    axes[0].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
    axes[0].xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[0].xaxis.set_minor_locator(ticker.NullLocator())
    axes[1].set(xscale="log", xlabel="L0")
    axes[1].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[1].xaxis.set_minor_locator(ticker.NullLocator())
    axes[2].set(xlabel="share of dead latents", xlim=(-0.03, 1.03))
    return fig


def bandwidth_sweep(data: pd.DataFrame) -> Figure:
    """L0, travel of θ and fidelity over a fixed ε.

    Paper: none; Gemma Scope's footnote on the bandwidth.

    One row a run with a fixed ε: bandwidth, seed, l0, fvu, threshold_rise, threshold_travel,
    ratio.
    """
    fig, axes = plt.subplots(1, 3, figsize=(10, 3))
    lines = [
        (0, "l0", "-", "full", None),
        (1, "threshold_rise", "-", "full", "up"),
        (1, "threshold_travel", ":", "none", "up or down"),
        (2, "ratio", "-", "full", None),
    ]
    for panel, column, line, filled, label in lines:
        points = _intervals_of(data.groupby("bandwidth"), column)
        axes[panel].errorbar(
            [e for e, _ in points],
            [i.mean for _, i in points],
            yerr=[i.half for _, i in points],
            capsize=3,
            marker=MARKERS[panel],
            color=f"C{panel}",
            linestyle=line,
            fillstyle=filled,
            label=label,
        )
    for ax, label in zip(
        axes, ("L0", "mean change of log θ, nats", "FVU over the recipe's at equal L0"), strict=True
    ):
        ticks_at(ax, data.bandwidth)
        ax.set(xlabel="fixed bandwidth ε", ylabel=label)
    axes[0].set_ylim(0, None)
    axes[1].axhline(0, color="#717581", linewidth=0.8)
    axes[1].legend()
    axes[2].axhline(1, color="#717581", linewidth=0.8)
    return fig


def l0_targets(data: pd.DataFrame) -> Figure:
    """L0 asked for and L0 reached, three losses.

    Paper: JumpReLU, Figure 9.

    One row a run: loss, target, seed, l0, fvu, ratio.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for number, (name, runs) in enumerate(data.groupby("loss", sort=False)):
        look = {
            "color": f"C{number}",
            "marker": MARKERS[number],
            "linestyle": ("-", "--", "-.")[number % 3],
            "capsize": 3,
        }
        groups = list(runs.groupby("target"))
        shift = 1.03 ** (number - 1)
        for ax, column in zip(axes, ("l0", "ratio"), strict=True):
            values = _intervals_of(groups, column)
            ax.errorbar(
                [target * shift for target, _ in values],
                [i.mean for _, i in values],
                yerr=[i.half for _, i in values],
                label=name,
                **look,
            )
    for ax in axes:
        ticks_at(ax, data.target)
        ax.set_xlabel("target")
    low, high = data.target.min(), data.target.max()
    axes[0].plot([low, high], [low, high], color="#717581", linewidth=0.8, label="the target")
    axes[0].set(yscale="log", ylabel="L0 on held-out text")
    axes[0].set_yticks(
        sorted(data.target.unique()), [f"{t:g}" for t in sorted(data.target.unique())]
    )
    axes[0].yaxis.set_minor_locator(ticker.NullLocator())
    axes[1].axhline(1, color="#717581", linewidth=0.8)
    axes[1].set_ylabel("FVU over the plain L0 loss's at equal L0")
    axes[0].legend()
    return fig


TOPS = {"fvu": 1.06, "delta_loss": 1.3}
"""Upper ends of the axes of ratios; what lies beyond is a triangle with its value."""


def annealing(data: pd.DataFrame) -> Figure:
    """A falling ε, and momentum, against a fixed ε.

    Paper: none.

    Ratios to the first method at equal L0: columns architecture, place, tokens, metric, mean,
    low, high (95 % over seeds).
    """
    places = list(dict.fromkeys(data.place))
    names = list(dict.fromkeys(data.architecture))
    fig, axes = plt.subplots(
        2,
        len(places),
        figsize=(3.2 * len(places) + 1.4, 5.2),
        squeeze=False,
        sharey="row",
        width_ratios=[2] + [1] * (len(places) - 1),
    )
    for column, place in zip(axes.T, places, strict=True):
        for ax, metric in zip(column, ("fvu", "delta_loss"), strict=True):
            rows = data[(data.place == place) & (data.metric == metric)]
            for number, name in enumerate(names):
                one = rows[rows.architecture == name].sort_values("tokens")
                apart = 1.05 ** (number - len(names) / 2)
                look = {
                    "color": f"C{number}",
                    "linestyle": ("-", "--", "-.", ":")[number % 4],
                    "label": name,
                }
                shown, beyond = one[one["mean"] < TOPS[metric]], one[one["mean"] >= TOPS[metric]]
                ax.errorbar(
                    shown.tokens * apart,
                    shown["mean"],
                    error_bars(shown),
                    capsize=3,
                    marker=MARKERS[number],
                    **look,
                )
                for tokens, ratio in zip(beyond.tokens * apart, beyond["mean"], strict=True):
                    ax.plot(
                        tokens,
                        TOPS[metric],
                        marker="^",
                        fillstyle="none",
                        color=f"C{number}",
                        clip_on=False,
                    )
                    ax.annotate(
                        f"{name}: {ratio:.2f}",
                        (tokens, TOPS[metric]),
                        (6, -3),
                        textcoords="offset points",
                        fontsize=7,
                    )
            lowest = data[data.metric == metric][["mean", "low"]].min().min()
            ax.set_ylim(min(0.99, lowest - 0.01), TOPS[metric])
            ax.axhline(1, color="#717581", linewidth=0.8)
            ax.set_xscale("log")
            ax.set_xticks(
                sorted(rows.tokens.unique()),
                [
                    ticker.EngFormatter(places=1, sep="")(t).replace(".0", "")
                    for t in sorted(rows.tokens.unique())
                ],
            )
            ax.xaxis.set_minor_locator(ticker.NullLocator())
            if rows.tokens.nunique() == 1:
                ax.set_xlim(rows.tokens.min() / 1.5, rows.tokens.max() * 1.5)
        column[0].set_title(place)
        column[1].set_xlabel("training tokens")
    axes[0, 0].set_ylabel("FVU over that of ε = 0.1,\nequal L0")
    axes[1, 0].set_ylabel("delta LM loss over that\nof ε = 0.1, equal L0")
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=(len(names) + 1) // 2,
    )
    return fig


def estimator_along_run(data: pd.DataFrame) -> Figure:
    """Bias and noise over ε at up to four shares of a run; the best ε over the run beside the one
    that was used.

    Paper: none.

    data: `bandwidth.along_run` merged with `bandwidth.best_along` on share, and a column
    schedule: ε there in training. The best ε on the edge of the grid is a hollow triangle that
    points to where it must be sought. A bias that cannot be told from zero is a hollow triangle
    at the upper end of its interval.
    """
    fig, (parts, best) = plt.subplots(1, 2, figsize=(9.0, 4.0))
    shares, averaged = np.sort(data.share.unique()), data.averaged.iloc[0]
    shown = shares[np.unique(np.linspace(0, len(shares) - 1, 4).round().astype(int))]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(shown)))
    for share, color, marker in zip(shown, colors, MARKERS, strict=False):
        one = data[data.share == share].sort_values("bandwidth")
        parts.plot(
            one.bandwidth,
            np.sqrt(one.noise / averaged),
            color=color,
            marker=marker,
            markersize=3,
            linestyle=":",
        )
        told = one[one.bias2_low > 0]
        mean, low, high = (np.sqrt(told[column]) for column in ("bias2", "bias2_low", "bias2_high"))
        parts.errorbar(
            told.bandwidth,
            mean,
            [mean - low, high - mean],
            color=color,
            marker=marker,
            linestyle="-",
            capsize=2,
        )
        lost = one[(one.bias2_low <= 0) & (one.bias2_high > 0)]
        parts.plot(
            lost.bandwidth,
            np.sqrt(lost.bias2_high),
            color=color,
            marker="v",
            fillstyle="none",
            linestyle="",
        )
    ticks_at(parts, data.bandwidth)
    parts.set(
        yscale="log",
        xlabel="bandwidth ε (units in which E‖x‖² = 1)",
        ylabel="loss per unit of θ, RMS over latents",
    )
    looks = [
        ("-", "", "#717581", "bias"),
        ("", "v", "#717581", "bias: at most this"),
        (
            ":",
            "",
            "#717581",
            "noise of one batch" if averaged == 1 else f"noise of {averaged:g} batches",
        ),
    ]
    looks += [
        ("", marker, color, f"at {share:.0%} of the run")
        for share, color, marker in zip(shown, colors, MARKERS, strict=False)
    ]
    handles = [
        Line2D(
            [],
            [],
            linestyle=line,
            marker=marker,
            color=color,
            label=label,
            fillstyle="none" if marker == "v" else "full",
        )
        for line, marker, color, label in looks
    ]
    parts.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)

    each = data.drop_duplicates("share").sort_values("share")
    for name, marker, label in (
        (None, "o", ""),
        ("best_high", "^", ": at least this"),
        ("best_low", "v", ": at most this"),
    ):
        rows = each[each.edge & each[name].isna()] if name else each[~each.edge]
        if len(rows):
            ends = [(rows.best - rows.best_low).fillna(0), (rows.best_high - rows.best).fillna(0)]
            best.errorbar(
                rows.share,
                rows.best,
                ends,
                color="#3f90da",
                marker=marker,
                linestyle="",
                capsize=0 if name else 2,
                fillstyle="none" if name else "full",
                label=f"of least error{label}",
            )
    best.plot(each.share, each.schedule, color="#bd1f01", linestyle="--", label="in training")
    best.set(
        yscale="log", xlabel="share of the run", ylabel="bandwidth ε (units in which E‖x‖² = 1)"
    )
    grid = data.bandwidth.min(), data.bandwidth.max()
    # Intervals may be endless, so the axis ends near the values.
    best.set_ylim(min(grid[0], each.schedule.min()) / 1.3, max(grid[1], each.schedule.max()) * 1.3)
    best.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    best.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    best.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    best.yaxis.set_minor_formatter(ticker.NullFormatter())
    best.legend(loc="lower left", bbox_to_anchor=(0, 1.02))
    return fig
