"""The figures: pure functions from the plotted DataFrame to a Figure.

Notable here:
- a figure saved as `NN_name` is drawn by `plots.name(data)`, and a test draws it again from `figures/NN_name.csv`;
  so a function takes everything it shows from `data`, and nothing from anywhere else.
- importing this module sets the style of `paper.mplstyle`, so that notebooks and tests draw alike.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from .figures import MARKERS, use_style
from .intervals import mean_interval

use_style()


# ---- 02: training one JumpReLU SAE --------------------------------------------------------------------------------


def _panel(ax: plt.Axes, data: pd.DataFrame, y: str, label: str) -> None:
    """`y` over training tokens: one thin curve per seed, and their mean on top."""
    mean = data.groupby("tokens")[y].mean()
    (line,) = ax.plot(mean.index, mean, label=label)
    for _, rows in data.groupby("seed"):
        ax.plot(rows.tokens, rows[y], color=line.get_color(), linewidth=0.6, alpha=0.5, linestyle=line.get_linestyle())
    ax.set_xlabel("training tokens")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(4))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def training(data: pd.DataFrame) -> Figure:
    """Log rows of several seeds: columns seed, tokens, l0, fvu, dead, sparsity, threshold_p05, _p50, _p95."""
    fig, axes = plt.subplots(1, 5, figsize=(13, 2.8), layout="constrained")
    _panel(axes[0], data, "sparsity", "λ")
    axes[0].set(ylabel="price of one active latent", title="λ")
    for ax, column, title in zip(axes[1:], ("l0", "fvu", "dead"), ("L0", "FVU", "dead latents"), strict=False):
        _panel(ax, data, column, "mean of seeds")
        ax.set(ylabel="share" if column == "dead" else title, title=title)
    axes[1].set_ylim(0, data.l0.quantile(0.98) * 1.3)  # the first steps can be far above
    axes[2].set_ylim(0, min(1.2, data.fvu.max() * 1.05))
    axes[3].set_ylim(-0.02, max(0.2, data.dead.max() * 1.2))
    for quantile, label in (("threshold_p95", "95 %"), ("threshold_p50", "median"), ("threshold_p05", "5 %")):
        _panel(axes[4], data, quantile, label)
    axes[4].set(ylabel="θ, unit of √E‖x‖²", title="thresholds", ylim=(0, None))
    axes[4].legend()
    return fig


def diagnostics(data: pd.DataFrame) -> Figure:
    """Columns seed, tokens, window_share, window_latents, threshold_travel, reconstruction_push, sparsity_push."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    _panel(axes[0], data, "window_share", "pre-activations")
    _panel(axes[0], data, "window_latents", "latents with any")
    axes[0].set(yscale="log", ylabel="share within reach of θ", title="who trains θ")
    _panel(axes[1], data, "threshold_travel", "travel")
    axes[1].set(ylabel="mean |log θ − log θ_init|, nats", title="how far θ went")
    _panel(axes[2], data[data.sparsity > 0], "reconstruction_push", "reconstruction")
    _panel(axes[2], data[data.sparsity > 0], "sparsity_push", "sparsity")
    axes[2].set(yscale="log", ylabel="mean |gradient| of θ", title="what pushes θ")
    axes[0].legend()
    axes[2].legend()
    return fig


def thresholds(data: pd.DataFrame) -> Figure:
    """One row a latent: threshold (unit of √E‖x‖²), frequency (share of tokens), initial (θ_init)."""
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    bins = np.linspace(0.95 * data.threshold.min(), 1.05 * data.threshold.max(), 40)
    axes[0].hist(data.threshold, bins=bins)
    axes[0].axvline(data.initial.iloc[0], color="k", linestyle="--", label="θ at the start")
    axes[0].set(xlim=(0, None), xlabel="θ, unit of √E‖x‖²", ylabel="latents", title="thresholds after training")
    axes[0].legend()
    alive = data[data.frequency > 0]
    axes[1].scatter(alive.frequency, alive.threshold, s=5, alpha=0.4, linewidths=0)
    axes[1].set(xscale="log", xlabel="share of tokens on which it fires", ylabel="θ, unit of √E‖x‖²", title="θ and frequency",
                ylim=(0, None))
    return fig


