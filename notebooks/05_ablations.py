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
# # What each part of the recipe does, and a bandwidth that falls
#
# Notebook 03 compared architectures. This one takes the JumpReLU recipe apart: which part matters,
# by how much, on runs as short as these; and whether a bandwidth ε that falls during the run beats
# a fixed one.

# %%
import dataclasses
import functools

import numpy as np
import pandas as pd
import torch
from companion.rails import frontier, study
from companion.rails.cache import remember
from companion.rails.claims import claim, ledger
from companion.rails.figures import save_figure, show_facts
from companion.rails.repeats import mean_interval, share_interval
from companion.ste import on_activations
from companion.training.plots import ablations as plots

import jumprelu as jr
from jumprelu.intervals import Interval
from jumprelu.recipe import bandwidth_at, sparsity_at

# %% tags=["parameters"]
model: str = ""  # empty: the embedded model; otherwise a hub id or a folder
dataset: str = "installed"  # text for training and evaluation
site: str = "resid_post"  # resid_post, mlp_out or attn_out
layer: int = 3
context_size: int = 256
train_rows: int = 600  # rows of context_size tokens that are harvested for training
test_rows: int = 16  # rows for evaluation, of documents that no training saw
rows_per_document: int = 8  # of a document for training; for evaluation 1
storage: str = "float32"  # type of the activations on disk: float32, bfloat16 or float16
d_sae: int = 512
steps: int = 200
batch_size: int = 256
dead_after: int = 20000  # tokens of silence after which a latent counts as dead
lr: float = 0.006
seeds: int = 3
# The recipe at several sparsities: fields of TrainConfig that differ from its defaults.
reference: dict = {
    "threshold_init": [0.1, 0.07, 0.045, 0.03, 0.015],
    "sparsity": [0.002, 0.001, 0.001, 0.001, 0.0003],
}
setting: int = 2  # which of these the ablations start from
ablations: dict = {  # name: what is changed
    "STE to z as well": {"ste_to_z": True},
    "STE to z as well, ε = 0.02": {"ste_to_z": True, "bandwidth": 0.02},
    "triangular kernel": {"kernel": "triangular", "bandwidth": 0.0707},
    "Gaussian kernel": {"kernel": "gaussian", "bandwidth": 0.0289},
    "Epanechnikov kernel": {"kernel": "epanechnikov", "bandwidth": 0.0645},
    "θ itself, not log θ": {"log_threshold": False},
    "θ learns 0.1 times as fast": {"threshold_lr": 0.1},
    "θ learns 10 times as fast": {"threshold_lr": 10.0},
    "θ starts at 0.01": {"threshold_init": 0.01},
    "λ at once": {"sparsity_warmup": 0.0},
    "no decay of lr": {"lr_decay": 0.0},
    "b_dec from zero": {"mean_b_dec": False},
    "Adam with β₁ = 0.9": {"betas": [0.9, 0.999]},
}
cells: dict = {  # what is left of {JumpReLU, ReLU} × {L0, L1}, at several prices
    "JumpReLU with L1": {
        "sparsity_loss": "l1",
        "sparsity": [0.01, 0.025, 0.06],
        "sparsity_warmup": 0.1,
    },
    "ReLU with L0": {
        "architecture": "relu",
        "sparsity_loss": "l0",
        "sparsity": [0.001, 0.003, 0.01],
    },
    "ReLU with L1": {"architecture": "relu", "sparsity": [0.05, 0.1, 0.18], "sparsity_warmup": 0.1},
}
bandwidth_start: float = (
    0.01  # θ_init of the runs that sweep the bandwidth, below where θ wants to be
)
bandwidths: list = [0.003, 0.02, 0.1, 0.5]  # ε of those runs
targets: list = [20.0, 45.0]  # for the losses with an L0 target
target_losses: dict = {
    "per token, λ = 0.3": {"sparsity_loss": "l0_target", "sparsity": 0.3},
    "per token, λ = 3": {"sparsity_loss": "l0_target", "sparsity": 3.0},
    "mean of the batch, λ = 1": {"sparsity_loss": "l0_target_batch", "sparsity": 1.0},
}
# Ways to choose ε, and Adam's momentum; the first is what the others are compared with.
methods: dict = {
    "ε = 0.1": {
        "sparsity": [0.001, 0.0004]
    },  # at two prices: it ends sparser than the others, which are to lie within its curve
    "ε = 0.02": {"bandwidth": 0.02},
    "ε falls": {"bandwidth_end": 0.02},
    "β₁ = 0.9": {"betas": [0.9, 0.999]},
}
method_settings: list = [1, 3]  # of the reference
rivals: dict = {
    "TopK": {"architecture": "topk", "k": [20, 64]},
    "TopK, β₁ = 0.9": {"architecture": "topk", "k": [20, 64], "betas": [0.9, 0.999]},
}
lengths: list = [200]  # steps of those runs
few_methods: list = [
    "ε = 0.1",
    "ε = 0.02",
    "ε falls",
    "TopK",
]  # those that are run for longer and in other places, too
more_lengths: list = []  # longer runs of these, such as those of the profile `thorough`
method_places: list = []  # where else, [site, layer], at `steps` steps
along: list = [0.15, 0.4, 0.7, 1.0]  # shares of a run at which its estimator is measured
along_bandwidths: list = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
along_latents: int = 64
along_batch_size: int = 2048
along_batches: int = 24
# Training steps over which a threshold averages its gradients: an assumption, see the text.
along_steps: int = 100
workers: int = 0  # processes that train, each with one thread; 0: one a core
threads: int = 2

