"""Time and memory of a device, and the least time that a step can take on it."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import psutil
import torch

from .gpu_sizes import Size


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def peak_gb(device: torch.device) -> float:
    """Most device memory in use since the last call, 10⁹ bytes; on a CPU, what the process has
    now."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss / 1e9
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 1e9


def in_turns(
    calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Of each call, (median milliseconds, largest :func:`peak_gb`) over its turns but the first."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            peak_gb(device)
            began = now(device)
            call()
            found[name].append((1e3 * (now(device) - began), peak_gb(device)))
    return {
        name: (statistics.median(ms for ms, _ in some[1:]), max(gb for _, gb in some[1:]))
        for name, some in found.items()
    }


@contextmanager
def stopwatch(
    device: torch.device, functions: Iterable[tuple[str, Any, str]]
) -> Iterator[Counter[str]]:
    """Within it, seconds in functions, (part, owner, name) each, by part; a call within another
    counts for its own part alone."""
    found: Counter[str] = Counter()
    inner: list[float] = []  # of each call under way, the seconds in calls within it

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:  # a function, so that it works as a method too
            began = now(device)
            inner.append(0.0)
            result = function(*args, **kwargs)
            seconds = now(device) - began
            found[part] += seconds - inner.pop()
            if inner:
                inner[-1] += seconds
            return result

        return call

    with ExitStack() as stack:
        for part, owner, name in functions:
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield found


def measure_rates(d_in: int, d_sae: int, size: Size, device: torch.device) -> dict[str, float]:
    """What the device reaches: FLOP/s of a bfloat16 matmul of the encoder's size; bytes/s of a
    copy, read and written."""
    with torch.device(device):
        atoms, x = (torch.randn(rows, d_in, dtype=torch.bfloat16) for rows in (d_sae, size.batch))
        out, weights = (
            torch.empty(d_sae, size.batch, dtype=torch.bfloat16),
            torch.randn(2, d_sae, d_in),
        )
    calls = {
        "matmul": lambda: torch.mm(atoms, x.T, out=out),
        "copy": lambda: weights[0].copy_(weights[1]),
    }
    ms = {name: ms for name, (ms, _) in in_turns(calls, 3 * size.repeats, device).items()}
    return {
        "matmul_flops_s": 2e3 * d_in * d_sae * size.batch / ms["matmul"],
        "copy_bytes_s": 8e3 * d_in * d_sae / ms["copy"],
    }


def floor_ms(
    d_in: int, d_sae: int, batch: int, matmul_flops_s: float, copy_bytes_s: float
) -> float:
    """The encoder's matmul, then of each weight 4 bytes of gradient written and 20 that Adam with
    β₁ = 0 reads and writes."""
    return 1e3 * (
        2 * d_in * d_sae * batch / matmul_flops_s
        + 24 * (2 * d_in * d_sae + 2 * d_sae + d_in) / copy_bytes_s
    )
