"""What this package does on a GPU at the paper's scale: `python -m jumprelu.gpu_evidence`, in four parts.

    kernels   each Triton kernel against float64                    harvest   activations of a Gemma 2 9B with random weights
    step      a JumpReLU training step beside a dense one           run       harvest, training and evaluation as in notebook 02

Notable here:
- the floor of a step is the encoder's matmul in bfloat16 and Adam's 24 bytes a weight, at rates measured on this device. Nothing
  that looks at every latent and trains every weight in float32 can be faster.
- ways to take a step run in turns on one state; a number is the median over turns. Parts are timed with a wait before and after
  each, so they add up to more than the step. On a CPU, memory is what the process has.
- the model's weights are made on the device: nothing is downloaded. Speed and memory are the real one's; FVU says nothing.
- a part is written when it is done, with the device's name, and not measured again for this device and these sizes.

FULL needs, by arithmetic: a GPU of 80 GB (weights, gradients and moments 11 GB; a dense step some ten float32 arrays of [4096,
131072], 2 GB each; later the model, 18.5 GB), 64 GB of host memory, 4 GB for temporary files, and ten minutes of an H200.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

from . import kernels, sparse
from .activations import Batches
from .figures import measured_folder
from .files import read_json, write_json, write_text
from .harvest import harvest
from .hooks import capture
from .lm import LM
from .metrics import evaluate
from .optim import Adam
from .recipe import TrainConfig
from .train import Inputs, _advance, _State, train

GEMMA_2_9B = {"vocab_size": 256_000, "hidden_size": 3584, "intermediate_size": 14_336, "num_hidden_layers": 42,
              "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096,
              "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}  # fmt: skip
SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}  # fmt: skip


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


FULL, TINY = Size(), Size(256, (256, 128), 64, 6, 2, (1, 2, 3), 32, 16, 4, 2, 5, GEMMA_2_9B | SMALL)
Result = tuple[pd.DataFrame, dict[str, Any]]
"""Of a part: its table, and what else is known."""


# ---- measuring ------------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def peak_gb(device: torch.device) -> float:
    """Most device memory in use since the last call, 10⁹ bytes; on a CPU, what the process has now."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss / 1e9
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 1e9


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Of each call, (median milliseconds, largest :func:`peak_gb`) over its turns but the first."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            peak_gb(device)
            began = now(device)
            call()
            found[name].append((1e3 * (now(device) - began), peak_gb(device)))
    return {name: (statistics.median(ms for ms, _ in some[1:]), max(gb for _, gb in some[1:])) for name, some in found.items()}


@contextmanager
def stopwatch(device: torch.device, functions: Iterable[tuple[str, Any, str]]) -> Iterator[Counter[str]]:
    """Within it, seconds in functions, (part, owner, name) each, summed by part; a call within another counts for its part alone."""
    found: Counter[str] = Counter()
    inner: list[float] = []  # of each call under way, the seconds in calls within it

    def timed(part: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        began = now(device)
        inner.append(0.0)
        result = function(*args, **kwargs)
        seconds = now(device) - began
        found[part] += seconds - inner.pop()
        if inner:
            inner[-1] += seconds
        return result

    with ExitStack() as stack:
        for part, owner, name in functions:
            stack.enter_context(patch.object(owner, name, functools.partialmethod(timed) and None))
        yield found
