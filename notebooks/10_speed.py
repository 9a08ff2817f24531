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
# # How fast, and why
#
# The JumpReLU paper argues that its SAEs are as cheap to train and to run as ReLU SAEs: one
# elementwise threshold more, and no partial sort as TopK needs. This notebook derives what a
# training step has to cost, shows that this package's step is the exact one although it computes a
# fraction of it, and compares it with other libraries on the same machine.
#
# What is timed was measured by `make benchmark` and lies in `figures/benchmark*.csv`: times differ
# from run to run, and so they are data here. Everything else is computed in the cells.

# %%
import dataclasses

import pandas as pd
import torch
from companion.rails import frontier, study
from companion.rails.cache import remember
from companion.rails.claims import claim, ledger
from companion.rails.figures import read_measured, save_figure, show_facts
from companion.rails.repeats import mean_interval
from companion.speed import plots, steptime

import jumprelu as jr
from jumprelu.architectures import Trainee
from jumprelu.intervals import Interval
from jumprelu.support import DENSE, Support

# %% tags=["parameters"]
model: str = ""  # empty: the embedded model; otherwise a hub id or a folder
dataset: str = "installed"  # text for training and evaluation
site: str = "resid_post"  # resid_post, mlp_out or attn_out
layer: int = 3
context_size: int = 256
train_rows: int = 400  # rows of context_size tokens that are harvested for training
test_rows: int = 24  # rows for evaluation, of documents that no training saw
storage: str = "float32"  # type of the activations on disk: float32, bfloat16 or float16
d_sae: int = 2048
steps: int = 300
batch_size: int = 512
bandwidth_end: float = (
    0.02  # ε falls to this, so that few pre-activations are in the window at the end
)
seeds: int = 3
threads: int = 2

# %%
torch.set_num_threads(threads)
lm = jr.load_lm(model or None)
train_tokens = jr.tokenize(
    jr.load_texts(dataset, "train"), lm.tokenizer, context_size, train_rows, rows_per_document=8
)
test_tokens = jr.tokenize(
    jr.load_texts(dataset, "test"), lm.tokenizer, context_size, test_rows, rows_per_document=2
)
acts = remember(jr.harvest, lm, train_tokens, site=site, layer=layer, dtype=storage)
speed = read_measured("benchmark.csv")
machine = read_measured("benchmark.json")
print(acts)
print(
    f"benchmark on {machine['cpu']} with {', '.join(machine['cpu_features'])}, "
    f"{machine['threads']} threads"
)

# %% [markdown]
# ## By hand
#
# A dense step multiplies [batch, d_in] by [d_in, d_sae] to encode, and goes back with [batch,
# d_sae] by [d_sae, d_in] to decode. Backwards, the activations get a gradient (one product), and so
# does each matrix (two more): **10 · d_in · d_sae** FLOPs a token, if one never computes the
# gradient of x, which nothing needs.
#
# But the loss depends on the pre-activations through a small set only: **S**, the entries that are
# active, and those within ε/2 of their threshold, because these train θ. Everything outside S has
# gradient zero, exactly. So only the encoder must look at all latents; the reconstruction and the
# gradients of both matrices need the active entries, and the gradient of the activations, which θ
# needs too, all of S. Mind the inactive part of the window: a sparse step that keeps the active
# entries alone would train θ with only some of its samples.

# %%
first = speed[
    (speed.system == "jumprelu") & (speed.architecture == "jumprelu") & (speed.task == "train")
].iloc[0]
by_hand = steptime.arithmetic(first.d_in, first.d_sae, first.l0, first.entries)
print(
    f"FLOPs a token at d_in {first.d_in}, d_sae {first.d_sae}, L0 {first.l0:.0f}, |S| "
    f"{first.entries:.0f} a token"
)
print(by_hand.astype({"dense": int, "on_s": int}).to_string(index=False))
total = by_hand[["dense", "on_s"]].sum()
print(f"dense over sparse: {total.dense / total.on_s:.1f}")

# %% [markdown]
# Bytes: Adam reads parameter, gradient and both moments and writes three of them, 28 bytes a
# parameter and step in float32. At β₁ = 0, the papers' choice, the first moment *is* the gradient,
# so the gradient's memory serves as its own: 24 bytes, and half the optimiser's state. The atoms'
# projection and renormalisation would go over them again; here they are done block by block in the
# same pass (`jumprelu.optim`).
#
# ## The same step
#
# **What is computed.** Loss and gradients of one batch of real activations, once with every entry
# and torch's own autograd, once on S alone, for each architecture; the largest relative difference
# of any parameter's gradient.


