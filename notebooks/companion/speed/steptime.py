"""Where the time of a training step goes: by arithmetic, by function, and by the density of the
batch.

The numbers of `make benchmark` that concern this package alone; notebook 10 draws them.
"""

from __future__ import annotations

import cProfile
import dataclasses
import pstats
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from jumprelu import sparse
from jumprelu.activations import Activations
from jumprelu.recipe import TrainConfig
from jumprelu.sparse import POLICY, SparsePolicy
from jumprelu.state import TrainState, train_step
from jumprelu.support import DENSE


def arithmetic(d_in: int, d_sae: int, l0: float, entries: float) -> pd.DataFrame:
    """Multiplications and additions a token, by part of a JumpReLU step: columns part, dense, on_s.

    l0: active latents a token; entries: those that are active or within the window. Dense: each of
    the five products touches all d_sae latents. On S: only the encoder does; values and θ need a
    product of W_dec with the error at every entry, the reconstruction and the gradients of both
    matrices at the active ones.
    """
    unit = 2 * d_in
    rows = [
        ("encode", d_sae, d_sae),
        ("decode", d_sae, l0),
        ("gradient of the activations", d_sae, entries),
        ("gradient of W_dec", d_sae, l0),
        ("gradient of W_enc", d_sae, l0),
    ]
    return pd.DataFrame(
        [{"part": part, "dense": unit * dense, "on_s": unit * few} for part, dense, few in rows]
    )


FUNCTIONS_OF = {
    "search": (
        "sparse.screen",
        "sparse._with_slack",
        "sparse._positions",
        "sparse._bf16",
        "sparse._chunks",
    ),
    "work on S": (
        "support.dots",
        "support.token_sums",
        "support.latent_sums",
        "support._bag",
        "support.transposed",
        "support.by_token",
        "support.take",
        "support.nonzero",
        "support.at",
        "support.per_token",
        "support.per_latent",
        "support.latent",
    ),
    "Adam": ("optim._update", "optim.step", "optim.<genexpr>"),
}
"""Functions of a step by what they are for; the encoder's matmul is a call of the search."""


def part_of(function: str, call: str) -> str:
    if (function, call) == ("sparse.screen", "mm"):
        return "encoder matmul"
    return next(
        (part for part, functions in FUNCTIONS_OF.items() if function in functions), "all else"
    )


def profile_step(state: TrainState, batches: Sequence[torch.Tensor]) -> pd.DataFrame:
    """Milliseconds a step by function of this package and what it calls outside of it: columns
    part, function, call, ms, share.

    batches: normalised, [batch, d_in] each. Measured by cProfile, whose own cost falls on functions
    that make many calls.
    """
    for x in batches:
        train_step(state, x)
    profiler = cProfile.Profile()
    profiler.enable()
    for x in batches:
        train_step(state, x)
    profiler.disable()
    package = str(Path(sparse.__file__).parent)
    seconds: dict[tuple[str, str], float] = {("autograd", ""): 0.0}
    for (file, _, name), (_, _, own, _, callers) in pstats.Stats(profiler).stats.items():
        inside = file.startswith(package)
        if inside:
            key = f"{Path(file).stem}.{name}", ""
            seconds[key] = seconds.get(key, 0.0) + own
        for (from_file, _, from_name), (_, _, _, all_within) in callers.items():
            # Called back by the backward pass, a module or a decorator.
            if inside and not from_file.startswith(package):
                seconds["autograd", ""] -= all_within
            elif from_file.startswith(package) and not inside:
                called = re.sub(r"<(?:built-in )?method '?([\w.]+).*", r"\1", name).rpartition(".")[
                    2
                ]
                passed_on = called in {
                    "backward",
                    "apply",
                    "decorate_context",
                    "_wrapped_call_impl",
                }
                key = (
                    ("autograd", "")
                    if passed_on
                    else (f"{Path(from_file).stem}.{from_name}", called)
                )
                seconds[key] = seconds.get(key, 0.0) + all_within
    total = sum(seconds.values())
    rows = [
        {
            "part": part_of(function, call),
            "function": function,
            "call": call,
            "ms": 1e3 * each / len(batches),
            "share": each / total,
        }
        for (function, call), each in seconds.items()
    ]
    return pd.DataFrame(rows).sort_values("ms", ascending=False, ignore_index=True)


def density_table(
    acts: Activations, d_sae: int, batch: int, thresholds: Sequence[float], repeats: int = 7
) -> pd.DataFrame:
    """Milliseconds of a JumpReLU step by the share of entries in S: columns d_sae, batch, density,
    way, ms.

    way: "dense", "sparse" and "sparse, bfloat16 search", whatever the density; "as chosen" by the
    batch, with the search that a dense batch has in vain. The density is set by θ.
    """
    rows = []
    x = acts.rows(batch)
    for threshold in thresholds:
        config = TrainConfig(
            d_sae=d_sae,
            steps=10_000,
            batch_size=batch,
            threshold_init=threshold,
            bandwidth=0.02,
            lr=1e-9,
        )
        always = SparsePolicy(dense_above=1.0, bf16_below=1.0)
        ways = {
            "dense": (None, SparsePolicy(dense_above=0.0)),
            "sparse": ("float32", always),
            "sparse, bfloat16 search": ("bfloat16", always),
            "as chosen": (None, POLICY),
        }
        states = {
            way: TrainState(
                acts,
                dataclasses.replace(config, encoder_dtype=dtype),
                torch.device("cpu"),
                policy=policy,
            )
            for way, (dtype, policy) in ways.items()
        }
        measured: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats + 1):  # in turns; the first is not counted
            for way, state in states.items():
                began = time.perf_counter()
                train_step(state, x / state.input_scale)
                measured[way].append(time.perf_counter() - began)
        state = states["sparse"]
        layout = state.trainee.layout(x / state.input_scale, config.bandwidth, always)
        density = 1.0 if layout is DENSE else len(layout) / len(x) / d_sae
        rows += [
            {
                "d_sae": d_sae,
                "batch": batch,
                "density": density,
                "way": way,
                "ms": 1e3 * statistics.median(times[1:]),
            }
            for way, times in measured.items()
        ]
    return pd.DataFrame(rows)
