"""Figures of notebook 01: where the straight-through estimator comes from."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..rails.figures import use_style
from ..rails.looks import error_bars, look_of, ticks_at

use_style()

ONE_LATENT = {
    "ReLU": "94a4a2 : o",
    "biased ReLU": "ffa90e -- s",
    "biased ReLU with gain": "a96b59 -. D",
    "JumpReLU": "3f90da - ^",
}
ESTIMATORS = {"straight-through": "3f90da - o", "exact I": "bd1f01 -- s"}
KERNEL_LOOKS = {
    "rectangle": "3f90da - o",
    "triangular": "ffa90e -- s",
    "gaussian": "bd1f01 -. ^",
    "epanechnikov": "832db6 : D",
}


def toy_activations(data: pd.DataFrame) -> Figure:
    """Density of one latent's pre-activation, split by whether its feature is there, and four
    activation functions.

    Paper: JumpReLU, Figure 1.

    data: columns pre_activation, absent, present (densities), and one per activation function,
    its value.
    """
    fig, (density, function) = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True)
    density.fill_between(
        data.pre_activation,
        data.absent,
        color="#b9ac70",
        alpha=0.6,
        hatch="///",
        edgecolor="white",
        label="feature absent",
    )
    density.fill_between(
        data.pre_activation, data.present, color="#832db6", alpha=0.6, label="feature present"
    )
    density.set(
        ylabel="density",
        ylim=(0, 6 * data.present.max()),
        title="one latent's pre-activations (left peak cut off)",
    )
    density.legend()
    for name, look in ONE_LATENT.items():
        function.plot(data.pre_activation, data[name], **look_of(look) | {"marker": ""}, label=name)
    function.set(
        xlabel="pre-activation (units of the feature's median magnitude)",
        ylabel="activation (same units)",
    )
    function.legend()
    return fig


def toy_errors(data: pd.DataFrame) -> Figure:
    """Errors of four activation functions against the sparsity coefficient.

    Paper: JumpReLU, Figure 1, in numbers.

    data: columns activation, sparsity, metric, mean, low, high (95 % over samples).
    """
    labels = {
        "false positives": "on where absent (share)",
        "misses": "off where present (share)",
        "shrinkage": "shrinkage where on and present",
        "magnitude error": "relative error where on and present",
        "objective": "squared error + λ·L0",
    }
    fig, axes = plt.subplots(2, 3, figsize=(9.0, 5.0))
    for ax, (metric, label) in zip(axes.flat, labels.items(), strict=False):
        for name, look in ONE_LATENT.items():
            one = data[(data.metric == metric) & (data.activation == name)]
            ax.errorbar(
                one.sparsity, one["mean"], error_bars(one), **look_of(look), capsize=2, label=name
            )
        ax.set(xlabel="sparsity coefficient λ", ylabel=label)
        ticks_at(ax, data.sparsity)
    axes.flat[0].set_yscale("log")
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(
        *axes.flat[0].get_legend_handles_labels(),
        loc="center",
        title="each with its best parameters",
    )
    return fig


def lemma(data: pd.DataFrame) -> Figure:
    """d/dy E[A·H(Y − y)] by finite differences, on the curve −E[A | Y = y]·p(y).

    Paper: JumpReLU, section 4 and its proof in the appendix.

    data: columns family, y, theory, mean, low, high (95 %, together).
    """
    families = list(data.family.unique())
    fig, axes = plt.subplots(1, len(families), figsize=(3.0 * len(families), 2.8))
    for ax, family in zip(axes, families, strict=True):
        one = data[data.family == family]
        ax.plot(one.y, one.theory, color="#94a4a2", label="−E[A | Y = y]·p(y)")
        ax.errorbar(
            one.y,
            one["mean"],
            error_bars(one),
            fmt="o",
            color="#3f90da",
            capsize=2,
            label="finite difference",
        )
        ax.set(title=family, xlabel="y (units of Y)")
        ax.title.set_fontsize(8)
    axes[0].set_ylabel("d/dy E[A·H(Y − y)]")
    axes[0].legend()
    return fig


def theorem(data: pd.DataFrame) -> Figure:
    """Deviation of each estimate from the closed form of the gradient, latent by latent.

    Paper: JumpReLU, section 4: the theorem on the gradient of the expected loss.

    data: columns latent, method, bandwidth, exact, expected, mean, low, high (95 % together over
    latents).
    """
    panels = list(data[["method", "bandwidth"]].drop_duplicates().itertuples(index=False))
    fig, axes = plt.subplots(1, len(panels), figsize=(2.3 * len(panels), 3.0), sharey=True)
    for ax, (method, width) in zip(axes, panels, strict=True):
        one = data[(data.method == method) & (data.bandwidth == width)]
        ax.axhline(0, color="#717581", linewidth=1)
        ax.errorbar(
            one.latent,
            one["mean"] - one.exact,
            error_bars(one),
            fmt="o",
            color="#3f90da",
            capsize=2,
            label="measured",
        )
        if one.expected.notna().all():
            ax.plot(
                one.latent,
                one.expected - one.exact,
                "x",
                color="#bd1f01",
                markersize=7,
                label="bias, closed form",
            )
            ax.set(title=f"{method}, ε = {width:g}")
        else:
            ax.set(title=f"{method}, h = {width / 2:g}")
        ax.title.set_fontsize(8)
        ax.set(xlabel="latent")
    axes[0].set_ylabel("estimate − ∂E[L]/∂θ (loss per unit of θ)")
    axes[1].legend(loc="lower right")
    return fig


def bias_and_noise(data: pd.DataFrame) -> Figure:
    """Bias, noise and window share of the straight-through gradient over bandwidth, and the U of
    its error.

    Paper: none; compare Gemma Scope's footnote on the bandwidth.

    data: columns estimator, bandwidth, batch_size, bias, noise, error, low, high, share; and
    measured, measured_low, measured_high where whole batches were drawn (else NaN).
    """
    fig, (parts, total, window) = plt.subplots(1, 3, figsize=(9.6, 3.2))
    data = data[data.estimator == "straight-through"]
    drawn = data[data.measured.notna()]
    size = int(drawn.batch_size.iloc[0])
    one = data[data.batch_size == size]
    parts.plot(one.bandwidth, one.bias, color="#bd1f01", linestyle="--", label="bias (closed form)")
    parts.plot(
        one.bandwidth, one.noise, color="#832db6", linestyle=":", label="noise (standard deviation)"
    )
    parts.plot(one.bandwidth, one.error, color="#3f90da", linestyle="-", label="error, predicted")
    parts.errorbar(
        drawn.bandwidth,
        drawn.measured,
        [drawn.measured - drawn.measured_low, drawn.measured_high - drawn.measured],
        fmt="o",
        color="black",
        capsize=2,
        label="error, measured",
    )
    parts.set(
        xscale="log",
        yscale="log",
        xlabel="bandwidth ε (units of x)",
        ylabel="relative to the gradient's length",
        title=f"batches of {size:,}",
    )
    parts.legend()
    for (batch_size, one), line in zip(
        data.groupby("batch_size"), ("-", "--", "-.", ":") * 3, strict=False
    ):
        curve = total.plot(one.bandwidth, one.error, linestyle=line, label=f"N = {batch_size:,}")[0]
        total.fill_between(one.bandwidth, one.low, one.high, alpha=0.2, color=curve.get_color())
        least = one.loc[one.error.idxmin()]
        total.plot(least.bandwidth, least.error, "v", color=curve.get_color(), markersize=7)
    total.set(
        xscale="log",
        yscale="log",
        xlabel="bandwidth ε (units of x)",
        ylabel="relative error",
        title="the best bandwidth shrinks as N grows",
    )
    total.legend()
    window.plot(one.bandwidth, one.share, color="#3f90da", marker="o")
    window.set(
        xscale="log",
        yscale="log",
        xlabel="bandwidth ε (units of x)",
        ylabel="share of pre-activations in the window",
        title="what a batch has to go on",
    )
    return fig


def best_bandwidth(data: pd.DataFrame) -> Figure:
    """The bandwidth of least error against batch size, for autograd's gradient and for the exact I.

    Paper: none.

    data: columns estimator, batch_size, mean, low, high (95 % over repeats), slope (fitted d log
    ε*/d log N), theory.
    """
    fig, ax = plt.subplots(figsize=(5.2, 3.4))
    for name, look in ESTIMATORS.items():
        one = data[data.estimator == name]
        slope, theory = one.slope.iloc[0], one.theory.iloc[0]
        ax.errorbar(
            one.batch_size,
            one["mean"],
            error_bars(one),
            **look_of(look),
            capsize=2,
            label=f"{name}: slope {slope:.3f}, theory {theory:.3f}",
        )
        ax.plot(
            one.batch_size,
            one["mean"].iloc[-1] * (one.batch_size / one.batch_size.iloc[-1]) ** theory,
            color="#717581",
            linewidth=0.8,
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="samples in the batch, N",
        ylabel="best bandwidth ε* (units of x)",
    )
    ax.legend(title="thin: slope of theory through the last point")
    return fig


def kernel_comparison(data: pd.DataFrame) -> Figure:
    """Error of the straight-through gradient for four kernels, at equal ε and at equal standard
    deviation of the kernel.

    Paper: none; compare JumpReLU, Figure 17, where SAEs are trained with each kernel.

    data: columns estimator, kernel, kernel_sd, bandwidth, batch_size, error, low, high.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.0, 3.2), sharey=True)
    data = data[data.estimator == "straight-through"]
    for ax, column, label in zip(
        axes,
        ("bandwidth", "kernel_sd"),
        ("bandwidth ε", "standard deviation of K(·/ε)"),
        strict=True,
    ):
        for name, look in KERNEL_LOOKS.items():
            one = data[data.kernel == name]
            ax.errorbar(
                one[column],
                one.error,
                [one.error - one.low, one.high - one.error],
                **look_of(look),
                capsize=2,
                label=name,
            )
        ax.set(xscale="log", yscale="log", xlabel=f"{label} (units of x)")
    axes[0].set(
        ylabel=f"relative error, batches of {int(data.batch_size.iloc[0]):,}", title="equal ε"
    )
    axes[1].set(title="equal standard deviation")
    axes[0].legend()
    return fig


