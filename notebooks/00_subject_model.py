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
# # The subject: a small Gemma 2 trained on your own Python installation
#
# Every sparse autoencoder of this companion reads the activations of one language model, and a
# claim about an autoencoder is worth no more than the model below it. Gemma Scope's subject is
# Gemma 2. Here it is a model of the same architecture, small enough to come with the repository,
# trained from scratch on text that every installation has: the sources and documents of the
# standard library and of the packages that this project installs.
#
# Is it a language model worth dissecting? Asked here: is the architecture what the configuration
# says, what was it trained on, how well does it predict text it has not seen (next to compressors
# and n-grams on the same bytes), what does it write, does it copy from its context, and do the
# three sites where autoencoders will read carry what they should?

# %%
import pandas as pd
import torch
from companion.rails.cache import remember
from companion.rails.figures import save_figure, show_facts
from companion.subject import behaviour, compression, configuration, plots, sites, texts

import jumprelu as jr

# %% tags=["parameters"]
model: str = ""  # empty: the embedded model; otherwise a hub id or a folder
dataset: str = "installed"  # text of the comparison; the embedded model was trained on "installed"
context_size: int = 256
test_rows: int = 1000  # rows of context_size tokens of the test split that are scored
train_rows: int = 12000  # rows of the training split for the n-grams and to prime xz
prime_bytes: int = 2_000_000  # training text that the primed xz reads first
groups: int = 12  # groups of documents for the jackknife intervals
order: int = 5  # of the n-grams
sample_tokens: int = 60
induction_rows: int = 64
induction_length: int = 100  # tokens of the random sequence that is repeated
site_rows: int = 96
goal: float = 1.1  # bits per byte that the project set out to reach on "installed"
seed: int = 0
threads: int = 2

# %%
torch.set_num_threads(threads)
pd.set_option("display.width", 140, "display.max_columns", 12)
lm = jr.load_lm(model or None)
lm

# %% [markdown]
# ## The model
#
# Gemma 2 (Gemma Team 2024, arXiv 2408.00118) has grouped-query attention, layers that alternate
# between a sliding window and the whole context, soft-capped attention scores and logits, RMS norms
# before and after each block's two halves, GeGLU, and one matrix for embedding and unembedding.

# %%
configuration.config_table(lm)

# %%
parameters = configuration.parameter_table(lm)
print(
    f"{parameters.parameters.sum():,} parameters, {configuration.weights_megabytes(lm):.1f} MB of "
    "weights"
)
parameters.round(3)

# %% [markdown]
# A configuration is a claim. The next table measures the loaded object: a token early in a row is
# changed, and the positions that feel it are counted, so a sliding layer has to stop at its window;
# the logits are compared with the capped product of the last hidden state and the unembedding;
# heads, norms and tying are read from the weights.

# %%
checks = configuration.configuration_checks(lm, context_size)
checks

# %% [markdown]
# ## The text
#
# Documents are deduplicated by content and then divided *by document*, by a hash of the path, so no
# test document has a copy in the training split. Relatives remain (files of one package share
# headers and habits), as for any corpus of code. The fingerprint tells whether the text on this
# machine is the text of the published numbers.

# %% tags=["nbval-ignore-output"]
corpus = texts.corpus_table(dataset)
print(texts.fingerprint_note(dataset))
texts.corpus_summary(corpus)

# %% [markdown]
# ## Training
#
# One pass over the training rows: none is seen twice, so the training loss is itself nearly held
# out. The schedule is a short rise, a plateau, and a linear fall to zero; the weights are those of
# the end.

# %%
log = configuration.training_log(lm)
save_figure("00", plots.lm_training, log)

# %% [markdown]
# ## Bits per byte
#
# A language model is a compressor: a text costs −log₂ p bits. The model reads rows of
# `context_size` tokens, each afresh from BOS, and is charged for every token after the first. All
# others get exactly the same bytes: documents of the test split from their beginning, the longest
# cut short, joined. xz, bz2 and zlib look back over everything before, not over one row only; a
# second xz reads training text first, and is charged for what the test text adds. The 5-grams
# (interpolated modified Kneser-Ney, of tokens and of bytes) learn from the training split and see
# the same rows as the model.
#
# What this comparison is not: the model's weights are not counted in its bits, and it was trained
# on more text than the n-grams or the primed xz are given here.

# %%
test, train = texts.splits(lm, dataset, context_size, test_rows, train_rows, seed=seed)
bits = remember(
    compression.bits_per_byte, lm, test, train, order=order, prime_bytes=prime_bytes, groups=groups
)
save_figure("00", plots.bits_per_byte, bits)

# %% [markdown]
# Intervals are of the sample of documents. They are wide, because documents differ, but all methods
# have the same documents: the paired difference of each method to the model is known better than
# either. The last column is the lower end of its interval; above 0 the model is better than that
# method beyond the sampling of documents.

# %%
ours = bits[bits.kind == "language model"].iloc[0]
others = bits[bits.kind != "language model"]
others[["method", "bits_per_byte", "difference", "difference_low"]].round(2)

# %% [markdown]
# ## Samples
#
# Sampled at temperature 0.7. They need not be right; they should look like the corpus.

# %% tags=["nbval-ignore-output"]
for text in behaviour.samples(lm, new_tokens=sample_tokens, seed=seed):
    print(text, end="\n" + "-" * 80 + "\n")

# %% [markdown]
# ## Does it copy?
#
# Random tokens cannot be predicted, except where a sequence comes a second time: a model with
# induction heads (Olsson et al. 2022, arXiv 2209.11895) finds the last occurrence of the present
# token and expects what followed it. The loss is measured on rows `BOS r r`. On the first `r` it
# may be worse than the uniform distribution's log of the vocabulary, because the model expects
# text; the second tells whether attention carries content over a distance.

# %%
losses = remember(behaviour.repeated_losses, lm, induction_rows, induction_length, seed)
first, second, fall = behaviour.induction_fall(losses)
curve = behaviour.induction(losses)
save_figure("00", plots.induction, curve)

# %% [markdown]
# ## The three sites
#
# Autoencoders will read the residual stream after a block (`resid_post`), what the MLP adds to it
# (`mlp_out`, in Gemma 2 after the norm that follows the MLP) and the attention heads before their
# output projection (`attn_out`). If the hooks sit in the right places, a block's change of the
# residual stream is what attention adds, computed here from `attn_out` with the model's own
# weights, plus `mlp_out`, and nothing but rounding is left over.

# %%
identity = sites.residual_identity(lm, test.ids[:4])
adds_up = bool((identity.error < 3 * identity.rounding).all())
print(
    f"left over of the change, largest of {len(identity)} blocks: {identity.error.max():.0e}; only "
    f"rounding: {adds_up}"
)

# %% [markdown]
# Three numbers of each site matter for training on it. E‖x‖² sets the unit of thresholds and
# bandwidths, which is why it is scaled to 1. The share of the mean is what a decoder bias explains
# alone; fractions of variance unexplained in this companion are therefore about the mean. And
# positions that hold BOS may be of another size altogether (attention sinks; Xiao et al. 2023,
# arXiv 2309.17453), which is why they are never trained on.

# %%
scale = remember(sites.site_statistics, lm, test[:site_rows])
save_figure("00", plots.sites, scale)

# %% [markdown]
# ## Facts
#
# Rounded below what differs between machines. The goal is a fact to read, true or false; the
# assertions are what the rest of the companion relies on.

# %% tags=["facts"]
resid = scale[scale.site == "resid_post"]
below_all = bool((others.difference_low > 0).all())
show_facts(
    "00",
    {
        "parameters": int(parameters.parameters.sum()),
        "every check of the configuration holds": bool(checks.holds.all()),
        "bits per byte": round(ours.bits_per_byte, 2),
        "bits per byte, half-width of the 95 % interval": round(ours.high - ours.bits_per_byte, 2),
        "best baseline": others.sort_values("bits_per_byte").method.iloc[0],
        "bits per byte of the best baseline": round(others.bits_per_byte.min(), 2),
        "clearly below every baseline (paired intervals above 0)": below_all,
        f"at or below {goal} bits per byte": bool(ours.bits_per_byte <= goal),
        "loss on random tokens, first time (nats)": round(first.mean, 1),
        "loss on random tokens, second time (nats)": round(second.mean, 1),
        "the loss falls on the second copy (interval above 0)": bool(fall.low > 0),
        "blocks add up from the three sites": adds_up,
        "E‖x‖² of resid_post, first and last layer": ", ".join(
            f"{resid.mean_square.iloc[end]:.2g}" for end in (0, -1)
        ),
        "largest share of the mean at resid_post": round(resid.mean_share.max(), 2),
        "norm at BOS over norm elsewhere, resid_post, largest": round(resid.first_ratio.max(), 1),
    },
)
assert checks.holds.all() and (others.difference > 0).all() and fall.low > 0 and adds_up