# %%
torch.set_num_threads(threads)
lm = jr.load_lm(model or None)
train_tokens = jr.tokenize(
    jr.load_texts(dataset, "train"), lm.tokenizer, context_size, train_rows, rows_per_document
)
test_tokens = jr.tokenize(
    jr.load_texts(dataset, "test"), lm.tokenizer, context_size, test_rows, rows_per_document=1
)
acts = remember(jr.harvest, lm, train_tokens, site=site, layer=layer, dtype=storage)
most = max(steps, *lengths, *more_lengths) * batch_size
print(f"{acts}; the longest run sees {most:,} tokens, each {most / len(acts):.1f} times")
base = jr.TrainConfig(d_sae=d_sae, steps=steps, batch_size=batch_size, dead_after=dead_after, lr=lr)
recipe = study.configurations(base, reference)


def trained(variants: dict, number_of_seeds: int = seeds, store=acts) -> study.Sweep:
    return study.sweep_variants(
        store, variants, range(number_of_seeds), lm, test_tokens, workers or None
    )


# %% [markdown]
# ## One change at a time
#
# **What the paper claims** (all second-hand). Letting the estimator's pseudo-gradient reach the
# pre-activations leaves dead latents and a poor fit (an ablation of the conference version); both
# the jump and the L0 penalty are needed; the kernel hardly matters. Its recipe: log θ, θ_init = ε =
# 0.001, lr 7e-5, batches of 4,096, no decay of the learning rate.
#
# **What is computed.** The recipe of notebook 03 with one thing changed; and the other three of
# {JumpReLU, ReLU} × {L0, L1}, each at three prices (a ReLU can be trained with L0 only with the
# pseudo-gradient to z; L1 gets a shorter warm-up of λ, as in notebook 03). A change moves L0 as
# well, so its FVU is divided by that of the unchanged recipe at the same L0, seed by seed,
# interpolated along the bend of the recipe's own frontier. Above 1: the change costs fidelity. Bars
# are 95 % t-intervals over seeds. Where L0 leaves the range of that frontier there is no ratio,
# only the L0. Kernels have the rectangle's standard deviation. Nothing was tuned anew for a change.