def real_agreement(data: pd.DataFrame) -> Figure:
    """Straight-through gradient against finite difference of the loss, one point a latent, one
    panel a bandwidth.

    Paper: none.

    data: columns bandwidth, latent, ste, ste_low, ste_high, difference, difference_low,
    difference_high (95 % together).
    """
    widths = list(data.bandwidth.unique())
    fig, axes = plt.subplots(1, len(widths), figsize=(3.0 * len(widths), 3.0))
    for ax, width in zip(axes, widths, strict=True):
        one = data[data.bandwidth == width]
        ends = [
            one[["difference_low", "ste_low"]].min(axis=None),
            one[["difference_high", "ste_high"]].max(axis=None),
        ]
        ax.plot(ends, ends, color="#717581", linewidth=1)
        ax.errorbar(
            one.difference,
            one.ste,
            [one.ste - one.ste_low, one.ste_high - one.ste],
            [one.difference - one.difference_low, one.difference_high - one.difference],
            fmt="o",
            color="#3f90da",
            ecolor="#a9cfee",
            markersize=3,
            elinewidth=0.8,
        )
        ax.set(title=f"ε = {width:g}, h = {width / 2:g}", xlabel="finite difference of the loss")
        ax.locator_params(nbins=5)
    axes[0].set_ylabel("straight-through gradient")
    return fig