def l0_by_token(data: pd.DataFrame) -> Figure:
    """Columns architecture, l0 (active latents of a token), share (of tokens)."""
    fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, rows in data.groupby("architecture", sort=False):
        ax.plot(rows.l0, rows.share, label=name, drawstyle="steps-mid")
    ax.set(xlabel="active latents of a token", ylabel="share of tokens", xlim=(0, None),
           title="L0 is not the same for every token")
    ax.legend()
    return fig


def _bars(ax: plt.Axes, groups: pd.Series, values: pd.Series) -> None:
    """Each group's points, and their mean with a 95 % t-interval."""
    for position, (name, rows) in enumerate(values.groupby(groups, sort=False)):
        found = mean_interval(rows)
        ax.errorbar([position], [found.mean], yerr=found.half, marker="D", capsize=5, color=f"C{position}", label=name)
        ax.scatter(np.full(len(rows), position) + 0.12, rows, s=12, color=f"C{position}", alpha=0.6)
    ax.set_xticks(range(groups.nunique()), list(dict.fromkeys(groups)))
    ax.margins(x=0.25)


def shrinkage(data: pd.DataFrame) -> Figure:
    """One row a run: architecture, l0, fvu, norm_ratio (Σ x·x̂ / Σ‖x̂‖², about the mean)."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained")
    for ax, column, label in zip(axes, ("norm_ratio", "fvu", "l0"),
                                 ("Σ x·x̂ / Σ ‖x̂‖²  (1: not shrunk)", "FVU", "L0"), strict=True):  # fmt: skip
        _bars(ax, data.architecture, data[column])
        ax.set_ylabel(label)
    axes[0].axhline(1, color="0.4", linewidth=0.8)
    axes[0].set_title("shrinkage")
    return fig


def bandwidth_tradeoff(data: pd.DataFrame) -> Figure:
    """One row a run: bandwidth (ε), sparsity (λ), seed, l0, fvu, threshold_travel; mean and 95 % t-interval over seeds."""
    fig, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    same_price = data[data.sparsity == data.sparsity.min()]
    panels = (("l0", "L0"), ("fvu", "FVU"), ("threshold_travel", "mean |log θ − log θ_init|, nats"))
    for position, (ax, (column, label)) in enumerate(zip(axes, panels, strict=False)):
        points = [(bandwidth, mean_interval(rows[column])) for bandwidth, rows in same_price.groupby("bandwidth")]
        ax.errorbar([x for x, _ in points], [i.mean for _, i in points], yerr=[i.half for _, i in points],
                    marker=MARKERS[position], capsize=3, color=f"C{position}")  # fmt: skip
        ax.set(xscale="log", xlabel="bandwidth ε, same λ", ylabel=label, ylim=(0, None))
    for marker, (bandwidth, rows) in zip(MARKERS, data.groupby("bandwidth"), strict=False):
        axes[3].scatter(rows.l0, rows.fvu, label=f"ε = {bandwidth:g}", marker=marker, s=22)
        if rows.sparsity.nunique() > 1:
            mean = rows.groupby("sparsity")[["l0", "fvu"]].mean()
            axes[3].plot(mean.l0, mean.fvu, color="0.4", linewidth=0.8, label="its frontier over λ")
    axes[3].set(xscale="log", xlabel="L0", ylabel="FVU", title="at equal L0")
    axes[3].xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes[3].legend()
    return fig



# ---- notebook 01: where the straight-through estimator comes from -----------------------------------------------

ONE_LATENT = {
    "ReLU": "94a4a2 : o", "biased ReLU": "ffa90e -- s", "biased ReLU with gain": "a96b59 -. D", "JumpReLU": "3f90da - ^",
}  # fmt: skip
ESTIMATORS = {"straight-through": "3f90da - o", "exact I": "bd1f01 -- s"}
KERNEL_LOOKS = {"rectangle": "3f90da - o", "triangular": "ffa90e -- s", "gaussian": "bd1f01 -. ^", "epanechnikov": "832db6 : D"}


def _look(text: str) -> dict[str, str]:
    color, line, marker = text.split()
    return {"color": f"#{color}", "linestyle": line, "marker": marker}


def _intervals(data: pd.DataFrame) -> list[pd.Series]:
    """Lengths of the error bars of columns mean, low and high, for `Axes.errorbar`."""
    return [data["mean"] - data.low, data.high - data["mean"]]


def _ticks(ax: plt.Axes, values: pd.Series) -> None:
    """Logarithmic x axis, marked at the plotted values: between a few of those, matplotlib's own labels overlap."""
    ax.set_xscale("log")
    ax.set_xticks(sorted(values.unique()), [f"{v:g}" for v in sorted(values.unique())])
    ax.xaxis.set_minor_locator(plt.NullLocator())


