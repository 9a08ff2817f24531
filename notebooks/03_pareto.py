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
# # Sparsity against fidelity
#
# The paper's main result is a set of curves: at equal L0, JumpReLU SAEs lose no more of the
# language model's loss than TopK SAEs and less than Gated ones, at three sites and three layers of
# Gemma 2 9B (what we know of its figures is second-hand). Each point there is one run. Here every
# architecture is trained on the same batches with learning rates tuned alike, over several seeds,
# and two curves are compared with a number and its interval. Then: does the order depend on site,
# layer, width and number of tokens?

# %%
import dataclasses

import pandas as pd
import torch
from companion.rails import frontier, scaling, study
from companion.rails.cache import remember
from companion.rails.claims import claim, ledger
from companion.rails.figures import save_figure, show_facts
from companion.rails.stores import harvest_places
from companion.training.plots import pareto as plots

import jumprelu as jr
from jumprelu.intervals import Interval

# %% tags=["parameters"]
model: str = ""  # empty: the embedded model; otherwise a hub id or a folder
dataset: str = "installed"  # text for training and evaluation
site: str = "resid_post"  # resid_post, mlp_out or attn_out
layer: int = 3
places: list = [
    ["resid_post", 1],
    ["resid_post", 5],
    ["mlp_out", 3],
    ["attn_out", 3],
]  # further sites and layers
context_size: int = 256
train_rows: int = 600  # rows of context_size tokens that are harvested for training
test_rows: int = 16  # rows for evaluation, of documents that no training saw
rows_per_document: int = 8  # of a document for training; for evaluation 1
storage: str = "float32"  # type of the activations on disk: float32, bfloat16 or float16
d_sae: int = 512
steps: int = 200
batch_size: int = 256
dead_after: int = 20000  # tokens of silence after which a latent counts as dead
seeds: int = 3
# Name: what differs from the defaults of TrainConfig; lists: one value for each point of the curve.
variants: dict = {
    "JumpReLU": {
        "threshold_init": [0.1, 0.07, 0.045, 0.03],
        "sparsity": [0.002, 0.001, 0.001, 0.001],
    },
    "TopK": {"architecture": "topk", "k": [10, 20, 36, 64]},
    "TopK, approximate": {"architecture": "topk", "k": [10, 20, 36, 64], "topk_buckets": 128},
    "BatchTopK": {"architecture": "batchtopk", "k": [10, 20, 36, 64]},
    "Gated": {"architecture": "gated", "sparsity": [0.12, 0.2, 0.3, 0.45], "sparsity_warmup": 0.1},
    "Gated, original": {
        "architecture": "gated",
        "unit_norm": True,
        "resample": [0.25, 0.5],
        "sparsity_warmup": 0.1,
        "sparsity": [0.06, 0.1, 0.15, 0.25],
    },
    "ReLU": {"architecture": "relu", "sparsity": [0.05, 0.08, 0.12, 0.18], "sparsity_warmup": 0.1},
}
lrs: list = [0.003, 0.006, 0.012, 0.024]  # each variant is tried at all, and compared at its best
tuning_points: list = [0, 3]  # at these points of its curve
same_lr: dict = {  # these take over a rate
    "TopK, approximate": "TopK",
    "BatchTopK": "TopK",
}
place_variants: list = [
    "JumpReLU",
    "TopK",
    "Gated, original",
]  # at the further sites and layers; the better one of Gated
place_d_sae: int = 256
place_steps: int = 120
place_seeds: int = 3
second_model: bool = False  # whether `model` is one on which the paper's order is to be found again
widths: list = [128, 256, 512, 1024]  # for the scaling of FVU with d_sae, at `steps` steps
widest: list = [4096]  # further widths, for TopK alone, whose steps cost least
lengths: list = [50, 100, 200]  # for its scaling with the number of steps, at `d_sae`
scaling_k: int = 32  # L0 of the scaling runs
scaling_seeds: int = 2
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
print(acts)
longest = max(steps, *lengths) * batch_size
print(
    f"{steps * batch_size:,} tokens a run; the longest run below, of {longest:,}, sees each "
    f"{longest / len(acts):.1f} times"
)
print(
    f"evaluation: {len(test_tokens)} rows of {len(test_tokens.document.unique())} held-out "
    "documents"
)

