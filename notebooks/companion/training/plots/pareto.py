"""Figures of notebook 03: sparsity against fidelity, by architecture, site, layer and scale."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from ...rails.figures import use_style
from ...rails.looks import architecture_look, error_bars, plain_ticks
from ...rails.repeats import mean_interval
from ...rails.scaling import fit_power_law

use_style()

METRIC_LABELS = {"fvu": "FVU", "delta_loss": "delta LM loss, nats per token"}
RATIO_LABELS = {"fvu": "FVU", "delta_loss": "delta LM loss"}


def _log_axes(ax: plt.Axes) -> None:
    """Both axes logarithmic with plain numbers; to be called when the limits are as they will
    be."""
    ax.set(xscale="log", yscale="log")
    plain_ticks(ax.xaxis)
    plain_ticks(ax.yaxis)


def tuning(data: pd.DataFrame) -> Figure:
    """Every architecture at every learning rate.

    Paper: none; a check that baselines are tuned.

    One panel an architecture, one curve a learning rate: columns architecture, lr, l0, fvu,
    best.
    """
    groups = list(data.groupby("architecture", sort=False))
    rows = -(-len(groups) // 3)
    fig, axes = plt.subplots(
        rows, 3, figsize=(9.5, 2.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    for ax, (name, runs) in zip(axes.flat, groups, strict=False):
        for number, (lr, one) in enumerate(runs.groupby("lr")):
            one = one.sort_values("l0")
            chosen = bool(one.best.any())
            ax.plot(
                one.l0,
                one.fvu,
                color=f"C{number}",
                linestyle=("-", "--", ":", "-.")[number % 4],
                marker="os^Dv"[number % 5],
                linewidth=2.4 if chosen else 1.0,
                label=f"lr {lr:g}" + (" (chosen)" if chosen else ""),
            )
        ax.set_title(name)
        ax.legend(fontsize=7)
    axes[0, 0].set(xlim=(max(1, 0.8 * data.l0.min()), 1.25 * data.l0.max()))
    axes[0, 0].set(ylim=(0.8 * data.fvu.min(), min(1.2, 1.1 * data.fvu.max())))
    _log_axes(axes[0, 0])
    for ax in axes.flat[len(groups) :]:
        ax.axis("off")
    fig.supxlabel("L0", fontsize=9)
    fig.supylabel("FVU", fontsize=9)
    return fig


def pareto(data: pd.DataFrame) -> Figure:
    """Delta LM loss and FVU against L0, eight variants.

    Paper: JumpReLU, Figures 2, 8 and 12.

    Frontiers: columns architecture, metric, kind ("run" or "band"), seed, l0, value, low, high
    (a band's 95 % over seeds).
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for ax, metric in zip(axes, ("delta_loss", "fvu"), strict=True):
        for name, rows in data[data.metric == metric].groupby("architecture", sort=False):
            look = architecture_look(name)
            band, runs = rows[rows.kind == "band"], rows[rows.kind == "run"]
            ax.plot(band.l0, band.value, **look | {"marker": ""})
            ax.fill_between(
                band.l0, band.low, band.high, color=look["color"], alpha=0.15, linewidth=0
            )
            ax.plot(runs.l0, runs.value, **look | {"linestyle": ""}, markersize=3.5, alpha=0.8)
            ax.plot([], [], **look, label=name)
        ax.set(xlabel="L0", ylabel=METRIC_LABELS[metric])
        _log_axes(ax)
    axes[0].legend()
    return fig


def _forest(ax: plt.Axes, rows: pd.DataFrame, labels: pd.Series, offset: float, look: dict) -> None:
    ax.errorbar(
        rows["mean"],
        [list(dict.fromkeys(labels)).index(each) + offset for each in labels],
        xerr=error_bars(rows),
        linestyle="",
        capsize=3,
        **look,
    )


def _ratio_axis(ax: plt.Axes, data: pd.DataFrame) -> None:
    ax.axvline(1, color="#717581", linewidth=0.8)
    reach = np.nanmax(np.abs(np.log(data[["mean", "low", "high"]].clip(0.2, 5).to_numpy())))
    ax.set(xscale="log", xlim=(np.exp(-1.08 * reach), np.exp(1.08 * reach)))
    marks = [
        mark
        for mark in (0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5)
        if abs(np.log(mark)) < 1.08 * reach
    ]
    if len(marks) > 7:
        marks = [mark for mark in marks if mark in (0.2, 0.5, 0.7, 1, 1.5, 2, 5)]
    ax.set_xticks(marks, [f"{mark:g}" for mark in marks])
    ax.xaxis.set_minor_locator(ticker.NullLocator())


METRIC_MARKS = {
    "delta_loss": {"color": "#3f90da", "marker": "o"},
    "fvu": {"color": "#bd1f01", "marker": "s"},
}


def matched_l0(data: pd.DataFrame) -> Figure:
    """Ratios of delta LM loss and FVU at equal L0, with intervals.

    Paper: none; JumpReLU, Figures 2 and 12, as ratios.

    Ratios at equal L0, mean and 95 % interval over seeds: columns one, other, metric, mean, low,
    high.
    """
    pairs = data.one + " / " + data.other
    fig, ax = plt.subplots(figsize=(7.5, 0.6 + 0.34 * pairs.nunique()))
    for offset, (metric, look) in zip((-0.13, 0.13), METRIC_MARKS.items(), strict=True):
        _forest(
            ax,
            data[data.metric == metric],
            pairs[data.metric == metric],
            offset,
            look | {"label": RATIO_LABELS[metric]},
        )
    ax.set_yticks(range(pairs.nunique()), list(dict.fromkeys(pairs)))
    ax.invert_yaxis()
    _ratio_axis(ax, data)
    ax.set_xlabel("ratio at equal L0 (below 1: the first is the better one)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def places(data: pd.DataFrame) -> Figure:
    """Delta LM loss and FVU against L0 at three sites and three layers.

    Paper: JumpReLU, Figures 2, 10, 11 and 12.

    Runs at several sites and layers: columns site, layer, architecture, seed, l0, fvu,
    delta_loss.
    """
    groups = list(data.groupby(["site", "layer"], sort=False))
    fig, axes = plt.subplots(
        2, len(groups), figsize=(2.5 * len(groups) + 0.8, 5), sharex="col", squeeze=False
    )
    for column, ((site, layer), runs) in zip(axes.T, groups, strict=True):
        for ax, metric in zip(column, ("delta_loss", "fvu"), strict=True):
            for name, rows in runs.groupby("architecture", sort=False):
                look = architecture_look(name)
                for number, (_, one) in enumerate(
                    rows[rows[metric] > 0].sort_values("l0").groupby("seed")
                ):
                    ax.plot(
                        one.l0,
                        one[metric],
                        **look,
                        label=name if number == 0 else None,
                        linewidth=1.2,
                        markersize=3,
                    )
            _log_axes(ax)
        column[0].set_title(f"{site}, layer {layer}")
        column[1].set_xlabel("L0")
    for ax, metric in zip(axes[:, 0], ("delta_loss", "fvu"), strict=True):
        ax.set_ylabel(METRIC_LABELS[metric])
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def place_ratios(data: pd.DataFrame) -> Figure:
    """Ratios at equal L0, site by site and layer by layer.

    Paper: none; JumpReLU, Figures 2, 10, 11 and 12, as ratios.

    JumpReLU over each other architecture by place: columns place, other, metric, mean, low, high
    (95 %).
    """
    others = list(data.other.unique())
    fig, axes = plt.subplots(
        1,
        len(others),
        figsize=(2.6 * len(others) + 1.2, 0.9 + 0.34 * data.place.nunique()),
        sharey=True,
        squeeze=False,
    )
    for ax, other in zip(axes[0], others, strict=True):
        one = data[data.other == other]
        for offset, (metric, look) in zip((-0.13, 0.13), METRIC_MARKS.items(), strict=True):
            rows = one[one.metric == metric]
            _forest(ax, rows, rows.place, offset, look | {"label": RATIO_LABELS[metric]})
        _ratio_axis(ax, one)
        ax.set_title(f"JumpReLU / {other}")
    axes[0, 0].set_yticks(range(data.place.nunique()), list(dict.fromkeys(data.place)))
    axes[0, 0].invert_yaxis()
    fig.supxlabel("ratio at equal L0 (below 1: JumpReLU is the better one)", fontsize=9)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


SCALED = {"width": "d_sae", "tokens": "training tokens"}


def scaling(data: pd.DataFrame) -> Figure:
    """Errors over width and over tokens, and what power laws predict.

    Paper: none; compare Gemma Scope, Figure 4.

    Errors (rows) against what grows (columns): mean and 95 % t-interval over seeds, both axes
    logarithmic.

    data: columns architecture, quantity (of SCALED), x, metric (of METRIC_LABELS), seed, value.
    Thin dashes lead to the hollow mark that a power law predicts at the largest x, fitted to the
    means at all the others; where these are fewer than two, or one of them is not positive,
    there is none. Architectures are drawn a little apart at an x, so that their intervals can be
    told apart.
    """
    quantities, metrics = (
        [name for name in names if name in set(data[column])]
        for column, names in (("quantity", SCALED), ("metric", METRIC_LABELS))
    )
    fig, axes = plt.subplots(
        len(metrics),
        len(quantities),
        figsize=(3.9 * len(quantities), 2.7 * len(metrics) + 0.3),
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    looks = [(name, architecture_look(name)) for name in data.architecture.unique()]
    dashes = {"linestyle": (0, (2, 1.5)), "linewidth": 0.8}
    hollow = {"markerfacecolor": "none", "markersize": 6}
    for line, metric in zip(axes, metrics, strict=True):
        middles = []
        for ax, quantity in zip(line, quantities, strict=True):
            ax.set(xscale="log", yscale="log")
            shown = data[(data.metric == metric) & (data.quantity == quantity)]
            span = shown.x.max() / shown.x.min()
            for place, (name, look) in enumerate(looks):
                rows = shown[shown.architecture == name]
                # In the order of x
                found = {x: mean_interval(values) for x, values in rows.groupby("x").value}
                x, means = np.array(list(found)), np.array([each.mean for each in found.values()])
                apart = x * span ** (0.015 * (place - (len(looks) - 1) / 2))
                ax.errorbar(
                    apart,
                    means,
                    yerr=[each.half for each in found.values()],
                    capsize=2,
                    elinewidth=0.8,
                    label=name,
                    **look,
                )
                middles += list(means[means > 0])
                if len(x) > 2 and (means[:-1] > 0).all():
                    predicted = fit_power_law(x[:-1], means[:-1]).at(x[-2:])
                    ax.plot(apart[-2:], predicted, color=look["color"], **dashes)
                    ax.plot(
                        apart[-1],
                        predicted[-1],
                        color=look["color"],
                        marker=look["marker"],
                        **hollow,
                    )
                    middles.append(predicted[-1])
        low, high = line[
            0
        ].get_ylim()  # an interval of few seeds may go down to 0, and would flatten the curves
        line[0].set_ylim(max(low, min(middles) / 3), min(high, max(middles) * 3))
        line[0].set_ylabel(METRIC_LABELS[metric])
        plain_ticks(line[0].yaxis)
    for ax, quantity in zip(axes[-1], quantities, strict=True):
        plain = (
            ticker.EngFormatter(sep="")
            if quantity == "tokens"
            else ticker.StrMethodFormatter("{x:.0f}")
        )
        values = np.sort(data[data.quantity == quantity].x.unique())
        ax.set_xticks(values, [plain(value) for value in values])
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.set_xlabel(SCALED[quantity])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    (hint,) = axes[0, 0].plot([], [], color="#717581", marker="o", **dashes, **hollow)
    fig.legend(
        [*handles, hint], [*labels, "power law of the others"], loc="outside upper center", ncols=5
    )
    return fig