def toy_activations(data: pd.DataFrame) -> Figure:
    """Density of one latent's pre-activation, split by whether its feature is there, and four activation functions.

    data: columns pre_activation, absent, present (densities), and one per activation function, its value.
    """
    fig, (density, function) = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True)
    density.fill_between(data.pre_activation, data.absent, color="#b9ac70", alpha=0.6, hatch="///", edgecolor="white",
                         label="feature absent")
    density.fill_between(data.pre_activation, data.present, color="#832db6", alpha=0.6, label="feature present")
    density.set(ylabel="density", ylim=(0, 6 * data.present.max()), title="one latent's pre-activations (left peak cut off)")
    density.legend()
    for name, look in ONE_LATENT.items():
        function.plot(data.pre_activation, data[name], **_look(look) | {"marker": ""}, label=name)
    function.set(xlabel="pre-activation (units of the feature's median magnitude)", ylabel="activation (same units)")
    function.legend()
    return fig


def toy_errors(data: pd.DataFrame) -> Figure:
    """Errors of four activation functions against the sparsity coefficient.

    data: columns activation, sparsity, metric, mean, low, high (95 % over samples).
    """
    labels = {
        "false positives": "on where absent (share)", "misses": "off where present (share)",
        "shrinkage": "shrinkage where on and present", "magnitude error": "relative error where on and present",
        "objective": "squared error + λ·L0",
    }  # fmt: skip
    fig, axes = plt.subplots(2, 3, figsize=(9.0, 5.0))
    for ax, (metric, label) in zip(axes.flat, labels.items(), strict=False):
        for name, look in ONE_LATENT.items():
            one = data[(data.metric == metric) & (data.activation == name)]
            ax.errorbar(one.sparsity, one["mean"], _intervals(one), **_look(look), capsize=2, label=name)
        ax.set(xlabel="sparsity coefficient λ", ylabel=label)
        _ticks(ax, data.sparsity)
    axes.flat[0].set_yscale("log")
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", title="each with its best parameters")
    return fig


def lemma(data: pd.DataFrame) -> Figure:
    """d/dy E[A·H(Y − y)] by finite differences, on the curve −E[A | Y = y]·p(y).

    data: columns family, y, theory, mean, low, high (95 %, together).
    """
    families = list(data.family.unique())
    fig, axes = plt.subplots(1, len(families), figsize=(3.0 * len(families), 2.8))
    for ax, family in zip(axes, families, strict=True):
        one = data[data.family == family]
        ax.plot(one.y, one.theory, color="#94a4a2", label="−E[A | Y = y]·p(y)")
        ax.errorbar(one.y, one["mean"], _intervals(one), fmt="o", color="#3f90da", capsize=2, label="finite difference")
        ax.set(title=family, xlabel="y (units of Y)")
        ax.title.set_fontsize(8)
    axes[0].set_ylabel("d/dy E[A·H(Y − y)]")
    axes[0].legend()
    return fig