# %% [markdown]
# ## Learning rates, tuned alike
#
# **What the paper does.** Its baselines are Gated SAEs (with an L1 that does not depend on the norm
# of the atoms, "RI-L1") and TopK SAEs with an auxiliary loss for dead latents, each with settings
# of its own.
#
# **What is computed.** A comparison that tunes one side only says nothing. Each variant is trained
# at each of a few learning rates at two of its sparsities (some take over the rate of their nearest
# relative), and its best rate is the one whose frontier lies lowest at equal L0, by the statistic
# that is described below. Only the rate is searched for; the other settings of each, in the cell of
# parameters, were set by hand. "Gated" is the paper's RI-L1 baseline, "Gated, original" has atoms
# of norm 1 and resamples dead latents; "TopK, approximate" is trained with the largest of those
# that are each the largest of a bucket, which needs no sort, and scored with exact top-k;
# "JumpReLU" is the paper's, with one ε (notebook 05 lets it fall). The L1 variants have a shorter
# warm-up of λ, without which they are still dense at the end of so short a run.

# %%
base = jr.TrainConfig(d_sae=d_sae, steps=steps, batch_size=batch_size, dead_after=dead_after)
grid = {name: study.configurations(base, changes) for name, changes in variants.items()}
tried, best = study.tune_lr(
    acts, grid, lrs, tuning_points, same_lr, lm, test_tokens, workers or None
)
tried = tried[["architecture", "lr", "seed", "l0", "fvu", "delta_loss", "dead", "ratio", "best"]]
save_figure("03", plots.tuning, tried)

# %% [markdown]
# A curve that bends up or ends in the upper left belongs to runs that collapsed at that rate. One
# seed, used again below.
#
# ## Frontiers
#
# **What the paper claims** (second-hand). At any L0 JumpReLU has a lower delta LM loss than Gated,
# and one that is no higher, often slightly lower, than TopK's; the order is the same in FVU. No
# intervals are given.
#
# **What is computed.** Every variant at its rate, at four sparsities, over seeds; a seed sets
# initial weights and the order of the batches, so that all variants of one seed see the same
# batches. Markers are runs, lines the mean over seeds, bands 95 % t-intervals of that mean in
# logarithms.

# %%
main = study.sweep_variants(acts, best, range(seeds), lm, test_tokens, workers or None)
runs = [
    main.table.assign(metric=metric, kind="run", value=main.table[metric])
    for metric in ("fvu", "delta_loss")
]
curves = [
    frontier.bands(main.table, metric)
    .rename(columns={"mean": "value"})
    .assign(metric=metric, kind="band")
    for metric in ("fvu", "delta_loss")
]
shown = pd.concat([*runs, *curves], ignore_index=True)[
    ["architecture", "metric", "kind", "seed", "l0", "value", "low", "high"]
]
save_figure("03", plots.pareto, shown)

# %% [markdown]
# ## One number for two curves
#
# In each seed by itself, the logarithms of both metrics are interpolated, linearly in log L0, over
# the range of L0 that both curves reach, and their difference is averaged over that range. The mean
# over seeds with its t-interval, turned back from logarithms, is the comparison: 0.9 means a tenth
# less error at equal L0. Nothing is extrapolated. A run that lies far off its curve has collapsed;
# it is kept, because a rate at which one seed of three collapses is part of what a variant is like.

# %%
others = [name for name in best if name != "JumpReLU"]
pairs = [("JumpReLU", other) for other in others] + [
    ("TopK", "Gated"),
    ("TopK, approximate", "TopK"),
    ("BatchTopK", "TopK"),
]
matched = pd.DataFrame(
    [
        {
            "one": one,
            "other": other,
            "metric": metric,
            **frontier.compare(main.table, one, other, metric)._asdict(),
        }
        for one, other in pairs
        for metric in ("delta_loss", "fvu")
    ]
)
save_figure("03", plots.matched_l0, matched)

# %% [markdown]
# ## Other sites and layers
#
# **What the paper claims** (second-hand). The same order at the residual stream, the MLP output and
# the attention output, early, in the middle and late.
#
# **What is computed.** Smaller and shorter runs of three architectures, at the learning rates found
# above; intervals over seeds, as before. (A profile with fewer than three seeds here borrows their
# spread from the main place.)

# %%
stores = harvest_places(lm, train_tokens, [(s, n) for s, n in places], storage)
small = {
    name: [
        dataclasses.replace(config, d_sae=place_d_sae, steps=place_steps) for config in best[name]
    ]
    for name in place_variants
}
elsewhere = study.sweep_variants(
    stores, small, range(place_seeds), lm, test_tokens, workers or None
).table
drawn = elsewhere[["site", "layer", "architecture", "seed", "l0", "fvu", "delta_loss"]]
save_figure("03", plots.places, drawn)

