"""Each Triton kernel against float64."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from jumprelu import kernels
from jumprelu.optim import Adam

from .gpu_clock import in_turns
from .gpu_sizes import Result, Size


def relative(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest |found − expected| over the largest |expected|, of the worst of several tensors; ∞ if
    shapes differ."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    errors = [
        (a - b.double()).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(errors).max().item()  # NaN if one is


def _listed(kernel: Callable[..., torch.Tensor], *args: Any) -> list[torch.Tensor]:
    return [kernel(*args)]


def _changed(call: Callable[[], Any], tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor that the call changes in place."""
    call()
    return [tensor]


@torch.no_grad()
def measure_kernels(
    size: Size, device: torch.device, lm: Any = None, triton: bool | None = None
) -> Result:
    """Columns kernel, size, error (:func:`relative`), ms; no rows where no kernel serves. Entries
    are as in a search: of latents by tokens, about l0 a token. triton: as in
    :class:`jumprelu.sparse.SparsePolicy`."""
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

    if kernels.serves(torch.empty(0, device=device), triton):
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
            check(
                "bag",
                f"{what}, sums of {which}",
                functools.partial(_listed, kernels.bag, *bags),
                exact,
            )
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
            exact.step({"p": 0.01}, triton=False)
            moments = v.clone(), torch.zeros_like(v) if beta1 else None
            call = functools.partial(
                kernels.adam, ours, g, *moments, 0.01, (beta1, 0.999), 1e-8, 5, unit_norm
            )
            check(
                "adam",
                f"{d_sae} × {d_in}, β₁ = {beta1:g}" + unit_norm * ", rows of norm 1",
                functools.partial(_changed, call, ours),
                exact.parameters["p"],
            )
    return pd.DataFrame(rows, columns=["kernel", "size", "error", "ms"]), {"rows": len(rows)}