# %%
def largest_difference(architecture: str) -> float:
    config = jr.TrainConfig(architecture, d_sae, k=32)
    trainee = Trainee(acts.d_in, config, torch.Generator().manual_seed(0))
    x = acts.rows(1024)
    x = x / x.square().sum(-1).mean().sqrt()
    trainee.b_dec.data = x.mean(0)
    trainee.b_enc.data -= 0.1  # so that few latents are active
    gradients = []
    for layout in (DENSE, trainee.layout(x, config.bandwidth)):
        trainee.zero_grad()
        out = trainee(x, config.bandwidth, layout)
        terms = trainee.loss(x, out, 1e-3, config.bandwidth, dead=torch.arange(d_sae) % 8 == 0)
        sum(terms.values()).backward()
        gradients.append(
            {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}
        )
    assert isinstance(layout, Support)
    return max(
        ((b - a).norm() / a.norm()).item()
        for a, b in zip(*(each.values() for each in gradients), strict=True)
    )


differences = {
    name: largest_difference(name) for name in ("jumprelu", "relu", "gated", "topk", "batchtopk")
}
print(
    "largest relative difference below 1e-5:",
    {name: difference < 1e-5 for name, difference in differences.items()},
)

# %% [markdown]
# ## Looking in bfloat16
#
# Many CPUs multiply bfloat16 several times as fast as float32. Pre-activations rounded to eight
# bits would not do: θ and ε live on the scale of that rounding. But S can be *searched for* in
# bfloat16, with the bar lowered by the most that rounding can hide (‖x − x̃‖‖w‖ + 2⁻⁸‖x̃‖‖w‖, by
# Cauchy and Schwarz, and a little for the sums), and what is found computed again in float32. Then
# no value comes from bfloat16, and S is the same set.
#
# **What is computed.** The same runs with both searches. They are no longer the same bits, because
# a product of two vectors is not summed in the same order, and training amplifies such differences;
# they should differ by less than seeds do.

# %%
config = jr.TrainConfig(
    d_sae=d_sae, steps=steps, batch_size=batch_size, bandwidth_end=bandwidth_end
)
tables = []
for search in ("float32", "bfloat16"):
    runs = study.train_seeds(acts, dataclasses.replace(config, encoder_dtype=search), seeds)
    tables.append(
        study.score_table("JumpReLU", study.score_runs(runs, lm, test_tokens)).assign(search=search)
    )
searched = pd.concat(tables, ignore_index=True)[["search", "seed", "l0", "fvu"]]
save_figure("10", plots.search_dtype, searched)

# %% [markdown]
# ## Measured: training
#
# **What is computed.** Training steps of each library's own trainer, in turns on the same batches,
# on the same machine, with as many threads: medians over rounds with quartiles. *This package* in
# all its architectures, at the L0 in the table (set by a shift of the biases after a short warm-up)
# and ε = 0.02, where a run ends in which it falls from the default 0.1; "bf16" searches in
# bfloat16. The grey bars are yardsticks of the machine: the encoder's matmul alone, in one piece,
# into memory that is there already; and five times that, which is what the matmuls of a dense step
# come to.
#
# The second size has synthetic activations, because the embedded model is only 256 wide.

# %%
shown = [
    "system",
    "architecture",
    "dtype",
    "d_in",
    "d_sae",
    "batch",
    "tokens_per_s",
    "tokens_per_s_q1",
    "tokens_per_s_q3",
]
training = speed[(speed.task == "train") & speed.error.isna()][shown].reset_index(drop=True)
save_figure("10", plots.speed, training)

# %%
table = speed[(speed.task == "train") & speed.error.isna()]
print(
    table[
        [
            "system",
            "architecture",
            "dtype",
            "d_in",
            "d_sae",
            "l0",
            "entries",
            "tokens_per_s",
            "peak_mb",
            "ours_over_this",
            "times_floor1",
        ]
    ].to_string(index=False, float_format="{:.3g}".format, na_rep="")
)
failed = speed[speed.error.notna()]
print(
    failed[["system", "architecture", "error"]].drop_duplicates().to_string(index=False)
    if len(failed)
    else "all of them ran"
)

# %% [markdown]
# A dense step has dozens of elementwise operations on [batch, d_sae] besides its matmuls, each of
# which reads and writes tens of megabytes. On S those matrices do not exist. What `entries` adds to
# `l0` is the inactive part of the window: the price of training θ, which ReLU and TopK do not pay.
#
# ## Where the rest of the time goes
#
# **What is computed.** One step at the first size by function, with what it calls, and summed up:
# the encoder's matmul, the search in what it gave, the work on S (products at entries, sums over
# them, their transposition), Adam, and all else.

# %%
profile = read_measured("benchmark_profile.csv").fillna({"call": ""})
dearest = profile.groupby("search", sort=False).head(16).reset_index(drop=True)
save_figure("10", plots.step_profile, dearest)