# %%
frontier_runs = trained({"the recipe": recipe})
changed = {
    name: study.configurations(recipe[setting], changes) for name, changes in ablations.items()
}
halves = {name: study.configurations(recipe[setting], changes) for name, changes in cells.items()}
priced = {
    f"{name}, λ = {config.sparsity:g}": [config]
    for name, configs in halves.items()
    for config in configs
}
ablated = study.beside_frontier(trained(changed | priced).table, frontier_runs.table)
bends = {metric: frontier.bend(frontier_runs.table, metric) for metric in ("fvu", "delta_loss")}
ablated = ablated[["architecture", "seed", "l0", "fvu", "delta_loss", "dead", "ratio"]]
save_figure("05", plots.ablations, ablated)

# %% [markdown]
# The paper's own lr of 7e-5 and θ_init = ε = 0.001 are not among the rows: its runs take about two
# million steps, and in a few hundred log θ moves by at most steps × lr. Changes are tried one at a
# time: what two do together is not the product of what each does.
#
# ## The bandwidth
#
# **What Gemma Scope says** (a footnote of its training section): a large ε gives biased gradients
# of low variance, hence good sparsity and less than optimal fidelity; with a small ε the thresholds
# fail to train, and the SAE fails to be sparse.
#
# **What is computed.** Runs with a fixed ε, everything else equal, that start from a θ well below
# where the recipe's ends, as Gemma Scope's do: a θ that is not trained leaves the SAE dense.
# (Notebook 02 starts above.) Shown are L0; by how much log θ has risen, in the mean over latents
# (filled), and by how much it has moved, up or down (hollow), because Adam makes steps of similar
# size of a gradient that is mostly noise; and FVU over that of the recipe at equal L0. Notebook 01
# measured bias and noise: the bias grows with ε, the noise of a batch as 1/√ε.

# %%
below = dataclasses.replace(recipe[setting], threshold_init=bandwidth_start)
swept = trained({f"{e:g}": [dataclasses.replace(below, bandwidth=e)] for e in bandwidths})
started = np.log(bandwidth_start)
sweep_table = study.beside_frontier(swept.table, frontier_runs.table).assign(
    bandwidth=[float(name) for name in swept.table.architecture],
    threshold_rise=[study.log_threshold(run.sae()).mean().item() - started for run in swept.runs],
    threshold_travel=[
        (study.log_threshold(run.sae()) - started).abs().mean().item() for run in swept.runs
    ],
)
sweep_table = sweep_table[
    ["bandwidth", "seed", "l0", "fvu", "threshold_rise", "threshold_travel", "ratio"]
]
save_figure("05", plots.bandwidth_sweep, sweep_table)

# %% [markdown]
# ## Losses with an L0 target
#
# **What is claimed** (second-hand). λ(‖f‖₀/target − 1)² trains an SAE to a chosen L0; the form per
# token or for the mean of the batch is ambiguous in what we could read. Gemma Scope 2's
# 2/target·(‖f‖₀ − target)² per token is the same loss as the former, at 2·target times the price.
#
# **What is computed.** Both, the form per token at two prices, at several targets: the L0 they end
# at, and FVU over the plain recipe's at that L0. A penalty for each token also punishes tokens for
# needing more latents than others.

# %%
aimed = {
    f"{name}: {target:g}": [dataclasses.replace(recipe[setting], l0_target=target, **loss)]
    for name, loss in target_losses.items()
    for target in targets
}
hit = study.beside_frontier(trained(aimed).table, frontier_runs.table)
hit[["loss", "target"]] = hit.architecture.str.split(": ", expand=True)
hit = hit.astype({"target": float})[["loss", "target", "seed", "l0", "fvu", "dense_10", "ratio"]]
save_figure("05", plots.l0_targets, hit)

