# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where the straight-through estimator comes from
#
# A JumpReLU SAE is trained on a loss whose derivative with respect to a threshold is zero almost
# everywhere. The paper (Rajamanoharan et al. 2024, arXiv 2407.14435) trains it all the same, with a
# pseudo-derivative, and says that this is no trick: averaged over a batch, the pseudo-gradient is a
# kernel density estimate of the derivative of the *expected* loss, which is smooth. This notebook
# checks every step of that argument: why a jump is wanted at all, the lemma, the theorem, the
# identity with the kernel estimate, and what the bandwidth costs.
#
# Notation: $\pi$ pre-activation, $\theta$ threshold, $\varepsilon$ bandwidth, $K$ kernel, $\lambda$
# the price of an active latent, $d_i$ decoder row, $r_{-i}$ the residual with latent $i$ off, $H$
# the step function.

# %%
import numpy as np
import pandas as pd
import torch
from companion.rails.cache import remember
from companion.rails.claims import claim, ledger
from companion.rails.figures import save_figure, show_facts
from companion.rails.repeats import mean_interval, summarise
from companion.ste import bandwidth, on_activations, plots, theorem
from companion.ste.lemma import lemma_numeric, lemma_symbolic
from companion.ste.toy import ACTIVATIONS, Mixture, best_activation, compare_activations

import jumprelu as jr
from jumprelu.intervals import Interval

# %% tags=["parameters"]
threads: int = 2  # CPU threads
toy_samples: int = (
    20_000  # samples an activation function is fitted to, and as many it is judged on
)
toy_repeats: int = 20  # independent samples behind each interval of the toy
toy_sparsity: float = 0.1  # λ of the toy's drawing
lemma_samples: int = 4_194_304  # samples behind the lemma's finite differences
theorem_samples: int = 1_048_576  # samples behind the theorem's finite differences
sweep_samples: int = 32_768  # samples of one repeat of the bandwidth sweep
sweep_repeats: int = 8  # independent repeats of the sweep
drawn_batches: int = 200  # whole batches drawn to meet the predicted error
model: str = ""  # hub id or folder of a causal language model; empty: the embedded model
dataset: str = "installed"  # texts: "installed", a file or folder, or a hub data set
site: str = "resid_post"  # where activations are taken
layer: int = 3  # of which layer
rows: int = 480  # rows of tokens
storage: str = "float32"  # type of the activations on disk: float32, bfloat16 or float16
context_size: int = 256  # tokens in a row
d_sae: int = 512  # latents of the SAE trained here
steps: int = 500  # its training steps
sparsity: float = 2e-3  # its λ
latents: int = 64  # latents whose gradients are measured
batch_size: int = 4096  # activations in a batch of the measurement
batches: int = 24  # batches of the measurement

# %%
torch.set_num_threads(threads)


# %% [markdown]
# ## 1. Why a jump
#
# **The paper claims** that a ReLU cannot both ignore interference and report magnitudes: without a
# bias it fires on noise, with one it shrinks everything it reports. A threshold does not touch what
# passes it.
#
# **Computed here**: one latent, whose pre-activation is a feature's contribution $s$ (mostly zero,
# else log-normal) plus normal interference. Each activation function gets the parameters that
# minimise the same objective, $E[(s-f)^2] + \lambda P(f>0)$, exactly, on one sample, and is judged
# on a fresh one. A biased ReLU with a free gain is added to the paper's three, because an SAE is
# free to scale its encoder against shrinkage.

# %%
mixture = Mixture()
sparsities = [0.02, 0.05, 0.1, 0.2, 0.4]
toy = remember(compare_activations, mixture, sparsities, toy_samples, toy_repeats)
toy_summary = summarise(toy, ["activation", "sparsity", "metric"])

grid = np.linspace(-1, 2.5, 701)
curves = mixture.densities(grid)
fitted = mixture.sample(toy_samples, torch.Generator().manual_seed(1))
for name in ACTIVATIONS:
    curves[name] = best_activation(name, *fitted, toy_sparsity)(torch.tensor(grid)).numpy()
save_figure("01", plots.toy_activations, curves)

