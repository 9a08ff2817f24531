"""Figures of notebook 10: speed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from ..rails.figures import MARKERS, use_style

use_style()

SYSTEM_LOOKS = {
    "jumprelu": ("#3f90da", "this package", ""),
    "SAELens": ("#ffa90e", "SAELens", "//"),
    "dictionary_learning": ("#bd1f01", "dictionary_learning", "\\\\"),
    "sparsify": ("#832db6", "sparsify", ".."),
    "floor": ("#94a4a2", "matmul alone", "xx"),
}


def speed(data: pd.DataFrame) -> Figure:
    """Training steps beside other libraries and beside the matmul alone.

    Paper: none; JumpReLU, section 1, says that a step is cheap.

    Training steps: columns system, architecture, dtype, d_in, d_sae, batch, tokens_per_s, its
    quartiles _q1 and _q3.
    """
    sizes = data.groupby(["d_in", "d_sae", "batch"])
    fig, axes = plt.subplots(
        1, len(sizes), figsize=(10, 0.2 * sizes.size().max() + 1.3), layout="constrained"
    )
    for ax, (size, rows) in zip(np.atleast_1d(axes), sizes, strict=True):
        rows = rows.sort_values("tokens_per_s").reset_index(drop=True)
        for y, row in rows.iterrows():
            color, _, hatch = SYSTEM_LOOKS[row.system]
            ax.barh(y, row.tokens_per_s, color=color, hatch=hatch, edgecolor="white")
            ax.plot([row.tokens_per_s_q1, row.tokens_per_s_q3], [y, y], color="black", linewidth=1)
            ax.text(
                row.tokens_per_s_q3, y, f" {row.tokens_per_s / 1e3:.3g}k", va="center", fontsize=7
            )
        short = {"float32": "", "bfloat16": ", bf16"}
        ax.set_yticks(
            rows.index,
            [f"{row.architecture}{short[row.dtype]}" for row in rows.itertuples()],
            fontsize=7,
        )
        ax.set(
            xscale="log",
            xlabel="tokens per second",
            title="d_in {}, d_sae {}, batch {}".format(*size),
        )
        ax.set_xlim(0.5 * rows.tokens_per_s.min(), 3 * rows.tokens_per_s.max())
        ax.grid(axis="y", visible=False)
    shown = [SYSTEM_LOOKS[name] for name in SYSTEM_LOOKS if (data.system == name).any()]
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=color, hatch=hatch, edgecolor="white")
        for color, _, hatch in shown
    ]
    fig.legend(
        handles, [label for _, label, _ in shown], loc="outside lower center", ncols=len(shown)
    )
    return fig


def inference(data: pd.DataFrame) -> Figure:
    """Encoding and decoding beside other libraries.

    Paper: none.

    Encoding and decoding; columns as for :func:`speed`.
    """
    return speed(data)


def step_profile(data: pd.DataFrame) -> Figure:
    """A training step by function.

    Paper: none.

    Columns function, call, ms, share, search (the type in which entries are searched for); the
    dearest of each search.
    """
    searches = list(data.groupby("search", sort=False))
    fig, axes = plt.subplots(1, len(searches), figsize=(10, 3.8), layout="constrained", sharex=True)
    for ax, (search, rows) in zip(np.atleast_1d(axes), searches, strict=True):
        rows = rows.sort_values("ms").reset_index(drop=True)
        ax.barh(rows.index, rows.ms, color="#3f90da")
        for y, row in rows.iterrows():
            ax.text(row.ms, y, f" {row.share:.0%}", va="center", fontsize=7)
        names = [
            f"{row.function}: {row.call}" if row.call else row.function
            for row in rows.fillna({"call": ""}).itertuples()
        ]
        ax.set_yticks(rows.index, names, fontsize=7)
        ax.set(xlabel="milliseconds a step", title=f"search in {search}")
        ax.grid(axis="y", visible=False)
    return fig


def density(data: pd.DataFrame) -> Figure:
    """Time of a step over the share of entries that matter.

    Paper: none.

    Time of a step by the share of entries in S; columns machine, d_sae, batch, density, way, ms.
    """
    sizes = list(data.groupby(["machine", "d_sae", "batch"], sort=False))
    rows = -(-len(sizes) // 2)
    fig, axes = plt.subplots(
        rows, 2, figsize=(8.4, 2.8 * rows), layout="constrained", squeeze=False
    )
    for ax, ((machine, d_sae, batch), part) in zip(axes.flat, sizes, strict=False):
        for marker, (way, one) in zip(MARKERS, part.groupby("way"), strict=False):
            one = one.sort_values("density")
            ax.plot(100 * one.density, one.ms, marker=marker, markersize=4, label=way)
        ax.set(
            xlabel="entries in S (% of batch × d_sae)",
            ylabel="milliseconds a step",
            yscale="log",
            title=f"{machine}: d_sae {d_sae}, batch {batch}",
        )
    for ax in axes.flat[len(sizes) :]:
        ax.set_visible(False)
    axes[0, 0].legend()
    return fig


def neighbour(data: pd.DataFrame) -> Figure:
    """Time of a step beside a busy process, by how long waiting threads spin.

    Paper: none.

    Columns waiting (spin, spin briefly, sleep), neighbour, ms and its quartiles q1 and q3, machine.
    """
    machines = list(data.groupby("machine", sort=False))
    fig, axes = plt.subplots(
        1, len(machines), figsize=(1.5 + 4 * len(machines), 2.4), layout="constrained"
    )
    looks = {"spin": ("#bd1f01", "//"), "spin briefly": ("#3f90da", ""), "sleep": ("#94a4a2", "..")}
    for ax, (machine, part) in zip(np.atleast_1d(axes), machines, strict=True):
        names = list(part.neighbour.unique())
        for shift, (way, rows) in zip(
            (-0.27, 0, 0.27), part.groupby("waiting", sort=False), strict=True
        ):
            color, hatch = looks[way]
            y = [names.index(name) + shift for name in rows.neighbour]
            ax.barh(y, rows.ms, height=0.25, color=color, hatch=hatch, edgecolor="white", label=way)
            ax.hlines(y, rows.q1, rows.q3, color="black", linewidth=1)
            for at, row in zip(y, rows.itertuples(), strict=True):
                ax.text(row.q3, at, f" {row.ms:,.0f} ms", va="center", fontsize=7)
        ax.set_yticks(range(len(names)), [f"beside {name}" for name in names])
        ax.set(xscale="log", xlabel="milliseconds a step", title=machine)
        ax.set_xlim(0.5 * part.q1.min(), 4 * part.q3.max())
        ax.grid(axis="y", visible=False)
    np.atleast_1d(axes)[0].legend(title="threads that wait", fontsize=7, title_fontsize=7)
    return fig


def search_dtype(data: pd.DataFrame) -> Figure:
    """L0 and FVU with the search in float32 and in bfloat16.

    Paper: none.

    SAEs trained with the search in two types: columns search, seed, l0, fvu.
    """
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    searches = list(data.groupby("search", sort=False))
    for ax, column in zip(axes, ("l0", "fvu"), strict=True):
        for x, (_, rows) in enumerate(searches):
            for marker, row in zip(MARKERS, rows.itertuples(), strict=False):
                label = f"seed {row.seed}" if x == 0 else None
                ax.plot(
                    x,
                    getattr(row, column),
                    marker=marker,
                    color="#3f90da",
                    linestyle="",
                    label=label,
                )
        ax.set_xticks(range(len(searches)), [search for search, _ in searches])
        ax.set(
            xlim=(-0.5, len(searches) - 0.5),
            ylabel={"l0": "L0", "fvu": "FVU"}[column],
            xlabel="search in",
        )
    axes[0].legend()
    return fig


def equal_tokens(data: pd.DataFrame) -> Figure:
    """FVU over L0 of SAEs of three libraries after as many tokens.

    Paper: none.

    JumpReLU SAEs of several libraries after as many tokens: columns system, setting, seed, l0,
    fvu, seconds.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for marker, ((system, setting), rows) in zip(
        MARKERS * 3, data.groupby(["system", "setting"], sort=False), strict=False
    ):
        color, label, _ = SYSTEM_LOOKS[system]
        look = {
            "color": color,
            "marker": marker,
            "linestyle": "-" if system == "jumprelu" else "--",
        }
        for number, (_, one) in enumerate(rows.groupby("seed")):
            one = one.sort_values("l0")
            axes[0].plot(
                one.l0,
                one.fvu,
                **look,
                linewidth=1,
                label=f"{label}, {setting}" if number == 0 else None,
            )
        axes[1].plot(rows.seconds, rows.fvu, **look | {"linestyle": ""})
    axes[0].set(
        xscale="log", yscale="log", xlabel="L0 on held-out activations", title="equal tokens"
    )
    axes[1].set(yscale="log", xlabel="seconds of training", title="time for it", xlim=(0, None))
    for ax in axes:
        ax.set_ylabel("FVU on held-out activations")
        ax.yaxis.set_major_locator(ticker.FixedLocator([0.1, 0.15, 0.2, 0.3, 0.5, 0.8]))
        ax.yaxis.set_major_formatter(ticker.ScalarFormatter())
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig
