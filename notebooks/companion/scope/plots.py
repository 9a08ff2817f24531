"""Figures of notebook 08: a release of SAEs, by site, layer, width, position and kind of text."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..rails.figures import use_style
from ..rails.looks import GREY, error_bars, l0_axis, look_of, ticks_at

use_style()

SITES = {
    "resid_post": "3f90da - o",
    "mlp_out": "bd1f01 -- s",
    "attn_out": "832db6 -. ^",
    "transcoder": "ffa90e : D",
}
WIDTHS = ("ffa90e : o", "3f90da -- s", "832db6 - D", "bd1f01 -. ^", "717581 - v", "a96b59 -- P")
METRICS = {"delta_loss": "delta LM loss (nats per token)", "fvu": "FVU"}
STEP_PARTS = {
    "encode": ("#3f90da", ""),
    "weights": ("#ffa90e", "//"),
    "entries": ("#832db6", ".."),
    "exchange": ("#bd1f01", "xx"),
}


def _look(site: str) -> dict[str, str]:
    return look_of(SITES.get(site, "717581 : D")) | {"label": site}


def _width_looks(data: pd.DataFrame) -> dict[int, dict[str, str]]:
    return {
        width: look_of(look) | {"label": f"{width:g}"}
        for width, look in zip(sorted(data.width.unique()), WIDTHS, strict=False)
    }


def _plain(axis: plt.Axis) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _curves(ax: plt.Axes, rows: pd.DataFrame, metric: str, look: dict) -> None:
    """A curve a seed; bars are 95 % over documents."""
    for number, (_, one) in enumerate(rows.sort_values("l0").groupby("seed")):
        style = look if number == 0 else look | {"label": None}
        ax.errorbar(
            one.l0,
            one[metric],
            yerr=1.96 * one[f"{metric}_se"],
            capsize=2,
            elinewidth=0.8,
            linewidth=1.2,
            **style,
        )


def _floor(ax: plt.Axes, values: pd.Series) -> None:
    """Bars on a logarithmic axis may reach 0: the axis ends well below the lowest value."""
    ax.set_yscale("log")
    if (values > 0).any():
        ax.set_ylim(0.5 * values[values > 0].min(), 1.6 * values.max())
    _plain(ax.yaxis)


def scope_tradeoff(data: pd.DataFrame) -> Figure:
    """Delta LM loss and FVU against L0, by site, of a release.

    Paper: Gemma Scope, Figures 2 and 13.

    By site: columns site, seed, l0, delta_loss, delta_loss_se, fvu, fvu_se. A curve a seed, bars
    95 % over documents.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.5))
    for ax, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for site, rows in data.groupby("site", sort=False):
            _curves(ax, rows, metric, _look(site))
        l0_axis(ax, data.l0)
        ax.set_ylabel(label)
    _floor(axes[0], data.delta_loss)
    axes[1].set_ylim(0, None)
    axes[1].legend()
    return fig


def scope_transcoders(data: pd.DataFrame) -> Figure:
    """Transcoders beside SAEs of the MLP's output.

    Paper: Gemma Scope, Figure 11.

    Transcoders beside SAEs of the MLP's output: columns and curves as of :func:`scope_tradeoff`.
    """
    return scope_tradeoff(data)


