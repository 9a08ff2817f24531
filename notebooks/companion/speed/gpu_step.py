"""A JumpReLU training step beside a dense one, and where its time goes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch

from jumprelu import kernels, sparse, support
from jumprelu.optim import Adam
from jumprelu.recipe import TrainConfig
from jumprelu.sparse import POLICY, SparsePolicy
from jumprelu.state import Inputs, TrainState, train_step

from .gpu_clock import floor_ms, in_turns, measure_rates, stopwatch
from .gpu_sizes import Result, Size


@contextmanager
def matmuls(precision: str) -> Iterator[None]:
    """Within it, the precision of float32 matmuls: "highest"; "high" lets a GPU round to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


DENSE_STEPS = SparsePolicy(dense_above=0.0, triton=False)
WAYS = {
    "ours": (POLICY, "highest"),
    "dense": (DENSE_STEPS, "highest"),
    "dense, TF32": (DENSE_STEPS, "high"),
}
"""Ways to take a step: the policy, and the precision of float32 matmuls."""

PARTS_OF_A_STEP = [
    ("search: matmul", torch, "mm"),
    ("search: compaction", kernels, "compact"),
    ("search: compaction", sparse, "_positions"),
    ("search: all else", sparse, "screen"),
    ("Adam", Adam, "step"),
    ("sums", sparse, "dots"),
    *(("sums", support, name) for name in ("dots", "token_sums", "latent_sums", "transposed")),
    ("sums", kernels, "totals"),
    ("all else", sys.modules[__name__], "train_step"),
]
"""For :func:`stopwatch`. "search: all else" is the bfloat16 copy of W_enc with its norms, most of
all."""


@torch.no_grad()
def planted(trainee: torch.nn.Module, n: int, l0: int) -> torch.Tensor:
    """[n, d_in], E‖x‖² = 1: sums of `l0` random atoms, weights ½ to 1½. Sets every θ so that `l0`
    latents a token are active."""
    atoms = trainee.W_dec
    generator = torch.Generator(atoms.device).manual_seed(0)
    index = torch.randint(len(atoms), (n, l0), generator=generator, device=atoms.device)
    weight = 0.5 + torch.rand(n, l0, generator=generator, device=atoms.device)
    x = torch.nn.functional.embedding_bag(index, atoms, mode="sum", per_sample_weights=weight)
    x /= x.square().sum(-1).mean().sqrt()
    some = x[:256]
    trainee.threshold_parameter.fill_(
        (some @ trainee.W_enc).flatten().topk(l0 * len(some)).values[-1].log()
    )
    return x


@torch.no_grad()
def entries_of(
    trainee: torch.nn.Module, x: torch.Tensor, bandwidth: float, policy: SparsePolicy = POLICY
) -> list[float]:
    """A token's mean number of latents that are active, that are in S, and that the search finds
    (in bfloat16, more than S)."""
    with patch.object(sparse, "dots", wraps=sparse.dots) as dots:
        layout = trainee.layout(x, bandwidth, policy)
    out = trainee(x, bandwidth, layout)
    found = len(dots.call_args_list[0].args[0]) if dots.called else out.acts.numel()
    return [number / len(x) for number in (int((out.acts > 0).sum()), out.acts.numel(), found)]


class Steps:
    """Training steps on some batches, again and again; a call takes one in a way of :data:`WAYS`.
    triton: as in :class:`jumprelu.sparse.SparsePolicy`, of "ours"."""

    def __init__(
        self, state: TrainState, batches: Sequence[torch.Tensor], triton: bool | None = None
    ):
        self.state, self.batches, self.triton = state, itertools.cycle(batches), triton

    def __call__(self, way: str = "ours") -> None:
        self.state.policy, precision = WAYS[way]
        if way == "ours":
            self.state.policy = dataclasses.replace(POLICY, triton=self.triton)
        with matmuls(precision):
            train_step(self.state, next(self.batches))


def measure_step(
    size: Size, device: torch.device, lm: Any = None, triton: bool | None = None
) -> Result:
    """Columns d_in, d_sae, batch, l0, entries, candidates (:func:`entries_of`), way, ms, tokens_s,
    peak_gb, ratio_to_floor.

    way: of WAYS, "floor", or "ours: " and a part, whose rate is what the step would reach if that
    were all.
    """
    rows, facts, (d_in, batch) = [], {}, (size.lm["hidden_size"], size.batch)
    for d_sae in size.widths:
        rates = facts[f"rates at {d_sae}"] = measure_rates(d_in, d_sae, size, device)
        # So small an lr leaves the state as it is.
        config = TrainConfig(d_sae=d_sae, steps=10_000, batch_size=batch, bandwidth=0.02, lr=1e-9)
        state = TrainState(
            SimpleNamespace(d_in=d_in),
            config,
            device,
            Inputs(1.0, torch.zeros(d_in, device=device)),
        )
        x = planted(state.trainee, 4 * batch, size.l0)
        step = Steps(state, x.split(batch), triton)

        known = entries_of(state.trainee, x[:batch], config.bandwidth)
        measured = in_turns(
            {name: functools.partial(step, name) for name in WAYS}, size.repeats, device
        )
        with stopwatch(device, PARTS_OF_A_STEP) as seconds:
            for _ in range(size.repeats):
                step()
        measured |= {
            f"ours: {part}": (1e3 * each / size.repeats, float("nan"))
            for part, each in seconds.items()
        }
        measured["floor"] = floor_ms(d_in, d_sae, batch, **rates), float("nan")
        for way, (ms, peak) in measured.items():
            rows.append(
                (
                    d_in,
                    d_sae,
                    batch,
                    *known,
                    way,
                    ms,
                    1e3 * batch / ms,
                    peak,
                    ms / measured["floor"][0],
                )
            )
    columns = [
        "d_in",
        "d_sae",
        "batch",
        "l0",
        "entries",
        "candidates",
        "way",
        "ms",
        "tokens_s",
        "peak_gb",
        "ratio_to_floor",
    ]
    return pd.DataFrame(rows, columns=columns), facts