# %%
save_figure("01", plots.toy_errors, toy_summary)


# %%
def per_repeat(metric: str) -> pd.DataFrame:
    """Mean over λ: one row a repeat, one column an activation function."""
    return toy[toy.metric == metric].groupby(["repeat", "activation"]).value.mean().unstack()


objective, shrink, false_positives = (
    per_repeat(m) for m in ("objective", "shrinkage", "false positives")
)
others = [name for name in ACTIVATIONS if name != "JumpReLU"]
advantage = mean_interval(
    objective[others].sub(objective["JumpReLU"], axis=0), comparisons=len(others)
)
shrinkage_gap = mean_interval(
    shrink[others[1:]].sub(shrink["JumpReLU"], axis=0), comparisons=len(others) - 1
)
false_positive_gap = mean_interval(
    false_positives[others].sub(false_positives["JumpReLU"], axis=0), comparisons=len(others)
)
toy_facts = {
    "JumpReLU has the lowest objective": bool((advantage.low > 0).all()),
    "JumpReLU has the fewest false positives": bool((false_positive_gap.low > 0).all()),
    "biased ReLUs shrink, with and without gain": bool((shrinkage_gap.low > 0).all()),
    "false positives, ReLU": round(float(false_positives["ReLU"].mean()), 2),
    "false positives, JumpReLU": round(float(false_positives["JumpReLU"].mean()), 3),
    "shrinkage, biased ReLU": round(float(shrink["biased ReLU"].mean()), 2),
    "shrinkage, JumpReLU": round(float(shrink["JumpReLU"].mean()), 2),
}
toy_facts

# %% [markdown]
# **What differs**: JumpReLU's shrinkage is slightly *negative*. What passes a threshold passes
# partly because its noise was upward, so the magnitudes that are reported are a little too large.
# And JumpReLU pays for its few false positives with more misses than the biased ReLUs: in this
# objective, a miss of a small feature is cheap.

# %% [markdown]
# ## 2. The lemma
#
# **The paper's proof rests on** $\frac{d}{dy} E[A \cdot H(Y-y)] = -E[A \mid Y=y]\, p_Y(y)$.
#
# **Computed here**: by algebra for three families, with $E[A\cdot H(Y-y)]$ in closed form and all
# coefficients symbolic; then by finite differences, for families that include one without a closed
# form. In two of them $A$ is not a function of $Y$: only its conditional mean may matter.

# %%
lemma_by_algebra = remember(lemma_symbolic)
lemma_by_algebra[["family", "difference", "holds"]]

# %%
lemma = remember(lemma_numeric, np.linspace(0.1, 2.1, 17), 0.02, lemma_samples)
save_figure("01", plots.lemma, lemma)

# %%
lemma_facts = {
    "lemma holds by algebra": bool(lemma_by_algebra.holds.all()),
    "lemma inside every interval": bool(lemma.theory.between(lemma.low, lemma.high).all()),
    "lemma, widest interval (± share of the value)": round(
        float(((lemma.high - lemma.low) / 2 / lemma.theory.abs()).max()), 2
    ),
}
lemma_facts

# %% [markdown]
# ## 3. The theorem
#
# **The paper claims** $\partial E[L]/\partial\theta_i = (E[I_i \mid \pi_i=\theta_i] - \lambda)\,
# p_i(\theta_i)$ with $I_i = 2\theta_i\, d_i\cdot(x-\hat x)$ and $H(0)=\tfrac12$; written without
# that convention, $I_i = 2\theta_i\, d_i\cdot r_{-i} - \theta_i^2\lVert d_i\rVert^2$.
#
# **Computed here**: by algebra for one latent; then for ten overcomplete latents on correlated
# normal inputs, where $E[I_i \mid \pi_i=\theta_i]$ has a closed form too. Finite differences of the
# loss on a large sample, and the straight-through gradient by autograd through `jr.jump_relu` and
# `jr.step`, are held against it.

# %%
theorem_by_algebra = remember(theorem.theorem_symbolic)
theorem_by_algebra[["statement", "found", "holds"]]