# %% [markdown]
# ## A bandwidth that falls
#
# **What is known.** The field trains with one ε; we found no report of anything else. But the best
# ε of a kernel estimate depends on how many samples it has and on how large the gradient is
# (notebook 01), and neither is the same at the start and the end of a run.
#
# **What is computed.** ε fixed at 0.1 and 0.02, and falling geometrically from 0.1 to 0.02 over
# most of the run. Beside them, for scale, another change to the optimiser, momentum; and TopK,
# with and without it, at the learning rate that notebook 03 found. Each at two sparsities; in the
# profile `thorough` a few for longer and at other sites. The number is FVU, or delta LM loss, over
# that of ε = 0.1 at equal L0 and length, seed by seed. With two points a curve, interpolation would
# be by a chord, and whose points lie further apart would win: the bend of the recipe's frontier is
# used between them.

# %%
points = [recipe[n] for n in method_settings]
middle = recipe[setting]
ways = {
    name: [config for point in points for config in study.configurations(point, changes)]
    for name, changes in methods.items()
}
ways |= {name: study.configurations(base, changes) for name, changes in rivals.items()}
tables = []
for length in (*lengths, *more_lengths):
    longer = {
        name: [dataclasses.replace(config, steps=length) for config in ways[name]]
        for name in (ways if length in lengths else few_methods)
    }
    tables.append(trained(longer).table)
by_length = pd.concat(tables, ignore_index=True)
first = next(iter(methods))


def beside_fixed(rows: pd.DataFrame, place: str, tokens: int) -> list[dict]:
    """Each method of `rows` over the first of all, in both metrics."""
    return [
        {
            "architecture": name,
            "place": place,
            "tokens": tokens,
            "metric": metric,
            **frontier.compare(rows, name, first, metric, bend=bends[metric])._asdict(),
        }
        for name in rows.architecture.unique()
        if name != first
        for metric in ("fvu", "delta_loss")
    ]


here = f"{site}, layer {layer}"
ratios = [
    row
    for length, rows in by_length.groupby("steps")
    for row in beside_fixed(rows, here, length * batch_size)
]

# %%
for s, n in method_places:
    store = remember(jr.harvest, lm, train_tokens, site=s, layer=n, dtype=storage)
    rows = trained({name: ways[name] for name in few_methods}, store=store).table
    ratios += beside_fixed(rows, f"{s}, layer {n}", steps * batch_size)
compared = pd.DataFrame(ratios)
save_figure("05", plots.annealing, compared)

# %% [markdown]
# ## Why: the estimator along the run
#
# **What the theory says.** The straight-through gradient is a kernel estimate (notebook 01): its
# bias grows with ε, its variance falls with it. If the best ε fell along the run, letting ε fall
# would be explained; if it stayed where it is, it would not.
#
# **What is computed.** The SAE of a run with fixed ε, stopped at several shares of it. At each,
# gradients of the thresholds of its busiest latents at several ε, against the finite difference of
# the same batches' loss over the narrowest window: bias and noise in absolute units (loss per unit
# of θ), because near an optimum the gradient itself goes to zero. Noise is that of as many samples
# as a threshold is assumed to average over, the batches of a hundred steps: Adam with β₁ = 0
# averages nothing, but a parameter that moves by lr a step does.

# %%
looks = {share: dataclasses.replace(middle, stop_after=share) for share in along}
halted = trained({f"{share:g}": [look] for share, look in looks.items()}, 1)
measured = remember(
    on_activations.gradients_along,
    acts,
    dict(zip(looks, (run.sae() for run in halted.runs), strict=True)),
    {share: sparsity_at(look, look.length) for share, look in looks.items()},
    along_bandwidths,
    along_latents,
    along_batch_size,
    along_batches,
)
averaged = along_steps * batch_size / along_batch_size
errors, least = (
    f(measured, along_bandwidths[0], averaged)
    for f in (on_activations.along_run, on_activations.best_along)
)
fall = dataclasses.replace(middle, **methods["ε falls"])
falling = {share: bandwidth_at(fall, look.length) for share, look in looks.items()}
seen = errors.merge(least, on="share").assign(schedule=lambda table: table.share.map(falling))
save_figure("05", plots.estimator_along_run, seen)

