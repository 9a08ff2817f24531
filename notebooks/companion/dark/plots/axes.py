"""What the figures of notebook 06 share: axes of FVU and R², and points below their ends."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

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


def points(
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


def r2_limits(data: pd.DataFrame) -> tuple[float, float]:
    """Limits of an axis of R²: from 1 down to the lowest mean or low of `data`, but not below
    :data:`LEAST_R2`."""
    lowest = max(data[["mean", "low"]].min(axis=None), LEAST_R2)
    return lowest - 0.05 * (1 - lowest) - 0.01, 1 + 0.04 * (1 - lowest) + 0.01


def moved_apart(number: int, many: int) -> float:
    """Factor of L0 by which the `number`-th of `many` curves is moved, so that intervals at one L0
    can be told apart."""
    return 1.02 ** (number - (many - 1) / 2)


def names_down(ax: plt.Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def legend_above(
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