def scope_layers(data: pd.DataFrame) -> Figure:
    """Delta LM loss and FVU at one L0, by layer.

    Paper: Gemma Scope, Figures 17 and 18.

    By layer at one L0: columns site, layer, metric (of METRICS), mean, low, high (95 % over
    documents).
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))
    for ax, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for number, (site, rows) in enumerate(
            data[data.metric == metric].groupby("site", sort=False)
        ):
            rows = rows.sort_values("layer")
            at = rows.layer + 0.06 * (number - 1)
            ax.errorbar(
                at, rows["mean"], error_bars(rows), capsize=2, elinewidth=0.8, **_look(site)
            )
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        ax.set(xlabel="layer", ylabel=label)
    _floor(axes[0], data[data.metric == "delta_loss"]["mean"])
    axes[1].set_ylim(0, None)
    axes[1].legend()
    return fig


def scope_widths(data: pd.DataFrame) -> Figure:
    """Delta LM loss and FVU against L0, by width.

    Paper: Gemma Scope, Figure 4.

    The width ladder, a column a site: columns site, width, seed, l0, delta_loss, delta_loss_se,
    fvu, fvu_se.
    """
    sites, looks = list(dict.fromkeys(data.site)), _width_looks(data)
    fig, axes = plt.subplots(
        2, len(sites), figsize=(2.9 * len(sites) + 0.6, 5), sharex="col", squeeze=False
    )
    for column, site in zip(axes.T, sites, strict=True):
        rows = data[data.site == site]
        for ax, metric in zip(column, METRICS, strict=True):
            for width, look in looks.items():
                _curves(ax, rows[rows.width == width], metric, look)
            l0_axis(ax, data.l0)
        _floor(column[0], rows.delta_loss)
        column[0].set(title=site, xlabel="")
        column[1].set_ylim(0, 1.1 * data.fvu.max())
    for ax, label in zip(axes[:, 0], METRICS.values(), strict=True):
        ax.set_ylabel(label)
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(looks),
        title="width",
    )
    return fig


def scope_frequency(data: pd.DataFrame) -> Figure:
    """How often latents fire, by width.

    Paper: Gemma Scope, Figure 5.

    Share of latents by frequency, a panel a site: columns site, width, dead, log10_frequency,
    mean, low, high.

    Lines are means over seeds, bands 95 % over seeds; on the right, the number of latents, so
    that clusters can be compared.
    """
    sites, looks = list(dict.fromkeys(data.site)), _width_looks(data)
    fig, axes = plt.subplots(
        2, len(sites), figsize=(2.9 * len(sites) + 0.6, 4.8), sharex="row", squeeze=False
    )
    for column, site in zip(axes.T, sites, strict=True):
        for width, look in looks.items():
            rows = data[(data.site == site) & (data.width == width) & ~data.dead]
            middles = np.sort(rows.log10_frequency.unique())
            edges = 10.0 ** np.append(middles + middles[-1], 0)  # the last bin ends at log10 1 = 0
            style = {"color": look["color"], "linestyle": look["linestyle"], "baseline": None}
            column[0].stairs(rows["mean"], edges, linewidth=1.4, **style)
            column[1].stairs(rows["mean"] * width, edges, linewidth=1.4, **style)
            if rows.low.notna().all():  # one seed has no interval
                column[0].stairs(
                    rows.high,
                    edges,
                    baseline=rows.low.clip(lower=0),
                    fill=True,
                    color=look["color"],
                    alpha=0.2,
                )
        for ax in column:
            ax.set_xscale("log")
            ax.axvline(0.1, color=GREY, linewidth=0.8, linestyle=":")
        shown = data[(data.site == site) & (data.log10_frequency > -1.3)]
        column[0].set(title=site, ylim=(0, None))
        column[1].set(xlim=(0.05, 1), ylim=(0, 1.2 * (shown["mean"] * shown.width).max()))
        _plain(column[1].xaxis)
    axes[0, 0].set_ylabel("share of latents")
    axes[1, 0].set_ylabel("number of latents, right end")
    fig.supxlabel("share of tokens on which a latent fires (dotted: 10 %)", fontsize=9)
    handles = [Line2D([], [], **{**look, "marker": ""}) for look in looks.values()]
    fig.legend(handles=handles, loc="outside right center", title="width")
    return fig


def scope_positions(data: pd.DataFrame) -> Figure:
    """Delta LM loss by position in the text.

    Paper: Gemma Scope, Figure 3.

    Delta LM loss by position: columns site, start, end, quantity (delta_loss, relative), mean,
    low, high (over documents).
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.8, 3.6))
    labels = {"delta_loss": METRICS["delta_loss"], "relative": "over its mean at all positions"}
    bins = data.drop_duplicates("start")
    for ax, (quantity, label) in zip(axes, labels.items(), strict=True):
        for number, (site, rows) in enumerate(
            data[data.quantity == quantity].groupby("site", sort=False)
        ):
            at = np.arange(len(rows)) + 0.1 * (number - 1)
            ax.errorbar(
                at,
                rows["mean"],
                error_bars(rows),
                capsize=2,
                elinewidth=0.8,
                linewidth=1.2,
                **_look(site),
            )
        names = [
            f"{row.start}" if row.start == row.end else f"{row.start}–{row.end}"
            for row in bins.itertuples()
        ]
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.set(xlabel="position in the row", ylabel=label)
    values = data[(data.quantity == "delta_loss") & (data["mean"] > 0)]["mean"]
    _floor(axes[0], values)
    axes[1].axhline(1, color=GREY, linewidth=0.8)
    relative = data[data.quantity == "relative"]
    axes[1].set_ylim(min(0, 1.1 * relative["mean"].min()), 1.5 * relative["mean"].max())
    axes[1].legend()
    return fig


def scope_subsets(data: pd.DataFrame) -> Figure:
    """Delta LM loss by kind of text.

    Paper: Gemma Scope, Figure 9.

    By kind of text: columns subset, documents, site, quantity (ratio is shown), mean, low, high
    (95 % over documents).
    """
    shown = data[data.quantity == "ratio"]
    names = list(dict.fromkeys(shown.subset))
    number = shown.drop_duplicates("subset").set_index("subset").documents
    fig, ax = plt.subplots(figsize=(6.6, 1.3 + 0.42 * len(names)))
    for place, (site, rows) in enumerate(shown.groupby("site", sort=False)):
        at = [names.index(name) + 0.2 * (place - 1) for name in rows.subset]
        ax.errorbar(
            rows["mean"], at, xerr=error_bars(rows), capsize=2, **_look(site) | {"linestyle": ""}
        )
    ax.axvline(1, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(names)), [f"{name} (n = {number[name]:g})" for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(
        xlabel="delta LM loss over that of all other documents",
        xlim=(0, min(3, 1.05 * shown.high.max())),
    )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def scope_dtype(data: pd.DataFrame) -> Figure:
    """SAEs run in bfloat16 beside the same in float32.

    Paper: Gemma Scope, Figure 10.

    SAEs run in bfloat16 against float32: columns site, mean, low, high, of the relative change
    of delta LM loss.
    """
    fig, ax = plt.subplots(figsize=(5.2, 1.2 + 0.4 * len(data)))
    for place, row in enumerate(data.itertuples()):
        ends = [[100 * (row.mean - row.low)], [100 * (row.high - row.mean)]]
        ax.errorbar([100 * row.mean], [place], xerr=ends, capsize=4, **_look(row.site))
    reach = 1.3 * max(1, 100 * data[["low", "high"]].abs().max(axis=None))
    ax.axvspan(-1, 1, color=GREY, alpha=0.15, linewidth=0)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(data)), data.site)
    ax.set(ylim=(len(data) - 0.5, -0.5), xlim=(-reach, reach))
    ax.set_xlabel("change of delta LM loss by bfloat16, % (grey: within 1 %)")
    return fig