# %% [markdown]
# The line on the right is the schedule of the falling ε; that run's own SAEs are not measured, the
# fixed ε's are, of one seed. If the best ε stays where it is along the run, then a falling ε owes
# what it gains to its narrow end, and a fixed ε of that width should do as well: that is why it is
# among the methods.
#
# ## What holds here
#
# Verdicts follow from 95 % intervals, over seeds unless the quantity says otherwise. Seeds share
# the held-out documents, and only the learning rate was tuned, of each architecture, in notebook
# 03. A falling ε would become the default of short runs if it beat both a wide and a narrow fixed
# ε, in FVU and in delta LM loss (A1 to A3); else it stays an option, `bandwidth_end`.

# %% tags=["nbval-ignore-output"]
nothing, everything = float("-inf"), float("inf")


def change(name: str):
    return frontier.log_interval(ablated[ablated.architecture == name].ratio)


def cell(name: str):
    """FVU of one of the cells over the recipe's at equal L0."""
    runs = trained({name: halves[name]}).table
    return frontier.compare(
        pd.concat([runs, frontier_runs.table]), name, "the recipe", bend=bends["fvu"]
    )


def against(column: str, one: float, other: float, interval=frontier.log_interval):
    """Ratio of a column of the bandwidth sweep at two ε, seed by seed."""
    rows = sweep_table.set_index(["bandwidth", "seed"])[column]
    return interval(rows[one] / rows[other])


short, long = lengths[0] * batch_size, max(*lengths, *more_lengths, lengths[0]) * batch_size


def ratio_of(one: str, other: str, tokens: int, metric: str = "fvu"):
    """A method over another at equal L0 at the main place, after so many tokens."""
    return frontier.compare(
        by_length[by_length.steps * batch_size == tokens], one, other, metric, bend=bends[metric]
    )


def of_place(place: str, name: str = "ε falls", metric: str = "fvu"):
    """A method over the first at another place."""
    rows = compared[
        (compared.architecture == name) & (compared.place == place) & (compared.metric == metric)
    ]
    return Interval(*rows[["mean", "low", "high"]].iloc[0])


costs, about = "FVU over the recipe's at equal L0", (1 / 1.05, 1.05)
why = "needs two seeds, and an L0 within the range of the curve it is compared with"
narrow, wide = bandwidths[0], bandwidths[-1]
rises = {
    e: mean_interval(rows.threshold_rise)
    for e, rows in sweep_table.groupby("bandwidth")
    if e != wide
}
usual = max(rises, key=lambda e: rises[e].mean)  # of the others, that at which θ rises most
judged = functools.partial(claim, missing=why)
unchanged = frontier_runs.table.groupby("seed").nth(setting)
tiny = float.fromhex("0x1p-1000")  # above zero
by_change = ablated.set_index(["architecture", "seed"]).ratio
from_narrow = dataclasses.replace(recipe[setting], bandwidth=0.02)
with_narrow = (
    study.beside_frontier(trained({"ε = 0.02": [from_narrow]}).table, frontier_runs.table)
    .set_index("seed")
    .ratio
)
best = least.set_index("share")[["best", "best_low", "best_high"]]
early, late = best.loc[along[0]], best.loc[along[-1]]
best_falls = Interval(
    late.best / early.best, late.best_low / early.best_high, late.best_high / early.best_low
)


def dead_difference(one: pd.DataFrame, other: pd.DataFrame):
    """Difference of two shares of dead latents, pooled over seeds; its ends are those of two
    binomial intervals, apart."""
    mine, theirs = (
        share_interval(round(rows.dead.sum() * d_sae), len(rows) * d_sae) for rows in (one, other)
    )
    return Interval(mine.mean - theirs.mean, mine.low - theirs.high, mine.high - theirs.low)


def miss(rows: pd.DataFrame):
    """The worst target of each seed: the factor by which L0 is off."""
    off = np.exp(np.abs(np.log(rows.l0 / rows.target))).groupby(rows.seed).max()
    found = mean_interval(off)
    return found._replace(low=max(1.0, found.low)) if np.isfinite(found.low) else found