# %%
coder, inputs, toy_lambda = (
    theorem.random_coder(6, 10, threshold=0.3),
    theorem.random_gaussian(6),
    0.05,
)
gradients = remember(
    theorem.theorem_numeric, coder, inputs, toy_lambda, [0.02, 0.1, 0.3], 0.01, theorem_samples
)
save_figure("01", plots.theorem, gradients)

# %%
agrees = gradients.exact.between(gradients.low, gradients.high)
as_expected = gradients.expected.between(gradients.low, gradients.high)
differences, narrow, wide = (
    (gradients.method == "finite difference"),
    (gradients.bandwidth == 0.02),
    (gradients.bandwidth == 0.3),
)
ste = ~differences
theorem_facts = {
    "theorem holds by algebra": bool(theorem_by_algebra.holds.all()),
    "finite differences agree with the theorem": bool(agrees[differences].all()),
    "straight-through means agree with their closed form": bool(as_expected[ste].all()),
    "narrow window agrees with the theorem": bool(agrees[ste & narrow].all()),
    "latents whose wide window excludes the theorem": int((~agrees)[ste & wide].sum()),
}
theorem_facts

# %% [markdown]
# **What differs**: the second row of the table above. Autograd does not know $H(0)=\tfrac12$. In
# the window's upper half it uses the residual with the latent on, in the lower half with the latent
# off, and the two halves average to $I_i$ only in the limit. What is left is a bias of *first*
# order, $-2\kappa\,\theta\lVert d\rVert^2\,\frac{d(\theta p)}{d\theta}\,\varepsilon$ with
# $\kappa=\int_0^\infty uK(u)\,du$. The crosses in the figure are this bias with all its higher
# orders, computed and not fitted. A kernel estimate that is given the exact $I_i$ has no such term
# (third row).

# %% [markdown]
# ## 4. The straight-through gradient is a kernel density estimate
#
# **The paper claims** that the batch gradient equals $\frac{1}{N\varepsilon}\sum_\alpha
# (I_i(x_\alpha)-\lambda)\,K\!\left(\frac{\pi_i(x_\alpha)-\theta_i}{\varepsilon}\right)$.
#
# **Computed here**: both sides, on the same batch in float64. With $I_i = 2\theta_i d_i\cdot(x-\hat
# x)$ and the residual as it is, they are the same number. With the exact $I_i$ they are not: they
# differ by $\theta^2\lVert d\rVert^2 - 2\theta\pi\lVert d\rVert^2 H(\pi-\theta)$ a sample, which
# cancels only on average and only in the limit of a narrow window.

# %%
batch = next(inputs.batches(4096, torch.Generator().manual_seed(2)))
identity = theorem.identity_errors(coder, batch, toy_lambda, [0.05, 0.3])
identity_facts = {
    "equal to rounding, four kernels (1e-12)": bool((identity.as_it_is < 1e-12).all()),
    "with the exact I, differs by at least": round(float(identity.exact.min()), 2),
}
identity_facts

# %% [markdown]
# ## 5. What the bandwidth costs
#
# **Gemma Scope says** (a footnote of its training section) that a wide window is biased and a
# narrow one noisy, because few samples fall into it.
#
# **Computed here**: bias by quadrature (exact), variance from the per-sample gradients of autograd,
# all thresholds together, relative to the length of the exact gradient. Black points are whole
# batches drawn and compared.

# %%
kernel_sds = np.geomspace(0.0005, 0.4, 19)
sweep = remember(
    bandwidth.bandwidth_sweep, coder, inputs, toy_lambda, kernel_sds, sweep_samples, sweep_repeats
)
swept = bandwidth.error_curves(sweep[sweep.kernel == "rectangle"], [1024, 4096, 65536, 1048576])
drawn_at = sorted(swept.bandwidth.unique())[3::3]
drawn = remember(
    bandwidth.batch_errors, coder, inputs, toy_lambda, drawn_at, 4096, drawn_batches, seed=3
)
drawn = drawn.rename(columns={"mean": "measured", "low": "measured_low", "high": "measured_high"})
swept = swept.merge(
    drawn.assign(estimator="straight-through"),
    on=["estimator", "bandwidth", "batch_size"],
    how="left",
)
save_figure("01", plots.bias_and_noise, swept)

