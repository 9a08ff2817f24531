"""Harvest, training and evaluation on a Gemma 2 9B with random weights."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
import transformers

from jumprelu.activations import Batches
from jumprelu.harvest import harvest
from jumprelu.lm import LM
from jumprelu.metrics import evaluate
from jumprelu.recipe import TrainConfig
from jumprelu.sites import capture
from jumprelu.train import train

from .gpu_clock import measure_rates, now, peak_gb, stopwatch
from .gpu_sizes import Result, Size


def random_gemma(size: Size, device: torch.device) -> LM:
    """A Gemma 2 of this size in bfloat16, its random weights made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.Gemma2Config(**size.lm)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    return LM(model.requires_grad_(False), name="Gemma 2 with random weights")


def random_tokens(size: Size, rows: int, seed: int) -> torch.Tensor:
    """[rows, context]: BOS and then random ordinary ids."""
    ids = torch.randint(
        3,
        size.lm["vocab_size"],
        (rows, size.context),
        generator=torch.Generator().manual_seed(seed),
    )
    return ids.index_fill(1, torch.tensor([0]), 2)


def flops_a_token(lm: LM, layers: int, context: int) -> int:
    """Of the first `layers` blocks: 2 a weight, and 4·context·heads·head_dim for attention, masked
    after it is computed."""
    weights = sum(
        p.numel()
        for block in lm.model.model.layers[:layers]
        for p in block.parameters()
        if p.ndim == 2
    )
    return 2 * weights + 4 * context * lm.config.num_attention_heads * lm.config.head_dim * layers


def harvested(lm: LM, size: Size, layers: Sequence[int], out: str) -> dict:
    return harvest(
        lm,
        random_tokens(size, size.rows, 0),
        layer=list(layers),
        out=out,
        dtype="bfloat16",
        batch_rows=size.batch_rows,
        shard_rows=2 * size.batch_rows,
    )


def measure_harvest(size: Size, device: torch.device, lm: Callable[[], LM]) -> Result:
    """One row: layers, tokens, seconds, tokens_s, roofline_share, peak_gb, gb, forward_s, lost_s,
    fingerprint_s.

    roofline_share: of the rate of a bfloat16 matmul. gb: what is written, 10⁹ bytes. forward_s: the
    same passes with nothing kept. lost_s: seconds beyond those, to copies, checks, checksums and
    the disk. fingerprint_s: once for a model, on top.
    """
    lm, tokens, keys = (
        lm(),
        size.rows * size.context,
        [("resid_post", layer) for layer in size.layers],
    )
    times = [now(device)]
    lm.fingerprint  # noqa: B018 (computed here, and kept)
    times.append(now(device))
    rates = measure_rates(size.lm["hidden_size"], size.d_sae, size, device)
    capture(lm, keys, random_tokens(size, size.batch_rows, 1))  # what is loaded at a first pass
    times.append(now(device))
    for ids in random_tokens(size, size.rows, 0).split(size.batch_rows):
        capture(lm, keys, ids)
    times.append(now(device))
    peak_gb(device)
    with tempfile.TemporaryDirectory() as out:
        harvested(lm, size, size.layers, out)
        times.append(now(device))
        written = sum(path.stat().st_size for path in Path(out).rglob("*.safetensors"))
    fingerprint, _, forward, seconds = (
        after - before for before, after in itertools.pairwise(times)
    )
    flops = flops_a_token(lm, max(size.layers) + 1, size.context) * tokens
    row = {
        "layers": " ".join(map(str, size.layers)),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_s": tokens / seconds,
        "roofline_share": flops / seconds / rates["matmul_flops_s"],
        "peak_gb": peak_gb(device),
        "gb": written / 1e9,
        "forward_s": forward,
        "lost_s": seconds - forward,
        "fingerprint_s": fingerprint,
    }
    return pd.DataFrame([row]), rates | {"flops": flops}


def measure_run(size: Size, device: torch.device, lm: Callable[[], LM]) -> Result:
    """Columns stage, seconds, tokens, tokens_s: harvest of one site, training, evaluation on a few
    rows."""
    config = TrainConfig(
        d_sae=size.d_sae, steps=size.steps, batch_size=size.batch, lr=3e-4, dead_after=10_000_000
    )
    lm = lm()
    lm.fingerprint  # noqa: B018 (as in the harvest)
    with (
        tempfile.TemporaryDirectory() as out,
        stopwatch(device, [("data", Batches, "__next__")]) as waited,
    ):
        times = [now(device)]
        (acts,) = harvested(lm, size, size.layers[1:2], out).values()
        times.append(now(device))
        sae, _ = train(acts, config, device=device, log_rows=2)
        times.append(now(device))
        report = evaluate(sae, lm, random_tokens(size, size.test_rows, 2))
        times.append(now(device))
    table = pd.DataFrame(
        {
            "stage": ["harvest", "train", "evaluate"],
            "seconds": [b - a for a, b in itertools.pairwise(times)],
            "tokens": [
                size.rows * size.context,
                size.steps * size.batch,
                size.test_rows * size.context,
            ],
        }
    )
    facts = {"waiting_for_data_s": waited["data"], "l0": report.l0.value, "fvu": report.fvu.value}
    return table.assign(tokens_s=table.tokens / table.seconds), facts
