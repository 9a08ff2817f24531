"""What the figures of several notebooks share."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axis import Axis

from .repeats import mean_interval

GREY = "#717581"
"""Of what is no data: zero lines, levels to compare with."""


def look_of(text: str) -> dict[str, str]:
    """Keywords of `Axes.plot` from "colour line marker", such as "3f90da - o": colour in
    hexadecimal."""
    color, line, marker = text.split()
    return {"color": f"#{color}", "linestyle": line, "marker": marker}


def error_bars(data: pd.DataFrame) -> list[pd.Series]:
    """Lengths of the error bars of columns mean, low and high, for `Axes.errorbar`."""
    return [data["mean"] - data.low, data.high - data["mean"]]


def ticks_at(ax: plt.Axes, values: pd.Series) -> None:
    """Logarithmic x axis, marked at the plotted values: between a few of those, matplotlib's own
    labels overlap."""
    ax.set_xscale("log")
    ax.set_xticks(sorted(values.unique()), [f"{v:g}" for v in sorted(values.unique())])
    ax.xaxis.set_minor_locator(plt.NullLocator())


def plain_ticks(axis: Axis) -> None:
    """Ticks in plain numbers on a logarithmic axis, at the roundest values of which at least three
    are in view."""
    low, high = sorted(axis.get_view_interval())
    tens = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        np.arange(1, 10, 0.5),
        np.arange(1, 10, 0.1),
    ):
        ticks = [value for value in np.outer(tens, steps).ravel() if low <= value <= high]
        if len(ticks) >= 3:
            break
    axis.set_ticks(ticks, [f"{value:.4g}" for value in ticks])
    axis.set_minor_locator(ticker.NullLocator())


def l0_axis(ax: plt.Axes, l0: pd.Series) -> None:
    """Logarithmic x axis over `l0`, marked in plain numbers."""
    ax.set(xscale="log", xlim=(0.8 * l0.min(), 1.25 * l0.max()), xlabel="L0")
    plain_ticks(ax.xaxis)


def points_and_mean(ax: plt.Axes, groups: pd.Series, values: pd.Series) -> None:
    """Each group's points, and their mean with a 95 % t-interval."""
    for position, (name, rows) in enumerate(values.groupby(groups, sort=False)):
        found = mean_interval(rows)
        ax.errorbar(
            [position],
            [found.mean],
            yerr=found.half,
            marker="D",
            capsize=5,
            color=f"C{position}",
            label=name,
        )
        ax.scatter(np.full(len(rows), position) + 0.12, rows, s=12, color=f"C{position}", alpha=0.6)
    ax.set_xticks(range(groups.nunique()), list(dict.fromkeys(groups)))
    ax.margins(x=0.25)


ARCHITECTURES = {
    "JumpReLU": "3f90da - o",
    "JumpReLU, ε falls": "3f90da : X",
    "TopK": "ffa90e -- s",
    "TopK, approximate": "b9ac70 -. P",
    "BatchTopK": "a96b59 -. D",
    "Gated": "bd1f01 -- ^",
    "Gated, original": "e76300 : v",
    "ReLU": "717581 : *",
}


def architecture_look(name: str) -> dict[str, str]:
    """Colour, line and marker of an architecture, the same in every figure."""
    if name in ARCHITECTURES:
        return look_of(ARCHITECTURES[name])
    number = sum(map(ord, name))
    return {
        "color": f"C{number % 10}",
        "linestyle": ("-", "--", "-.", ":")[number % 4],
        "marker": "os^DvPX<>*"[number % 10],
    }