# %% [markdown]
# The least error moves to narrower windows as the batch grows. For a bias of order $\varepsilon^b$
# and a variance of order $1/(N\varepsilon)$ it lies at $\varepsilon^* \propto N^{-1/(2b+1)}$. The
# textbook slope for a symmetric kernel is $-1/5$. By section 3 the straight-through gradient has
# $b=1$, and should follow $-1/3$.

# %%
best = bandwidth.best_bandwidths(sweep, [2**k for k in range(14, 23, 2)])
slope = bandwidth.slopes(best)
slope_interval = {name: mean_interval(group.value) for name, group in slope.groupby("estimator")}
rates = {"straight-through": -1 / 3, "exact I": -1 / 5}
best_summary = summarise(best, ["estimator", "batch_size"], "bandwidth")
best_summary["slope"] = best_summary.estimator.map(
    {name: i.mean for name, i in slope_interval.items()}
)
best_summary["theory"] = best_summary.estimator.map(rates)
save_figure("01", plots.best_bandwidth, best_summary)

# %%
by_kernel = bandwidth.error_curves(sweep, [4096])
save_figure("01", plots.kernel_comparison, by_kernel)


# %%
def least(estimator: str) -> float:
    one = swept[(swept.estimator == estimator) & (swept.batch_size == 4096)]
    return float(one.error.min())


def spread(column: str, at: float) -> float:
    """Largest over smallest error of the four kernels, where `column` is `at`."""
    one = by_kernel[by_kernel.estimator == "straight-through"]
    errors = [
        np.exp(np.interp(np.log(at), np.log(k[column]), np.log(k.error)))
        for _, k in one.groupby("kernel")
    ]
    return float(max(errors) / min(errors))


check = swept.dropna(subset=["measured"])
between = sum(rates.values()) / 2
overlap = (check.measured_low <= check.high) & (check.low <= check.measured_high)
bandwidth_facts = {
    "widths at which the error was measured": len(check),
    "of these, predicted and measured intervals overlap": int(overlap.sum()),
    "slope of ε* over N, straight-through": round(slope_interval["straight-through"].mean, 2),
    "slope of ε* over N, exact I": round(slope_interval["exact I"].mean, 2),
    "straight-through: nearer to -1/3 than to -1/5": slope_interval["straight-through"].high
    < between,
    "exact I: nearer to -1/5 than to -1/3": slope_interval["exact I"].low > between,
    "least error, straight-through, N = 4096": round(least("straight-through"), 3),
    "least error, exact I, N = 4096": round(least("exact I"), 3),
    "kernels' errors at equal ε = 0.1, largest over smallest": round(spread("bandwidth", 0.1), 2),
    "kernels' errors at equal sd = 0.03, largest over smallest": round(
        spread("kernel_sd", 0.03), 2
    ),
}
bandwidth_facts

# %% [markdown]
# **What differs**: reviews of the paper quote it as finding that kernels train alike. Their
# gradients are alike once compared at an equal standard deviation; at an equal $\varepsilon$ they
# are different amounts of smoothing.

# %% [markdown]
# ## 6. Real activations
#
# **Computed here**: a small JumpReLU SAE is trained briefly on a language model's activations. Then
# its straight-through gradients are held against finite differences of the loss itself on the same
# activations, latent by latent. These are the activations it was trained on, as in training itself;
# batches are drawn without replacement from shuffled rows, so intervals cover new batches from
# these texts, not other texts. Units are those of training, $E\lVert x\rVert^2=1$.

# %%
lm = jr.load_lm(model or None)
tokens = jr.tokenize(
    jr.load_texts(dataset, "train"),
    lm.tokenizer,
    context_size=context_size,
    max_rows=rows,
    rows_per_document=8,
)
acts = remember(jr.harvest, lm, tokens, site=site, layer=layer, dtype=storage)
config = jr.TrainConfig(d_sae=d_sae, steps=steps, sparsity=sparsity)
sae, log = remember(jr.train, acts, config)

widths = [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4]
measured = remember(
    on_activations.gradients_on, acts, sae, sparsity, widths, latents, batch_size, batches
)