def real_bandwidth(data: pd.DataFrame) -> Figure:
    """Bias, gap and noise of the straight-through gradient on real activations, against bandwidth.

    Paper: none.

    data: columns bandwidth, quantity ("bias", "gap", "noise"), mean, low, high (squares,
    relative to the squared length of the gradient, 95 %), share, batch_size.
    """
    fig, (parts, window) = plt.subplots(1, 2, figsize=(8.0, 3.2))
    looks = {
        "bias": ("bd1f01 -- s", "bias: mean − finite difference, narrow window"),
        "gap": ("3f90da - o", "gap: mean − finite difference, same window"),
        "noise": ("832db6 : ^", f"noise of one batch of {int(data.batch_size.iloc[0]):,}"),
    }
    for quantity, (look, label) in looks.items():
        one = data[data.quantity == quantity]
        mean, low, high = (one[c].clip(lower=1e-6) ** 0.5 for c in ("mean", "low", "high"))
        parts.errorbar(
            one.bandwidth, mean, [mean - low, high - mean], **look_of(look), capsize=2, label=label
        )
    parts.set(
        yscale="log",
        xlabel="bandwidth ε (units in which E‖x‖² = 1)",
        ylabel="relative to the gradient's length",
    )
    parts.set_ylim(bottom=3e-3)
    parts.legend()
    window.plot(one.bandwidth, one.share, color="#3f90da", marker="o")
    window.set(
        yscale="log",
        xlabel="bandwidth ε (units in which E‖x‖² = 1)",
        ylabel="share of pre-activations in the window",
    )
    for ax in (parts, window):
        ticks_at(ax, data.bandwidth)
    return fig