def theorem(data: pd.DataFrame) -> Figure:
    """Deviation of each estimate from the closed form of the gradient, latent by latent.

    data: columns latent, method, bandwidth, exact, expected, mean, low, high (95 % together over latents).
    """
    panels = list(data[["method", "bandwidth"]].drop_duplicates().itertuples(index=False))
    fig, axes = plt.subplots(1, len(panels), figsize=(2.3 * len(panels), 3.0), sharey=True)
    for ax, (method, width) in zip(axes, panels, strict=True):
        one = data[(data.method == method) & (data.bandwidth == width)]
        ax.axhline(0, color="#717581", linewidth=1)
        ax.errorbar(one.latent, one["mean"] - one.exact, _intervals(one), fmt="o", color="#3f90da", capsize=2, label="measured")
        if one.expected.notna().all():
            ax.plot(one.latent, one.expected - one.exact, "x", color="#bd1f01", markersize=7, label="bias, closed form")
            ax.set(title=f"{method}, ε = {width:g}")
        else:
            ax.set(title=f"{method}, h = {width / 2:g}")
        ax.title.set_fontsize(8)
        ax.set(xlabel="latent")
    axes[0].set_ylabel("estimate − ∂E[L]/∂θ (loss per unit of θ)")
    axes[1].legend(loc="lower right")
    return fig


def bias_and_noise(data: pd.DataFrame) -> Figure:
    """Bias, noise and window share of the straight-through gradient over bandwidth, and the U of its error.

    data: columns estimator, bandwidth, batch_size, bias, noise, error, low, high, share; and measured, measured_low,
    measured_high where whole batches were drawn (else NaN).
    """
    fig, (parts, total, window) = plt.subplots(1, 3, figsize=(9.6, 3.2))
    data = data[data.estimator == "straight-through"]
    drawn = data[data.measured.notna()]
    size = int(drawn.batch_size.iloc[0])
    one = data[data.batch_size == size]
    parts.plot(one.bandwidth, one.bias, color="#bd1f01", linestyle="--", label="bias (closed form)")
    parts.plot(one.bandwidth, one.noise, color="#832db6", linestyle=":", label="noise (standard deviation)")
    parts.plot(one.bandwidth, one.error, color="#3f90da", linestyle="-", label="error, predicted")
    parts.errorbar(drawn.bandwidth, drawn.measured, [drawn.measured - drawn.measured_low, drawn.measured_high - drawn.measured],
                   fmt="o", color="black", capsize=2, label="error, measured")
    parts.set(xscale="log", yscale="log", xlabel="bandwidth ε (units of x)", ylabel="relative to the gradient's length",
              title=f"batches of {size:,}")
    parts.legend()
    for (batch_size, one), line in zip(data.groupby("batch_size"), ("-", "--", "-.", ":") * 3, strict=False):
        curve = total.plot(one.bandwidth, one.error, linestyle=line, label=f"N = {batch_size:,}")[0]
        total.fill_between(one.bandwidth, one.low, one.high, alpha=0.2, color=curve.get_color())
        least = one.loc[one.error.idxmin()]
        total.plot(least.bandwidth, least.error, "v", color=curve.get_color(), markersize=7)
    total.set(xscale="log", yscale="log", xlabel="bandwidth ε (units of x)", ylabel="relative error",
              title="the best bandwidth shrinks as N grows")
    total.legend()
    window.plot(one.bandwidth, one.share, color="#3f90da", marker="o")
    window.set(xscale="log", yscale="log", xlabel="bandwidth ε (units of x)", ylabel="share of pre-activations in the window",
               title="what a batch has to go on")
    return fig


