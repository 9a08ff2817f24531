"""What a large SAE costs to train, on paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def plan(
    gpus: Sequence[int] = (1, 8, 64),
    d_in: int = 3584,
    d_sae: int = 131072,
    batch: int = 4096,
    tokens: float = 8e9,
    l0: float = 60,
    window: float = 60,
    matmul_rate: float = 790e12,
    memory_rate: float = 4.3e12,
    node: int = 8,
    link_rate: float = 450e9,
    network_rate: float = 50e9,
    lm_parameters: float = 9.2e9,
    lm_share: float = 0.5,
    lm_efficiency: float = 0.5,
    reported_ms: float = 45,
    reported_chips: int = 8,
) -> pd.DataFrame:
    """What a JumpReLU SAE of this size costs, on paper. Columns quantity, gpus, value, unit, kind,
    from.

    Assumed of each GPU: `matmul_rate`, bf16 FLOP/s that a large matmul reaches; `memory_rate`,
    bytes/s of its memory; `link_rate` and `network_rate`, bytes/s to others of its node of `node`
    GPUs and beyond. P = 2·d_in·d_sae + 2·d_sae + d_in parameters, float32 with a bf16 copy; N GPUs
    hold a share of the latents each and see every token. S = l0 + window entries a token are active
    or within the bandwidth of θ. Per step:

        encode       2·d_in·d_sae·batch / (N·matmul_rate)
        weights      26·P / (N·memory_rate)
        entries      4·S·d_in·batch / (N·memory_rate)
        exchange     8·(N − 1)/N·d_in·batch / rate

    encode: every pre-activation, in bf16. weights, bytes: write the gradient (4); Adam with β₁ = 0
    reads gradient, weight and second moment and writes the two (20); bf16 copy (2). entries: rows
    of W_dec in bf16, read for x̂ and for gradients of f. exchange: all-reduce of x̂ in float32. The
    parts are added, none hidden behind another. Memory: 14·P + 2·batch·d_sae bytes over N. Disk:
    bf16 activations. Harvest: 2·lm_parameters·lm_share FLOPs a token, at lm_efficiency of
    matmul_rate.
    """
    P, S = 2 * d_in * d_sae + 2 * d_sae + d_in, l0 + window
    given = {
        "matmul, bf16": (matmul_rate / 1e12, "TFLOP/s"),
        "memory": (memory_rate / 1e12, "TB/s"),
        "link within a node": (link_rate / 1e9, "GB/s"),
        "network a GPU": (network_rate / 1e9, "GB/s"),
        "L0": (l0, "a token"),
        "entries in the window": (window, "a token"),
        "share of the LM that runs": (lm_share, ""),
        "share of the matmul rate that it reaches": (lm_efficiency, ""),
    }
    rows = [(name, np.nan, value, unit, "assumed", "") for name, (value, unit) in given.items()]
    rows.append(("parameters", np.nan, P / 1e9, "10⁹", "derived", "2·d·F + 2·F + d"))
    rows.append(("activations on disk", np.nan, 2 * d_in * tokens / 1e12, "TB", "derived", "bf16"))
    for n in gpus:
        rate = link_rate if n <= node else network_rate
        parts = {
            "encode": 2 * d_in * d_sae * batch / (n * matmul_rate),
            "weights": 26 * P / (n * memory_rate),
            "entries": 4 * S * d_in * batch / (n * memory_rate),
            "exchange": 8 * (n - 1) / n * d_in * batch / rate,
        }
        step = sum(parts.values())
        each = {f"step: {name}": (1e3 * seconds, "ms") for name, seconds in parts.items()}
        each |= {
            "step": (1e3 * step, "ms"),
            "rate": (batch / step / 1e3, "10³ tokens/s"),
            "time for all tokens": (tokens / batch * step / 3600, "h"),
            "reading": (2 * d_in * batch / step / 1e9, "GB/s"),
            "memory of a GPU": ((14 * P + 2 * batch * d_sae) / n / 1e9, "GB"),
            "harvest of all tokens": (
                2 * lm_parameters * lm_share * tokens / (n * lm_efficiency * matmul_rate) / 3600,
                "h",
            ),
        }
        rows += [(name, n, value, unit, "derived", "") for name, (value, unit) in each.items()]
    hours = tokens / batch * reported_ms / 3.6e6
    rows += [
        ("step", reported_chips, reported_ms, "ms", "reported", "Gemma Scope, TPU v5p"),
        (
            "rate",
            reported_chips,
            batch / reported_ms,
            "10³ tokens/s",
            "derived",
            "from the reported step",
        ),
        ("time for all tokens", reported_chips, hours, "h", "derived", "from the reported step"),
    ]
    return pd.DataFrame(rows, columns=["quantity", "gpus", "value", "unit", "kind", "from"])