def scope_uniformity(data: pd.DataFrame) -> Figure:
    """How evenly active latents matter (r_L0), against L0.

    Paper: Gemma Scope, Figure 16.

    r_L0 against L0: columns site, point, l0, mean, low, high (95 % over documents and seeds).
    """
    fig, ax = plt.subplots(figsize=(5.6, 3.6))
    ax.axhspan(0.45, 0.7, color=GREY, alpha=0.12, linewidth=0, label="reported range")
    for number, (site, rows) in enumerate(data.groupby("site", sort=False)):
        rows = rows.sort_values("l0")
        ax.errorbar(
            rows.l0 * 1.015 ** (number - 1),
            rows["mean"],
            error_bars(rows),
            capsize=2,
            elinewidth=0.8,
            **_look(site),
        )
    l0_axis(ax, data.l0)
    ax.set_ylabel("r$_\\mathrm{L0}$")
    ax.legend()
    return fig


DARK = {
    "vector_r2": "R² of the error, pooled",
    "norm_r2": "R² of ‖error‖²",
    "fvu_nonlinear": "FVU$_\\mathrm{nl}$",
}


def scope_dark(data: pd.DataFrame) -> Figure:
    """Linear share of a release's errors, by layer and width.

    Paper: Dark matter, Figures 2 and 3.

    Linear share of SAE errors: columns panel ("layer", "width"), site, x, quantity (of DARK),
    mean, low, high.

    Above, by layer; below, by width at one L0. Bars are 95 % over documents.
    """
    fig, axes = plt.subplots(2, 3, figsize=(9.6, 5.4), sharex="row", sharey="col")
    for line, panel in zip(axes, ("layer", "width"), strict=True):
        part = data[data.panel == panel]
        for ax, (quantity, label) in zip(line, DARK.items(), strict=True):
            for number, (site, rows) in enumerate(
                part[part.quantity == quantity].groupby("site", sort=False)
            ):
                rows = rows.sort_values("x")
                apart = rows.x + 0.06 * (number - 1) if panel == "layer" else rows.x
                ax.errorbar(
                    apart, rows["mean"], error_bars(rows), capsize=2, elinewidth=0.8, **_look(site)
                )
            ax.set(xlabel=panel, ylabel=label)
            ax.yaxis.set_tick_params(labelleft=True)
            if panel == "width":
                ticks_at(ax, part.x)
            else:
                ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def scope_plan(data: pd.DataFrame) -> Figure:
    """A training step of 131k latents on paper, beside the reported one.

    Paper: none; Gemma Scope reports its hardware in words.

    Time of a step by part: columns quantity, gpus, value, unit, kind, of `scopestudy.plan`.
    """
    steps = data[(data.quantity == "step") & (data.kind == "derived")].sort_values("gpus")
    reported = data[(data.quantity == "step") & (data.kind == "reported")].iloc[0]
    fig, ax = plt.subplots(figsize=(7.4, 1.2 + 0.42 * (len(steps) + 1)))
    for place, gpus in enumerate(steps.gpus):
        start = 0.0
        for part, (color, hatch) in STEP_PARTS.items():
            value = data[(data.gpus == gpus) & (data.quantity == f"step: {part}")].value.iloc[0]
            ax.barh(
                place,
                value,
                left=start,
                height=0.55,
                color=color,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
                label=part if place == 0 else None,
            )
            start += value
        ax.text(start + 0.6, place, f"{start:.1f} ms", va="center", fontsize=8)
    ax.barh(
        len(steps),
        reported.value,
        height=0.55,
        color="white",
        edgecolor=GREY,
        hatch="....",
        linewidth=1,
    )
    ax.text(reported.value + 0.6, len(steps), f"{reported.value:g} ms", va="center", fontsize=8)
    names = [f"{gpus:g} GPU{'s' if gpus > 1 else ''}, derived" for gpus in steps.gpus]
    ax.set_yticks(range(len(steps) + 1), [*names, f"{reported.gpus:g} TPU v5p, reported"])
    ax.set(
        ylim=(len(steps) + 0.5, -0.5),
        xlabel="time of a training step, ms",
        xlim=(0, 1.15 * reported.value),
    )
    ax.grid(axis="y", visible=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(STEP_PARTS))
    return fig