# %%
ratios = study.ratios_by_place(
    elsewhere, main.table, "JumpReLU", [name for name in place_variants if name != "JumpReLU"]
)
save_figure("03", plots.place_ratios, ratios)

# %% [markdown]
# ## Width and data
#
# **What is known.** Wider SAEs and longer runs are better at equal L0; Gemma Scope's largest have a
# million latents and 16 billion tokens.
#
# **What is computed.** FVU and delta LM loss at one L0 over width and over the number of steps:
# TopK with that k (to greater widths, because its steps cost less here), and JumpReLU trained with
# the L0-target loss for less and for more, interpolated between. Power laws are fitted without the
# largest point (dashed), which they must then predict: where measured over predicted is above 1
# beyond its interval, the curve flattens, and the fit promises too much for larger scales. Where
# two runs do not enclose the L0, which happens when too few steps move θ too little, the point is
# missing.

# %%
aimed = dataclasses.replace(best["JumpReLU"][1], sparsity_loss="l0_target_batch", sparsity=1.0)
at_one_l0 = {
    "TopK": [dataclasses.replace(best["TopK"][0], k=scaling_k)],
    "JumpReLU": [dataclasses.replace(aimed, l0_target=share * scaling_k) for share in (0.5, 1.6)],
}
grown = pd.concat(
    [
        study.scaling_table(
            acts,
            lm,
            test_tokens,
            {name: at_one_l0[name]},
            scaling_k,
            reached,
            lengths,
            range(scaling_seeds),
            workers or None,
        )
        for name, reached in (("TopK", [*widths, *widest]), ("JumpReLU", widths))
    ],
    ignore_index=True,
)
save_figure("03", plots.scaling, grown)

# %%
enclosed = grown.groupby(["architecture", "quantity", "metric", "x"]).value.transform(
    lambda values: values.notna().all()
)
laws = pd.concat(
    [
        scaling.fits(rows.rename(columns={"value": "y"}), "x", "y").assign(
            quantity=quantity, metric=metric
        )
        for (quantity, metric, _), rows in grown[enclosed].groupby(
            ["quantity", "metric", "architecture"], sort=False
        )
        if rows.x.nunique() > 1
    ],
    ignore_index=True,
)

# %% [markdown]
# ## What holds here
#
# The ledger's verdicts follow from the intervals: "reproduced" if the whole interval lies where the
# claim is true, "not reproduced" if none of it does, else "undecided". The intervals are over seeds
# that share the held-out documents, on which the rates were chosen too: they say how another run
# would come out, and nothing about other text. What is claimed at every sparsity is judged by the
# largest ratio over the range of L0.

# %% tags=["nbval-ignore-output"]


def versus(one: str, other: str, metric: str = "delta_loss", worst: bool = False):
    return frontier.compare(main.table, one, other, metric, worst)


def of_place(other: str, site: str, layer: int):
    """JumpReLU over another at one place."""
    rows = ratios[
        (ratios.other == other)
        & (ratios.metric == "delta_loss")
        & (ratios.place == f"{site}, layer {layer}")
    ]
    return Interval(*rows[["mean", "low", "high"]].iloc[0])


nothing = float("-inf")


few = "needs two seeds, and curves that overlap in L0"
unready = "L1 baselines are far from converged after so few steps"
alike = "only learning rates were tuned"
edge = {
    name: " (its best rate is at the edge of those tried)"
    for name, configs in best.items()
    if configs[0].lr in (min(lrs), max(lrs))
}


def paper(
    id: str,
    sentence: str,
    one: str,
    other: str,
    holds: tuple,
    metric: str = "delta_loss",
    source: str = "JumpReLU",
    worst: bool = False,
):
    """A claim on two architectures at the main place."""
    reason = (unready if other in ("Gated", "Gated, original", "ReLU") else alike) + edge.get(
        other, ""
    )
    error = {"fvu": "FVU", "delta_loss": "delta LM loss"}[metric]
    quantity = f"{error} at equal L0, {one} / {other}" + (", largest over L0" if worst else "")
    return claim(
        id,
        source,
        sentence,
        quantity,
        versus(one, other, metric, worst),
        holds,
        "03_matched_l0",
        reason,
        few,
    )