def best_bandwidth(data: pd.DataFrame) -> Figure:
    """The bandwidth of least error against batch size, for autograd's gradient and for the exact I.

    data: columns estimator, batch_size, mean, low, high (95 % over repeats), slope (fitted d log ε*/d log N), theory.
    """
    fig, ax = plt.subplots(figsize=(5.2, 3.4))
    for name, look in ESTIMATORS.items():
        one = data[data.estimator == name]
        slope, theory = one.slope.iloc[0], one.theory.iloc[0]
        ax.errorbar(one.batch_size, one["mean"], _intervals(one), **_look(look), capsize=2,
                    label=f"{name}: slope {slope:.3f}, theory {theory:.3f}")
        ax.plot(one.batch_size, one["mean"].iloc[-1] * (one.batch_size / one.batch_size.iloc[-1]) ** theory, color="#717581",
                linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="samples in the batch, N", ylabel="best bandwidth ε* (units of x)")
    ax.legend(title="thin: slope of theory through the last point")
    return fig


def kernel_comparison(data: pd.DataFrame) -> Figure:
    """Error of the straight-through gradient for four kernels, at equal ε and at equal standard deviation of the kernel.

    data: columns estimator, kernel, kernel_sd, bandwidth, batch_size, error, low, high.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.0, 3.2), sharey=True)
    data = data[data.estimator == "straight-through"]
    for ax, column, label in zip(axes, ("bandwidth", "kernel_sd"), ("bandwidth ε", "standard deviation of K(·/ε)"), strict=True):
        for name, look in KERNEL_LOOKS.items():
            one = data[data.kernel == name]
            ax.errorbar(one[column], one.error, [one.error - one.low, one.high - one.error], **_look(look), capsize=2, label=name)
        ax.set(xscale="log", yscale="log", xlabel=f"{label} (units of x)")
    axes[0].set(ylabel=f"relative error, batches of {int(data.batch_size.iloc[0]):,}", title="equal ε")
    axes[1].set(title="equal standard deviation")
    axes[0].legend()
    return fig


def real_agreement(data: pd.DataFrame) -> Figure:
    """Straight-through gradient against finite difference of the loss, one point a latent, one panel a bandwidth.

    data: columns bandwidth, latent, ste, ste_low, ste_high, difference, difference_low, difference_high (95 % together).
    """
    widths = list(data.bandwidth.unique())
    fig, axes = plt.subplots(1, len(widths), figsize=(3.0 * len(widths), 3.0))
    for ax, width in zip(axes, widths, strict=True):
        one = data[data.bandwidth == width]
        ends = [one[["difference_low", "ste_low"]].min(axis=None), one[["difference_high", "ste_high"]].max(axis=None)]
        ax.plot(ends, ends, color="#717581", linewidth=1)
        ax.errorbar(one.difference, one.ste, [one.ste - one.ste_low, one.ste_high - one.ste],
                    [one.difference - one.difference_low, one.difference_high - one.difference],
                    fmt="o", color="#3f90da", ecolor="#a9cfee", markersize=3, elinewidth=0.8)  # fmt: skip
        ax.set(title=f"ε = {width:g}, h = {width / 2:g}", xlabel="finite difference of the loss")
        ax.locator_params(nbins=5)
    axes[0].set_ylabel("straight-through gradient")
    return fig


def real_bandwidth(data: pd.DataFrame) -> Figure:
    """Bias, gap and noise of the straight-through gradient on real activations, against bandwidth.

    data: columns bandwidth, quantity ("bias", "gap", "noise"), mean, low, high (squares, relative to the squared
    length of the gradient, 95 %), share, batch_size.
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
        parts.errorbar(one.bandwidth, mean, [mean - low, high - mean], **_look(look), capsize=2, label=label)
    parts.set(yscale="log", xlabel="bandwidth ε (units in which E‖x‖² = 1)",
              ylabel="relative to the gradient's length")
    parts.set_ylim(bottom=3e-3)
    parts.legend()
    window.plot(one.bandwidth, one.share, color="#3f90da", marker="o")
    window.set(yscale="log", xlabel="bandwidth ε (units in which E‖x‖² = 1)",
               ylabel="share of pre-activations in the window")
    for ax in (parts, window):
        _ticks(ax, data.bandwidth)
    return fig


