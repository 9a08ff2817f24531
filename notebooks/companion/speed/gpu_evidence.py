"""What this package does on a GPU at the paper's scale: `python -m companion.speed.gpu_evidence`,
in four parts.

    kernels   each Triton kernel against float64                    harvest   activations of a Gemma 2 9B with random weights
    step      a JumpReLU training step beside a dense one           run       harvest, training and evaluation as in notebook 02

Notable here:
- the floor of a step is the encoder's matmul in bfloat16 and Adam's 24 bytes a weight, at rates
  measured on this device. Nothing that looks at every latent and trains every weight in float32 can
  be faster.
- ways to take a step run in turns on one state; a number is the median over turns. Parts are timed
  with a wait before and after each, so they add up to more than the step. On a CPU, memory is what
  the process has.
- the model's weights are made on the device: nothing is downloaded. Speed and memory are the real
  one's; FVU says nothing.
- a part is written when it is done, with the device's name, and not measured again for this device
  and these sizes.

FULL needs, by arithmetic: a GPU of 80 GB (weights, gradients and moments 11 GB; a dense step some
ten float32 arrays of [4096, 131072], 2 GB each; later the model, 18.5 GB), 64 GB of host memory, 4
GB for temporary files, and ten minutes of an H200.
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

from jumprelu import kernels, sparse
from jumprelu.activations import Batches
from jumprelu.files import read_json, write_json, write_text
from jumprelu.harvest import harvest
from jumprelu.lm import LM
from jumprelu.metrics import evaluate
from jumprelu.optim import Adam
from jumprelu.recipe import TrainConfig
from jumprelu.sites import capture
from jumprelu.train import Inputs, _advance, _State, train

from ..rails.figures import MEASURED

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


# ---- measuring


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
            call = functools.partial(timed, part, getattr(owner, name))
            stack.enter_context(
                patch.object(owner, name, lambda *args, call=call, **kwargs: call(*args, **kwargs))
            )
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


@contextmanager
def dense(precision: str = "highest") -> Iterator[None]:
    """Within it, steps are dense and without kernels. precision: of float32 matmuls; "high" lets a
    GPU round to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with (
            patch.object(sparse, "DENSE_ABOVE", 0.0),
            patch.object(kernels, "serves", lambda tensor: False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the four parts


def relative(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest |found − expected| over the largest |expected|, of the worst of several tensors; ∞ if
    shapes differ."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    errors = [
        (a - b.double()).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(errors).max().item()  # NaN if one is


@torch.no_grad()
def measure_kernels(size: Size, device: torch.device, lm: Any = None) -> Result:
    """Columns kernel, size, error (:func:`relative`), ms; no rows where no kernel serves. Entries
    are as in a search: of latents by tokens, about l0 a token."""
    rows, (d_sae, batch, d_in) = [], (size.d_sae, size.batch, size.lm["hidden_size"])
    normal = functools.partial(
        torch.randn, generator=torch.Generator(device).manual_seed(0), device=device
    )

    def check(
        kernel: str, what: str, call: Callable[[], Sequence[torch.Tensor]], *expected: torch.Tensor
    ) -> None:
        error = relative(call(), expected)  # of the first call: Adam goes on from where it is
        rows.append(
            (kernel, what, error, in_turns({kernel: call}, size.repeats, device)[kernel][0])
        )

    if kernels.serves(torch.empty(0, device=device)):
        bar = torch.full(
            (d_sae,), statistics.NormalDist().inv_cdf(1 - size.l0 / d_sae), device=device
        )
        for dtype in (torch.float32, torch.bfloat16):
            products = normal(d_sae, batch).to(dtype)
            latent, token = (products.float() > bar[:, None]).nonzero().unbind(1)
            start = torch.searchsorted(
                latent, torch.arange(d_sae + 1, device=device), out_int32=True
            )
            call = functools.partial(kernels.compact, products, bar)
            check(
                "compact",
                f"{d_sae} × {batch}, {str(dtype)[6:]}",
                call,
                start,
                token,
                products[latent, token],
            )
        order, what = (
            (token * d_sae + latent).argsort(),
            f"{len(token)} entries of {d_sae} × {batch}",
        )
        ends = torch.searchsorted(
            token[order], torch.arange(batch + 1, device=device), out_int32=True
        )
        token, latent = token.int(), latent.int()
        check(
            "transposed",
            what,
            lambda: kernels.transposed(start, token, (d_sae, batch)),
            order,
            ends,
            latent[order],
        )

        x, atoms, weight, what = (
            normal(batch, d_in),
            normal(d_sae, d_in),
            normal(len(token)),
            f"{what}, rows of {d_in}",
        )
        pairs = zip(token.split(8192), latent.split(8192), strict=True)
        products = [
            torch.linalg.vecdot(x[some].double(), atoms[few].double()) for some, few in pairs
        ]
        check("dots", what, lambda: [kernels.dots(latent, token, x, atoms)], torch.cat(products))
        for which, bags in {
            "tokens": (ends, latent[order], weight[order], atoms),
            "latents": (start, token, weight, x),
        }.items():
            exact = torch.nn.functional.embedding_bag(
                bags[1],
                bags[3].double(),
                bags[0],
                mode="sum",
                include_last_offset=True,
                per_sample_weights=bags[2].double(),
            )
            check("bag", f"{what}, sums of {which}", lambda bags=bags: [kernels.bag(*bags)], exact)
        exact = weight.new_zeros(d_sae, dtype=torch.float64).index_add(0, latent, weight.double())
        check("totals", what.partition(",")[0], lambda: [kernels.totals(start, weight)], exact)

        p, g, v = (
            atoms / atoms.norm(dim=-1, keepdim=True),
            normal(d_sae, d_in),
            normal(d_sae, d_in).square(),
        )
        for beta1, unit_norm in ((0.0, True), (0.9, False)):
            exact = Adam(
                {"p": torch.nn.Parameter(p.double())}, (beta1, 0.999), 1e-8, ("p",) * unit_norm
            )
            exact.moments["p"]["exp_avg_sq"].copy_(v)
            exact.parameters["p"].grad, exact.steps, ours = g.double(), 4, p.clone()
            with dense():
                exact.step({"p": 0.01})
            moments = v.clone(), torch.zeros_like(v) if beta1 else None
            call = functools.partial(
                kernels.adam, ours, g, *moments, 0.01, (beta1, 0.999), 1e-8, 5, unit_norm
            )
            check(
                "adam",
                f"{d_sae} × {d_in}, β₁ = {beta1:g}" + unit_norm * ", rows of norm 1",
                lambda call=call, ours=ours: (call(), [ours])[1],
                exact.parameters["p"],
            )
    return pd.DataFrame(rows, columns=["kernel", "size", "error", "ms"]), {"rows": len(rows)}


WAYS = {"ours": nullcontext, "dense": dense, "dense, TF32": functools.partial(dense, "high")}
PARTS_OF_A_STEP = [
    ("search: matmul", torch, "mm"),
    ("search: compaction", kernels, "compact"),
    ("search: compaction", sparse, "_positions"),
    ("search: all else", sparse, "screen"),
    ("Adam", Adam, "step"),
    *(("sums", sparse, name) for name in ("dots", "token_sums", "latent_sums", "_transposed")),
    ("sums", kernels, "totals"),
    ("all else", sys.modules[__name__], "_advance"),
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
def entries_of(trainee: torch.nn.Module, x: torch.Tensor, bandwidth: float) -> list[float]:
    """A token's mean number of latents that are active, that are in S, and that the search finds
    (in bfloat16, more than S)."""
    with patch.object(sparse, "dots", wraps=sparse.dots) as dots:
        out = trainee(x, bandwidth)
    found = len(dots.call_args_list[0].args[0]) if dots.called else out.acts.numel()
    return [number / len(x) for number in (int((out.acts > 0).sum()), out.acts.numel(), found)]


def measure_step(size: Size, device: torch.device, lm: Any = None) -> Result:
    """Columns d_in, d_sae, batch, l0, entries, candidates (:func:`entries_of`), way, ms, tokens_s,
    peak_gb, ratio_to_floor.

    way: of WAYS, "floor", or "ours: " and a part, whose rate is what the step would reach if that
    were all.
    """
    rows, facts, (d_in, batch) = [], {}, (size.lm["hidden_size"], size.batch)
    for d_sae in size.widths:
        rates = facts[f"rates at {d_sae}"] = measure_rates(d_in, d_sae, size, device)
        config = TrainConfig(
            d_sae=d_sae, steps=10_000, batch_size=batch, bandwidth=0.02, lr=1e-9
        )  # the state stays as it is
        state = _State(
            SimpleNamespace(d_in=d_in),
            config,
            device,
            Inputs(1.0, torch.zeros(d_in, device=device)),
        )
        x = planted(state.trainee, 4 * batch, size.l0)
        batches = itertools.cycle(x.split(batch))

        def step(way: Callable[[], Any] = nullcontext, state=state, batches=batches) -> None:
            with way():
                _advance(state, next(batches), False)

        known = entries_of(state.trainee, x[:batch], config.bandwidth)
        measured = in_turns(
            {name: functools.partial(step, way) for name, way in WAYS.items()}, size.repeats, device
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


PARTS = {
    "kernels": measure_kernels,
    "step": measure_step,
    "harvest": measure_harvest,
    "run": measure_run,
}


# ---- writing, and the command line


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; of driver, clocks and power limit what nvidia-smi says of the
    first GPU."""
    facts = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "triton": getattr(kernels.triton, "__version__", None),
    }
    wanted = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | dict(zip(wanted.split(","), said.partition("\n")[0].split(", "), strict=False))


def measure(
    parts: Sequence[str], size: Size, device: torch.device, folder: Path, again: bool = False
) -> bool:
    """Measure those of `parts` that `folder` does not have of this device and these sizes, and show
    all. One that fails stops no other, since a GPU may be there for minutes. Returns whether none
    did."""
    facts, path, succeeded, console = machine(device), folder / "gpu_evidence.json", True, Console()
    lm = functools.cache(lambda: random_gemma(size, device))
    for part in parts:
        csv, records = folder / f"gpu_{part}.csv", read_json(path) if path.exists() else {}
        there = records.get(part, {})
        if (
            again
            or not csv.exists()
            or (there.get("device"), there.get("size")) != (facts["device"], str(size))
        ):
            began = now(device)
            try:
                table, more = PARTS[part](size, device, lm)
            except Exception:
                succeeded = False
                console.print_exception()
                continue
            table.insert(0, "device", facts["device"])
            write_text(
                csv, table.to_csv(index=False, float_format="%.6g")
            )  # before the record that vouches for it
            record = facts | more | {"size": str(size), "seconds": round(now(device) - began, 1)}
            write_json(path, records | {part: record})
        table = pd.read_csv(csv).drop(columns="device")
        shown = Table(*table.columns, title=f"{part}: {facts['device']}")
        for row in table.astype(object).itertuples(index=False):
            shown.add_row(
                *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)
            )
        console.print(shown)
    return succeeded


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 if a part failed, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m companion.speed.gpu_evidence", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="some of the four, with commas (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--size",
        choices=("full", "tiny"),
        default="full",
        help="tiny runs anywhere (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=MEASURED, help="folder of the files (default: figures)"
    )
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    given = parser.parse_args(arguments)
    try:
        device, parts = torch.device(given.device), given.parts.split(",")
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(
                f"no part {', '.join(map(repr, unknown))}: expected some of {','.join(PARTS)}"
            )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "PyTorch sees no GPU: --device cpu --size tiny --out FOLDER runs the same code without one"
            )
        if device.type == "cpu" and (
            given.size == "full" or given.out.resolve() == MEASURED.resolve()
        ):
            raise ValueError(
                "a CPU gives no evidence of a GPU: give --size tiny, and --out with another folder than figures"
            )
        return (
            0
            if measure(
                parts, FULL if given.size == "full" else TINY, device, given.out, given.again
            )
            else 1
        )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