better, level, same = (
    (nothing, 1),
    (nothing, 1.05),
    (1 / 1.05, 1.05),
)  # "level" and "as good" leave a tolerance of 5 %
claims = [
    paper(
        "J3a",
        "Better than Gated at any sparsity (residual stream).",
        "JumpReLU",
        "Gated",
        better,
        worst=True,
    ),
    paper(
        "J3e",
        "Better than the original Gated at any sparsity (residual stream).",
        "JumpReLU",
        "Gated, original",
        better,
        worst=True,
    ),
    paper(
        "J3b",
        "Level with or better than TopK (residual stream; up to 5 % counts as level).",
        "JumpReLU",
        "TopK",
        level,
    ),
    paper("J3c", "Slightly better than TopK (residual stream).", "JumpReLU", "TopK", better),
    paper("J3d", "TopK is better than Gated (residual stream).", "TopK", "Gated", better),
    *(
        claim(
            f"{number}{letter}{n}",
            "JumpReLU",
            f"{what}, {s} of layer {n}.",
            f"delta LM loss at equal L0, JumpReLU / {other}",
            of_place(other, s, n),
            holds,
            "03_place_ratios",
            unready if letter == "a" else alike,
            few,
        )
        for s, n in places
        for number in [{"resid_post": "J3", "mlp_out": "J4", "attn_out": "J5"}[s]]
        for letter, other, what, holds in (
            ("a", place_variants[2], "Better than Gated", better),
            ("b", "TopK", "Level with or better than TopK", level),
        )
    ),
    paper("J6a", "Better than Gated in FVU.", "JumpReLU", "Gated", better, "fvu"),
    paper(
        "J6c",
        "Better than the original Gated in FVU.",
        "JumpReLU",
        "Gated, original",
        better,
        "fvu",
    ),
    paper("J6b", "Level with or better than TopK in FVU.", "JumpReLU", "TopK", level, "fvu"),
    paper(
        "J13",
        "Approximate TopK is about as good as exact (within 5 %).",
        "TopK, approximate",
        "TopK",
        same,
    ),
    claim(
        "J17",
        "JumpReLU",
        "Level with or better than TopK on a second model (Pythia 2.8B).",
        "delta LM loss at equal L0, JumpReLU / TopK",
        versus("JumpReLU", "TopK") if second_model else None,
        level,
        "03_matched_l0",
        missing="needs profile pythia-2.8b, a GPU and two seeds",
    ),
    paper("P1", "Better than ReLU with L1.", "JumpReLU", "ReLU", better, source="ours"),
    paper(
        "P2",
        "JumpReLU is level with or better than BatchTopK.",
        "JumpReLU",
        "BatchTopK",
        level,
        source="ours",
    ),
    *(
        claim(
            f"P{number}",
            "ours",
            f"A power law in {name}, fitted without the last point, predicts FVU there within 5 % "
            "(TopK).",
            "FVU measured / predicted",
            Interval(*row[["ratio", "ratio_low", "ratio_high"]]),
            same,
            "03_scaling",
            missing="needs two seeds and three points",
        )
        for number, name in ((3, "width"), (4, "tokens"))
        for _, row in laws[
            (laws.quantity == name) & (laws.metric == "fvu") & (laws.architecture == "TopK")
        ].iterrows()
    ),
]
ledger("03", claims)[["id", "claim", "value", "low", "high", "verdict"]]

# %% [markdown]
# **What differs from the paper, and why.** The ReLU and Gated SAEs here are far from converged:
# their L1 has to push out, step by step, what JumpReLU's start at θ_init and TopK's k never let in,
# and a few hundred steps are few for it; the paper's runs take billions of tokens. So a wide margin
# over Gated says as much about speed of training as about the architecture; the ledger's lines of
# the `thorough` profile, with ten times the tokens, say how it changes. Only learning rates were
# tuned: other settings of the baselines, and Adam's momentum (notebook 05), would move some of
# these ratios. A narrow miss of the power law in width is within its tolerance and still a curve
# that flattens. All numbers are of a model of six layers and a text corpus of code.
#
# ## Facts

# %% tags=["facts"]
show_facts(
    "03",
    {
        "training activations": len(acts),
        "variants": len(variants),
        "points of each frontier": len(grid["TopK"]),
        "places": len(stores),
        "JumpReLU is better than ReLU and Gated at equal L0, beyond its interval": bool(
            versus("JumpReLU", "ReLU").high < 1 and versus("JumpReLU", "Gated").high < 1
        ),
        "FVU falls with width and with tokens": bool(
            (laws[laws.metric == "fvu"].exponent > 0).all()
        ),
    },
)