# ---- notebook 00: the subject model -------------------------------------------------------------------------------

METHOD_LOOKS = {"language model": ("#3f90da", ""), "n-gram": ("#ffa90e", "//"), "compressor": ("#94a4a2", "..")}
SITE_LOOKS = {"resid_post": "3f90da - o", "mlp_out": "bd1f01 -- s", "attn_out": "832db6 -. ^"}


def lm_training(data: pd.DataFrame) -> Figure:
    """The language model's training log.

    data: columns tokens, train_loss and heldout_loss (nats per token, NaN where not measured), lr_factor; no rows for a
    model that came without a log.
    """
    fig, (loss, rate) = plt.subplots(1, 2, figsize=(7.6, 3.0), width_ratios=(2, 1))
    loss.set(xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token)", title="loss")
    rate.set(xlabel="training tokens (millions)", ylabel="learning rate / its maximum", title="schedule")
    if data.empty:
        loss.text(0.5, 0.5, "this model came without a training log", ha="center", va="center", transform=loss.transAxes)
        return fig
    held = data[data.heldout_loss.notna()]
    loss.plot(data.tokens / 1e6, data.train_loss, color="#3f90da", linewidth=1, label="training rows, each seen once")
    loss.plot(held.tokens / 1e6, held.heldout_loss, color="#bd1f01", linestyle="--", marker="o", markersize=2.5,
              label="validation documents")
    # the first steps would hide the rest
    late = data[data.tokens > 0.05 * data.tokens.max()]
    loss.set_ylim(0.95 * late.train_loss.min(), 1.05 * late.train_loss.max())
    loss.legend()
    rate.plot(data.tokens / 1e6, data.lr_factor, color="#717581")
    rate.set_ylim(0, 1.05)
    return fig


def bits_per_byte(data: pd.DataFrame) -> Figure:
    """Bits per byte of each method on the same bytes.

    data: columns method, kind, bits_per_byte, low, high (95 %); drawn from the bottom up.
    """
    fig, ax = plt.subplots(figsize=(6.4, 0.45 * len(data) + 0.9))
    for kind, (color, hatch) in METHOD_LOOKS.items():
        one = data[data.kind == kind]
        ax.barh(one.index, one.bits_per_byte, color=color, hatch=hatch, edgecolor="white", label=kind)
    ax.errorbar(data.bits_per_byte, data.index, xerr=[data.bits_per_byte - data.low, data.high - data.bits_per_byte], fmt="none",
                ecolor="black", elinewidth=1.2, capsize=3)  # fmt: skip
    for y, row in data.iterrows():
        ax.text(row.high, y, f"  {row.bits_per_byte:.2f}", va="center")
    ax.set_yticks(data.index, data.method)
    ax.set(xlabel="bits per byte of held-out text (95 % interval over groups of documents)", xlim=(0, 1.12 * data.high.max()))
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, 1.14), ncols=3)
    return fig


def induction(data: pd.DataFrame) -> Figure:
    """Loss along random sequences that are repeated.

    data: columns position, copy (1 or 2), loss, low, high (nats per token, 95 %).
    """
    fig, ax = plt.subplots()
    for (copy, one), look in zip(data.groupby("copy"), ("3f90da - o", "bd1f01 -- s"), strict=True):
        look = _look(look) | {"marker": ""}
        ax.plot(one.position, one.loss, **look, label=("first time", "second time")[copy - 1])
        ax.fill_between(one.position, one.low, one.high, color=look["color"], alpha=0.2, linewidth=0)
    ax.axvline(len(data) / 2 + 0.5, color="#717581", linewidth=0.8)
    ax.set(xlabel="position in the row (BOS is 0)", ylabel="cross-entropy (nats per token)", ylim=(0, None))
    ax.legend(title="random tokens, shown for the")
    return fig