# %%
shares = profile.pivot_table(
    index="part", columns="search", values="share", aggfunc="sum", sort=False
)
print(shares.map("{:.0%}".format).to_string())

# %% [markdown]
# ## When dense is faster
#
# **What is computed.** The time of a step over the share of entries in S, which θ sets. A step
# decides by its own batch, under a `SparsePolicy`: above `dense_above` it is dense, and above
# `bf16_below` it searches in float32, because what bfloat16 finds has to be computed a second time.

# %%
by_density = read_measured("benchmark_density.csv")
save_figure("10", plots.density, by_density)

# %% [markdown]
# ## Beside a busy neighbour
#
# Two threads share every operation of a step and meet at its end. By default the one that comes
# first spins; when another process wants the core, the spinning thread holds it and the one that is
# waited for does not get on. `import jumprelu` therefore tells OpenMP to spin for some microseconds
# and then to sleep (`jumprelu.threads`), unless torch is loaded already or the user has chosen.
#
# **What is computed.** The same training steps in three processes, one for each way of waiting, in
# turns; with nothing else on the machine, and beside one process that never rests.

# %%
by_neighbour = read_measured("benchmark_neighbour.csv")
save_figure("10", plots.neighbour, by_neighbour)

# %% [markdown]
# ## Measured: inference
#
# **What is computed.** Encoding and decoding of the same batches by the same systems; ours looks
# for what is active in the faster type, but for TopK.

# %%
encoding = speed[(speed.task == "inference") & speed.error.isna()][shown].reset_index(drop=True)
save_figure("10", plots.inference, encoding)

# %% [markdown]
# ## Equal tokens
#
# A fast step is worth nothing if what it trains is worse. **What is computed.** JumpReLU SAEs of
# three libraries on the same real activations for the same number of tokens, each over a range of
# sparsities: at the library's recommended settings, and at settings adapted to so short a run.
# Scored by the same code on held-out documents.

# %%
quality = read_measured("benchmark_quality.csv")
quality = quality[quality.fvu.notna()].reset_index(drop=True)
quality = quality[["system", "setting", "seed", "sparsity", "l0", "fvu", "seconds"]]
save_figure("10", plots.equal_tokens, quality)

# %% [markdown]
# Where a peer's runs and ours overlap in L0, the two frontiers are compared, seed by seed: the
# geometric mean of the ratio of their FVU over that range (`companion.rails.frontier`).
# "recommended" and "paper" are the library's and the paper's settings, "adapted" has constants for
# so short a run, as ours do.

# %%
matched = []
for (system, setting), theirs in quality[quality.system != "jumprelu"].groupby(
    ["system", "setting"]
):
    for name, ours in quality[quality.system == "jumprelu"].groupby("setting"):
        for seed in sorted(set(ours.seed) & set(theirs.seed)):
            mine, peer = ours[ours.seed == seed], theirs[theirs.seed == seed]
            ratio = frontier.matched_ratio(mine, peer)
            matched.append(
                {
                    "ours": name,
                    "system": system,
                    "setting": setting,
                    "seed": seed,
                    "fvu_ratio": ratio,
                }
            )
matched = pd.DataFrame(matched).dropna()
print(
    matched.groupby(["ours", "system", "setting"])
    .fvu_ratio.agg(["count", "mean", "min", "max"])
    .round(3)
    .to_string()
)

# %% [markdown]
# ## Facts
#
# Ratios of medians from one benchmark; verdicts on FVU from t-intervals over seeds.


# %%
def rate(
    system: str,
    architecture: str = "jumprelu",
    dtype: str = "float32",
    task: str = "train",
    size: int = 0,
) -> float:
    rows = speed[
        (speed.system == system)
        & (speed.architecture == architecture)
        & (speed.dtype == dtype)
        & (speed.task == task)
    ]
    return float(rows.tokens_per_s.iloc[size])


def times(peer: str, size: int) -> str:
    theirs = rate(peer, size=size)
    return " / ".join(
        f"{rate('jumprelu', dtype=dtype, size=size) / theirs:.1f}"
        for dtype in ("float32", "bfloat16")
    )


def of_floor(size: int) -> str:
    shares = (
        rate("jumprelu", dtype=dtype, size=size) / rate("floor", "one product", dtype, size=size)
        for dtype in ("float32", "bfloat16")
    )
    return " / ".join(f"{share:.0%}" for share in shares)


def beside(task: str, dtype: str) -> str:
    others = {"relu": dtype, "gated": dtype, "topk": "float32", "batchtopk": dtype}
    ours = rate("jumprelu", "jumprelu", dtype, task)
    return ", ".join(
        f"{name} {ours / rate('jumprelu', name, kind, task):.2f}" for name, kind in others.items()
    )