claims = [
    judged(
        "J15a",
        "JumpReLU",
        "A pseudo-gradient to z as well spoils the fit.",
        costs,
        change("STE to z as well"),
        (1, everything),
        "05_ablations",
    ),
    judged(
        "J15b",
        "JumpReLU",
        "A pseudo-gradient to z as well kills latents.",
        "share of latents that never fire, minus the recipe's, binomial over latents of all seeds",
        dead_difference(ablated[ablated.architecture == "STE to z as well"], unchanged),
        (tiny, everything),
        "05_ablations",
    ),
    judged(
        "J15c",
        "JumpReLU",
        "JumpReLU needs the L0 penalty: with L1 it is worse.",
        costs,
        cell("JumpReLU with L1"),
        (1, everything),
        "05_ablations",
    ),
    judged(
        "J15d",
        "JumpReLU",
        "The L0 penalty needs the jump: with a ReLU, and a pseudo-gradient to z, it is worse.",
        costs,
        cell("ReLU with L0"),
        (1, everything),
        "05_ablations",
    ),
    judged(
        "J15h",
        "JumpReLU",
        "Both together beat ReLU with L1.",
        costs,
        cell("ReLU with L1"),
        (1, everything),
        "05_ablations",
    ),
    judged(
        "J15i",
        "ours",
        "A pseudo-gradient to z as well spoils the fit at a narrow ε.",
        "FVU at equal L0, with / without, ε = 0.02",
        frontier.log_interval(by_change["STE to z as well, ε = 0.02"] / with_narrow),
        (1, everything),
        "05_ablations",
    ),
    *(
        judged(
            f"J15{letter}",
            "JumpReLU",
            f"The {name} is about as good as the rectangle (within 5 %).",
            costs,
            change(name),
            about,
            "05_ablations",
        )
        for letter, name in (
            ("e", "triangular kernel"),
            ("f", "Gaussian kernel"),
            ("g", "Epanechnikov kernel"),
        )
    ),
    *(
        judged(
            f"J14{letter}",
            "JumpReLU",
            f"An L0 target ({name}) is met within 10 % (second-hand).",
            "largest factor between L0 and its target",
            miss(rows),
            (1, 1.1),
            "05_l0_targets",
        )
        for letter, (name, rows) in zip("abc", hit.groupby("loss", sort=False), strict=False)
    ),
    judged(
        "GFa",
        "Gemma Scope",
        "A wide ε costs fidelity.",
        f"FVU at equal L0, ε = {wide:g} over ε = {usual:g}",
        against("ratio", wide, usual),
        (1, everything),
        "05_bandwidth_sweep",
    ),
    judged(
        "GFd",
        "Gemma Scope",
        "A wide ε gives good sparsity.",
        f"L0 at the same λ, ε = {wide:g} over ε = {usual:g}",
        against("l0", wide, usual),
        (nothing, 1),
        "05_bandwidth_sweep",
    ),
    judged(
        "GFb",
        "Gemma Scope",
        "With a narrow ε thresholds fail to train (under half the way).",
        f"mean rise of log θ, ε = {narrow:g} over ε = {usual:g}",
        against("threshold_rise", narrow, usual, mean_interval) if rises[usual].low > 0 else None,
        (nothing, 0.5),
        "05_bandwidth_sweep",
        missing="needs two seeds, and a bandwidth at which θ rises for certain",
    ),
    judged(
        "GFc",
        "Gemma Scope",
        "With a narrow ε, from a start below, the SAE is less sparse.",
        f"L0 at the same λ, ε = {narrow:g} over ε = {usual:g}",
        against("l0", narrow, usual),
        (1, everything),
        "05_bandwidth_sweep",
    ),
    *(
        judged(
            f"A{number}{letter}",
            "ours",
            f"A falling ε beats {other}, {error}, after {tokens:,} tokens.",
            f"{error} at equal L0, falling / {other}",
            ratio_of("ε falls", other, tokens, metric),
            (nothing, 1),
            "05_annealing",
        )
        for number, other, tokens in (
            (1, "ε = 0.1", short),
            (2, "ε = 0.1", long),
            (3, "ε = 0.02", long),
            (4, "TopK", long),
        )
        if number != 2 or long > short
        for letter, metric, error in (("a", "fvu", "FVU"), ("b", "delta_loss", "delta LM loss"))
    ),
    *(
        judged(
            f"A6{'abcdefgh'[number]}",
            "ours",
            f"A falling ε beats ε = 0.1 at {s}, layer {n}.",
            f"FVU at equal L0, falling / ε = 0.1, after {steps * batch_size:,} tokens",
            of_place(f"{s}, layer {n}"),
            (nothing, 1),
            "05_annealing",
        )
        for number, (s, n) in enumerate(method_places)
    ),
    judged(
        "A7",
        "ours",
        "The bandwidth of least error falls along the run.",
        f"best ε at {along[-1]:.0%} of the run over that at {along[0]:.0%}, one seed, interval "
        "over batches",
        best_falls,
        (nothing, 1),
        "05_estimator_along_run",
        missing="the best ε must lie inside of the grid",
    ),
    judged(
        "A8a",
        "ours",
        "Momentum (β₁ = 0.9) makes no difference of more than 5 % to the paper's β₁ = 0.",
        "FVU at equal L0, JumpReLU with β₁ = 0.9 / 0",
        ratio_of("β₁ = 0.9", "ε = 0.1", short),
        about,
        "05_annealing",
    ),
    judged(
        "A8b",
        "ours",
        "Nor does it to TopK.",
        "FVU at equal L0, TopK with β₁ = 0.9 / 0",
        ratio_of("TopK, β₁ = 0.9", "TopK", short),
        about,
        "05_annealing",
    ),
    judged(
        "A8c",
        "ours",
        "With momentum JumpReLU is level with or better than TopK with momentum.",
        f"delta LM loss at equal L0, JumpReLU / TopK, after {short:,} tokens; up to 5 % counts as "
        "level",
        ratio_of("β₁ = 0.9", "TopK, β₁ = 0.9", short, "delta_loss"),
        (nothing, 1.05),
        "05_annealing",
    ),
]
ledger("05", claims)[["id", "claim", "value", "low", "high", "verdict"]]