def sites(data: pd.DataFrame) -> Figure:
    """Scale of the activations at the three sites, by layer.

    data: columns site, layer, mean_square (E‖x‖²), mean_share (‖E x‖²/E‖x‖²), first_ratio (norm at the first position
    over that at the others).
    """
    labels = {"mean_square": "E‖x‖²", "mean_share": "‖E x‖² / E‖x‖²", "first_ratio": "norm at BOS / norm elsewhere"}
    fig, axes = plt.subplots(1, 3, figsize=(9.0, 3.0))
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for site, look in SITE_LOOKS.items():
            one = data[data.site == site]
            ax.plot(one.layer, one[column], **_look(look), label=site)
        ax.set(xlabel="layer", ylabel=label)
        ax.locator_params(axis="x", integer=True)
    axes[0].set(yscale="log", title="scale")
    axes[1].set(ylim=(0, 1), title="share of the mean")
    axes[2].set(ylim=(0, None), title="first position")
    axes[0].legend()
    return fig


# ---- 03: speed -------------------------------------------------------------------------------------------------------

SYSTEM_LOOKS = {"jumprelu": ("#3f90da", "this package", ""), "SAELens": ("#ffa90e", "SAELens", "//"),
                "dictionary_learning": ("#bd1f01", "dictionary_learning", "\\\\"), "sparsify": ("#832db6", "sparsify", ".."),
                "floor": ("#94a4a2", "matmul alone", "xx")}  # fmt: skip


def speed(data: pd.DataFrame) -> Figure:
    """Training steps: columns system, architecture, dtype, d_in, d_sae, batch, tokens_per_s, its quartiles _q1 and _q3."""
    sizes = data.groupby(["d_in", "d_sae", "batch"])
    fig, axes = plt.subplots(1, len(sizes), figsize=(10, 0.2 * sizes.size().max() + 1.3), layout="constrained")
    for ax, (size, rows) in zip(np.atleast_1d(axes), sizes, strict=True):
        rows = rows.sort_values("tokens_per_s").reset_index(drop=True)
        for y, row in rows.iterrows():
            color, _, hatch = SYSTEM_LOOKS[row.system]
            ax.barh(y, row.tokens_per_s, color=color, hatch=hatch, edgecolor="white")
            ax.plot([row.tokens_per_s_q1, row.tokens_per_s_q3], [y, y], color="black", linewidth=1)
            ax.text(row.tokens_per_s_q3, y, f" {row.tokens_per_s / 1e3:.3g}k", va="center", fontsize=7)
        short = {"float32": "", "bfloat16": ", bf16"}
        ax.set_yticks(rows.index, [f"{row.architecture}{short[row.dtype]}" for row in rows.itertuples()], fontsize=7)
        ax.set(xscale="log", xlabel="tokens per second", title="d_in {}, d_sae {}, batch {}".format(*size))
        ax.set_xlim(0.5 * rows.tokens_per_s.min(), 3 * rows.tokens_per_s.max())
        ax.grid(axis="y", visible=False)
    shown = [SYSTEM_LOOKS[name] for name in SYSTEM_LOOKS if (data.system == name).any()]
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=color, hatch=hatch, edgecolor="white") for color, _, hatch in shown]
    fig.legend(handles, [label for _, label, _ in shown], loc="outside lower center", ncols=len(shown))
    return fig


def inference(data: pd.DataFrame) -> Figure:
    """Encoding and decoding; columns as for :func:`speed`."""
    return speed(data)


