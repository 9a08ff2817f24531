"""Figure of the straight-through gradient's bias and noise along a training run, and of the bandwidth it asks for."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..figures import MARKERS, use_style
from .common import ticks_at

use_style()


def estimator_along_run(data: pd.DataFrame) -> Figure:
    """Bias and noise over ε at up to four shares of a run; the best ε over the run beside the one that was used.

    data: `bandwidth.along_run` merged with `bandwidth.best_along` on share, and a column schedule: ε there in training. The
    best ε on the edge of the grid is a hollow triangle that points to where it must be sought. A bias that cannot be told from
    zero is a hollow triangle at the upper end of its interval.
    """
    fig, (parts, best) = plt.subplots(1, 2, figsize=(9.0, 4.0))
    shares, averaged = np.sort(data.share.unique()), data.averaged.iloc[0]
    shown = shares[np.unique(np.linspace(0, len(shares) - 1, 4).round().astype(int))]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(shown)))
    for share, color, marker in zip(shown, colors, MARKERS, strict=False):
        one = data[data.share == share].sort_values("bandwidth")
        parts.plot(one.bandwidth, np.sqrt(one.noise / averaged), color=color, marker=marker, markersize=3, linestyle=":")
        told = one[one.bias2_low > 0]
        mean, low, high = (np.sqrt(told[column]) for column in ("bias2", "bias2_low", "bias2_high"))
        parts.errorbar(told.bandwidth, mean, [mean - low, high - mean], color=color, marker=marker, linestyle="-", capsize=2)
        lost = one[(one.bias2_low <= 0) & (one.bias2_high > 0)]
        parts.plot(lost.bandwidth, np.sqrt(lost.bias2_high), color=color, marker="v", fillstyle="none", linestyle="")
    ticks_at(parts, data.bandwidth)
    parts.set(yscale="log", xlabel="bandwidth ε (units in which E‖x‖² = 1)", ylabel="loss per unit of θ, RMS over latents")
    looks = [("-", "", "#717581", "bias"), ("", "v", "#717581", "bias: at most this"),
             (":", "", "#717581", "noise of one batch" if averaged == 1 else f"noise of {averaged:g} batches")]  # fmt: skip
    looks += [("", marker, color, f"at {share:.0%} of the run")
              for share, color, marker in zip(shown, colors, MARKERS, strict=False)]  # fmt: skip
    handles = [Line2D([], [], linestyle=line, marker=marker, color=color, label=label,
                      fillstyle="none" if marker == "v" else "full") for line, marker, color, label in looks]  # fmt: skip
    parts.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)

    each = data.drop_duplicates("share").sort_values("share")
    for name, marker, label in ((None, "o", ""), ("best_high", "^", ": at least this"), ("best_low", "v", ": at most this")):
        rows = each[each.edge & each[name].isna()] if name else each[~each.edge]
        if len(rows):
            ends = [(rows.best - rows.best_low).fillna(0), (rows.best_high - rows.best).fillna(0)]
            best.errorbar(rows.share, rows.best, ends, color="#3f90da", marker=marker, linestyle="", capsize=0 if name else 2,
                          fillstyle="none" if name else "full", label=f"of least error{label}")  # fmt: skip
    best.plot(each.share, each.schedule, color="#bd1f01", linestyle="--", label="in training")
    best.set(yscale="log", xlabel="share of the run", ylabel="bandwidth ε (units in which E‖x‖² = 1)")
    grid = data.bandwidth.min(), data.bandwidth.max()
    best.set_ylim(min(grid[0], each.schedule.min()) / 1.3, max(grid[1], each.schedule.max()) * 1.3)  # intervals may be endless
    best.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    best.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    best.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    best.yaxis.set_minor_formatter(ticker.NullFormatter())
    best.legend(loc="lower left", bbox_to_anchor=(0, 1.02))
    return fig