# %% [markdown]
# **What differs from the paper, and why.** With the wide ε that short runs start from, a
# pseudo-gradient to z did no harm in these runs, and with a narrow one it did (J15a, J15i): what it
# costs depends on ε, and runs as short as these kill hardly any latent. A wide ε makes for sparsity
# and costs fidelity, and with a narrow one θ rises more slowly, as Gemma Scope says, if not by as
# much as "fail to train" (GFa to GFd).
#
# What a falling ε gains over a wide one in a short run does not last: in the `thorough` profile,
# from half a million to four million tokens, nothing is left of it at equal L0, though there the ε
# of least error does fall along the run. So no schedule became the default. At one price a wide ε
# ends far sparser, and the longer the run the more so; curves that do not overlap in L0 can look
# like a large gain, which is why the wide ε has two prices here. Momentum is worth more (A8), to
# TopK as well: the paper's β₁ = 0 is not the best for short runs either.
#
# ## Facts

# %% tags=["facts"]
show_facts(
    "05",
    {
        "changes tried": len(ablations),
        "lengths, tokens": ", ".join(
            f"{length * batch_size:,}" for length in (*lengths, *more_lengths)
        ),
        "a falling ε beats ε = 0.1 and ε = 0.02, in FVU and delta LM loss": all(
            one.verdict == "reproduced"
            for one in claims
            if one.id in ("A1a", "A1b", "A2a", "A2b", "A3a", "A3b")
        ),
        "noise falls with ε at every share of the run": bool(
            errors.sort_values("bandwidth")
            .groupby("share")
            .noise.apply(lambda noise: noise.is_monotonic_decreasing)
            .all()
        ),
    },
)