def step_profile(data: pd.DataFrame) -> Figure:
    """Columns function, call, ms, share, search (the type in which entries are searched for); the dearest of each search."""
    searches = list(data.groupby("search", sort=False))
    fig, axes = plt.subplots(1, len(searches), figsize=(10, 3.8), layout="constrained", sharex=True)
    for ax, (search, rows) in zip(np.atleast_1d(axes), searches, strict=True):
        rows = rows.sort_values("ms").reset_index(drop=True)
        ax.barh(rows.index, rows.ms, color="#3f90da")
        for y, row in rows.iterrows():
            ax.text(row.ms, y, f" {row.share:.0%}", va="center", fontsize=7)
        names = [f"{row.function}: {row.call}" if row.call else row.function for row in rows.fillna({"call": ""}).itertuples()]
        ax.set_yticks(rows.index, names, fontsize=7)
        ax.set(xlabel="milliseconds a step", title=f"search in {search}")
        ax.grid(axis="y", visible=False)
    return fig


def density(data: pd.DataFrame) -> Figure:
    """Time of a step by the share of entries in S; columns d_sae, batch, density, way, ms."""
    sizes = list(data.groupby(["d_sae", "batch"]))
    fig, axes = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes), 3.2), layout="constrained")
    for ax, ((d_sae, batch), rows) in zip(np.atleast_1d(axes), sizes, strict=True):
        for marker, (way, one) in zip(MARKERS, rows.groupby("way"), strict=False):
            one = one.sort_values("density")
            ax.plot(100 * one.density, one.ms, marker=marker, label=way)
        ax.set(xlabel="entries in S (% of batch × d_sae)", ylabel="milliseconds a step", yscale="log",
               title=f"d_sae {d_sae}, batch {batch}")
    np.atleast_1d(axes)[0].legend()
    return fig


def search_dtype(data: pd.DataFrame) -> Figure:
    """SAEs trained with the search in two types: columns search, seed, l0, fvu."""
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    searches = list(data.groupby("search", sort=False))
    for ax, column in zip(axes, ("l0", "fvu"), strict=True):
        for x, (_, rows) in enumerate(searches):
            for marker, row in zip(MARKERS, rows.itertuples(), strict=False):
                label = f"seed {row.seed}" if x == 0 else None
                ax.plot(x, getattr(row, column), marker=marker, color="#3f90da", linestyle="", label=label)
        ax.set_xticks(range(len(searches)), [search for search, _ in searches])
        ax.set(xlim=(-0.5, len(searches) - 0.5), ylabel={"l0": "L0", "fvu": "FVU"}[column], xlabel="search in")
    axes[0].legend()
    return fig


def equal_tokens(data: pd.DataFrame) -> Figure:
    """JumpReLU SAEs of several libraries after as many tokens: columns system, setting, seed, l0, fvu, seconds."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for marker, ((system, setting), rows) in zip(MARKERS * 3, data.groupby(["system", "setting"], sort=False), strict=False):
        color, label, _ = SYSTEM_LOOKS[system]
        look = {"color": color, "marker": marker, "linestyle": "-" if system == "jumprelu" else "--"}
        for number, (_, one) in enumerate(rows.groupby("seed")):
            one = one.sort_values("l0")
            axes[0].plot(one.l0, one.fvu, **look, linewidth=1, label=f"{label}, {setting}" if number == 0 else None)
        axes[1].plot(rows.seconds, rows.fvu, **look | {"linestyle": ""})
    axes[0].set(xscale="log", yscale="log", xlabel="L0 on held-out activations", title="equal tokens")
    axes[1].set(yscale="log", xlabel="seconds of training", title="time for it", xlim=(0, None))
    for ax in axes:
        ax.set_ylabel("FVU on held-out activations")
        ax.yaxis.set_major_locator(ticker.FixedLocator([0.1, 0.15, 0.2, 0.3, 0.5, 0.8]))
        ax.yaxis.set_major_formatter(ticker.ScalarFormatter())
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig
