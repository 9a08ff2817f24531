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
# The paper's main result is a set of curves: at equal L0, JumpReLU SAEs lose no more of the language model's loss than TopK SAEs
# and less than Gated ones, at three sites and three layers of Gemma 2 9B (its figures for the residual stream, the MLP and the
# attention output). Each point there is one run. Here every architecture is trained on the same batches, tuned with the same
# effort, over several seeds, and two curves are compared with a number and its interval. Then: does the order depend on site,
# layer, width and number of tokens?

# %%
import dataclasses

import pandas as pd
import torch

import jumprelu as jr
from jumprelu import frontier, plots, scaling, study
from jumprelu.claims import claim, ledger

# %% tags=["parameters"]
model: str = ""  # empty: the embedded model; otherwise a hub id or a folder
dataset: str = "installed"  # text for training and evaluation
site: str = "resid_post"  # resid_post, mlp_out or attn_out
layer: int = 3
places: list = [["resid_post", 1], ["resid_post", 5], ["mlp_out", 3], ["attn_out", 3]]  # further sites and layers
context_size: int = 256
train_rows: int = 1050  # rows of context_size tokens that are harvested for training
test_rows: int = 24  # rows for evaluation, of documents that no training saw
rows_per_document: int = 8  # of a document for training; for evaluation 1
storage: str = "float32"  # type of the activations on disk: float32, bfloat16 or float16
d_sae: int = 1024
steps: int = 400
batch_size: int = 256
dead_after: int = 50000  # tokens of silence after which a latent counts as dead
seeds: int = 3
variants: dict = {  # name: what differs from the defaults of TrainConfig; lists: one value for each point of the curve
    "JumpReLU": {"bandwidth_end": 0.02, "threshold_init": [0.12, 0.07, 0.045, 0.03], "sparsity": [0.003, 0.001, 0.001, 0.001]},
    "JumpReLU, fixed ε": {"threshold_init": [0.12, 0.07, 0.045, 0.03], "sparsity": [0.003, 0.001, 0.001, 0.001]},
    "TopK": {"architecture": "topk", "k": [12, 22, 40, 70]},
    "TopK, approximate": {"architecture": "topk", "k": [12, 22, 40, 70], "topk_buckets": 256},
    "BatchTopK": {"architecture": "batchtopk", "k": [12, 22, 40, 70]},
    "Gated": {"architecture": "gated", "sparsity": [0.15, 0.25, 0.4, 0.6], "sparsity_warmup": 0.1},
    "Gated, original": {"architecture": "gated", "unit_norm": True, "resample": [0.25, 0.5], "sparsity_warmup": 0.1,
                        "sparsity": [0.05, 0.09, 0.15, 0.25]},
    "ReLU": {"architecture": "relu", "sparsity": [0.03, 0.06, 0.1, 0.17], "sparsity_warmup": 0.1},
}  # fmt: skip
lrs: list = [0.003, 0.006, 0.012]  # each variant is tried at all, and compared at its best
place_variants: list = ["JumpReLU", "TopK", "BatchTopK", "Gated", "ReLU"]  # at the further sites and layers
place_d_sae: int = 512
place_steps: int = 300
place_seeds: int = 1
widths: list = [256, 512, 1024, 2048]  # for the scaling of FVU with d_sae, at `steps` steps
lengths: list = [50, 100, 200, 400]  # for its scaling with the number of steps, at `d_sae`
scaling_k: int = 32  # L0 of the scaling runs
scaling_seeds: int = 2
workers: int = 0  # processes that train, each with one thread; 0: one a core
threads: int = 2