def against(peer: str) -> tuple[str, str, bool, bool]:
    mine = matched[(matched.system == peer) & (matched.ours == "ε falls")]
    setting, rows = max(
        mine.groupby("setting"), key=lambda group: group[1].fvu_ratio.mean()
    )  # what serves the peer best
    ratio = mean_interval(rows.fvu_ratio)
    return (
        setting,
        f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        bool(ratio.high < 1),
        bool(ratio.low > 1),
    )


spread = searched.groupby("search").fvu.agg(lambda fvu: fvu.max() - fvu.min()).max()
by_search = searched.pivot(index="seed", columns="search", values="fvu")
size_names = [
    f"d_in {row.d_in}, d_sae {row.d_sae}"
    for row in speed.drop_duplicates(["d_in", "d_sae"]).itertuples()
]

# %% [markdown]
# For the ledger the spread of a ratio is that from quartile to quartile of its two rates, which
# says how far a repetition on this machine may be off, and nothing about other machines.

# %% tags=["nbval-ignore-output"]


def quartiles(other: str, task: str = "train", dtype: str = "float32") -> Interval:
    """JumpReLU's rate over another architecture's: medians, and the ratios of opposite
    quartiles."""
    rows = (
        speed[(speed.system == "jumprelu") & (speed.task == task) & (speed.dtype == dtype)]
        .groupby("architecture")
        .first()
    )
    mine, theirs = rows.loc["jumprelu"], rows.loc[other]
    return Interval(
        mine.tokens_per_s / theirs.tokens_per_s,
        mine.tokens_per_s_q1 / theirs.tokens_per_s_q3,
        mine.tokens_per_s_q3 / theirs.tokens_per_s_q1,
    )


ledger(
    "10",
    [
        claim(
            "E1",
            "JumpReLU",
            "As cheap to train as a ReLU SAE (at least 0.8 of its rate).",
            "tokens/s, JumpReLU / ReLU, with quartiles",
            quartiles("relu"),
            (0.8, float("inf")),
            "10_speed",
        ),
        claim(
            "E2",
            "JumpReLU",
            "Cheaper to train than TopK: no partial sort.",
            "tokens/s, JumpReLU / exact TopK, with quartiles",
            quartiles("topk"),
            (1, float("inf")),
            "10_speed",
        ),
    ],
)[["id", "claim", "value", "low", "high", "verdict"]]

# %% tags=["facts"]
facts = {
    "FLOPs, dense step over sparse step, at the first size": round(total.dense / total.on_s, 1),
    "gradients differ from the dense ones by less than 1e-5": max(differences.values()) < 1e-5,
    "FVU, search in float32 / bfloat16": " / ".join(
        f"{by_search[dtype].mean():.2f}" for dtype in ("float32", "bfloat16")
    ),
    "the search's type moves FVU less than the seed does": bool(
        (by_search.float32 - by_search.bfloat16).abs().max() < spread
    ),
}
for size, name in enumerate(size_names):
    for peer in ("SAELens", "dictionary_learning"):
        facts[f"JumpReLU steps, times {peer}, float32 / bf16 search, {name}"] = times(peer, size)
    facts[f"share of the encoder matmul's rate in float32 / of that in bf16, {name}"] = of_floor(
        size
    )
inferred = speed[
    (speed.task == "inference") & (speed.system == "jumprelu") & (speed.architecture == "jumprelu")
].dtype.iloc[0]
waits = by_neighbour.set_index(["machine", "neighbour", "waiting"]).ms
for machine_name in by_neighbour.machine.unique():
    quiet, beside_one = (waits[machine_name, name] for name in by_neighbour.neighbour.unique())
    facts |= {
        f"a step beside a busy process, long over brief spinning, {machine_name}": round(
            beside_one["spin"] / beside_one["spin briefly"], 1
        ),
        f"the same with nothing else running, {machine_name}": round(
            quiet["spin"] / quiet["spin briefly"], 2
        ),
    }
facts |= {
    "training: JumpReLU's rate over that of our other architectures, float32": beside(
        "train", "float32"
    ),
    "inference: the same, search in the faster type": beside("inference", inferred),
    "JumpReLU's step is no slower than ReLU's": rate("jumprelu") >= rate("jumprelu", "relu"),
    "JumpReLU's step is faster than exact TopK's": rate("jumprelu") > rate("jumprelu", "topk"),
}
for peer in ("SAELens", "dictionary_learning"):
    setting, ratio, better, worse = against(peer)
    facts |= {
        f"FVU over that of {peer} ({setting}), equal L0 and tokens": ratio,
        f"better than {peer}": better,
        f"worse than {peer}": worse,
    }
show_facts("10", facts)