# %%
per_latent = on_activations.agreement(measured)
shown_widths = per_latent[per_latent.bandwidth.isin([0.025, 0.1, 0.4])]
sides = []
for side in ("ste", "difference"):
    one = shown_widths[shown_widths.quantity == side].drop(columns="quantity")
    sides.append(one.rename(columns={"mean": side, "low": f"{side}_low", "high": f"{side}_high"}))
points = sides[0].merge(sides[1], on=["bandwidth", "latent"])
save_figure("01", plots.real_agreement, points)

# %%
errors = on_activations.measured_errors(measured, reference=0.025).assign(batch_size=batch_size)
save_figure("01", plots.real_bandwidth, errors)

# %%
row = errors.set_index(["quantity", "bandwidth"])
gaps = per_latent[per_latent.quantity == "gap"].set_index("bandwidth")
zero_inside = (gaps.low <= 0) & (gaps.high >= 0)
real_facts = {
    "a wide window is biased, a narrow one less": bool(
        row.loc[("bias", 0.4), "low"] > row.loc[("bias", 0.0125), "high"]
    ),
    "a narrow window is noisy, a wide one less": bool(
        row.loc[("noise", 0.0125), "low"] > row.loc[("noise", 0.4), "high"]
    ),
    "the gap to finite differences closes with ε": bool(
        row.loc[("gap", 0.2), "low"] > row.loc[("gap", 0.0125), "high"]
    ),
    "latents measured": int(measured.latent.nunique()),
    "latents that agree with finite differences, ε = 0.0125": int(zero_inside.loc[0.0125].sum()),
    "latents that agree with finite differences, ε = 0.2": int(zero_inside.loc[0.2].sum()),
    "relative bias at ε = 0.05 and 0.1": " and ".join(
        f"{row.loc[('bias', e), 'mean'] ** 0.5:.0%}" for e in (0.05, 0.1)
    ),
    "noise of one batch there": " and ".join(
        f"{row.loc[('noise', e), 'mean'] ** 0.5:.0%}" for e in (0.05, 0.1)
    ),
    "share of pre-activations in the window, ε = 0.1": round(
        float(row.loc[("bias", 0.1), "share"]), 3
    ),
}
real_facts

# %% [markdown]
# **What differs** from section 5: no closed form is known here, so the bias is to a finite
# difference over a narrow window, with its noise subtracted without bias (a product of independent
# batches). The gap to the difference over the *same* window is, to first order, what autograd's
# one-sided residual costs; beyond that, θ standing for z. A window wider than twice the threshold
# also takes in negative pre-activations, which no threshold could turn on. Where the relative bias
# exceeds the noise of a batch, a narrower window would make better gradients, and Adam averages
# noise over steps besides.

# %% [markdown]
# ## Facts

# %% tags=["nbval-ignore-output"]
near = others[int(false_positive_gap.mean.argmin())]
closest = Interval(*(float(ends[others.index(near)]) for ends in false_positive_gap))
relative = Interval(
    *(max(0.0, float(row.loc[("gap", 0.0125), end])) ** 0.5 for end in ("mean", "low", "high"))
)
ledger(
    "01",
    [
        claim(
            "J1",
            "JumpReLU",
            "On one latent JumpReLU has fewer false positives than ReLUs with any bias.",
            f"share of false positives, {near} − JumpReLU",
            closest,
            (0, float("inf")),
            "01_toy_errors",
        ),
        claim(
            "J2",
            "JumpReLU",
            "The straight-through gradient is that of the expected loss (narrow ε, real data, "
            "within 10 %).",
            "distance to finite differences over the same window, relative",
            relative,
            (0, 0.1),
            "01_real_bandwidth",
        ),
    ],
)[["id", "claim", "value", "low", "high", "verdict"]]

# %% tags=["facts"]
show_facts(
    "01",
    {
        **toy_facts,
        **lemma_facts,
        **theorem_facts,
        **identity_facts,
        **bandwidth_facts,
        **real_facts,
    },
)

for found in (toy_facts, lemma_facts, theorem_facts, identity_facts, bandwidth_facts, real_facts):
    for name, holds in found.items():
        assert holds is not False, name
