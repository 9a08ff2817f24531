"""Sizes of what `gpu_evidence.py` measures: the paper's, and one that runs anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

GEMMA_2_9B = {
    "vocab_size": 256_000,
    "hidden_size": 3584,
    "intermediate_size": 14_336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
}

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
}


@dataclass(frozen=True)
class Size:
    """What is measured."""

    d_sae: int = 16_384  # of kernels and the run
    widths: tuple[int, ...] = (131_072, 16_384)  # d_sae of the steps
    batch: int = 4096
    l0: int = 60
    repeats: int = 7  # timings that a median is taken of
    layers: tuple[int, ...] = (9, 20, 31)  # whose resid_post is harvested; the run takes the second
    context: int = 1024
    rows: int = 128  # of tokens
    batch_rows: int = 16  # in a forward pass; a shard has twice as many
    test_rows: int = 8
    steps: int = 200
    lm: dict[str, Any] = field(default_factory=GEMMA_2_9B.copy)


FULL = Size()

TINY = Size(
    d_sae=256,
    widths=(256, 128),
    batch=64,
    l0=6,
    repeats=2,
    layers=(1, 2, 3),
    context=32,
    rows=16,
    batch_rows=4,
    test_rows=2,
    steps=5,
    lm=GEMMA_2_9B | SMALL,
)


Result = tuple[pd.DataFrame, dict[str, Any]]
"""Of a part: its table, and what else is known."""
