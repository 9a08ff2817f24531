"""The three sites of every layer: their sum, and the scale of their activations."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.sites import FAMILIES, SITES, capture


def _attention_parts(lm: LM, layer: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """What attn_out goes through on its way to the residual stream: the output projection, and
    Gemma 2's norm."""
    modules = dict(lm.model.named_modules())
    family = next(family for family in FAMILIES.values() if family.blocks in modules)
    block = modules[f"{family.blocks}.{layer}"]
    after = (
        block.post_attention_layernorm
        if hasattr(block, "post_feedforward_layernorm")
        else torch.nn.Identity()
    )
    return block.get_submodule(family.projection), after


@torch.no_grad()
def residual_identity(lm: LM, ids: torch.Tensor) -> pd.DataFrame:
    """The sites add up: resid_post(L) − resid_post(L − 1) = attention's contribution + mlp_out(L).

    ids: [n_rows, T]; all layers are held at once, and a few rows are enough. Columns `layer`, from
    1 on; `error`, the norm of what is left over relative to the left side's; `rounding`, what one
    rounding of resid_post(L) can make of it.
    """
    found = capture(lm, [(site, layer) for layer in range(lm.n_layers) for site in SITES], ids)
    rows = []
    for layer in range(1, lm.n_layers):
        project, norm = _attention_parts(lm, layer)
        update = found["resid_post", layer].double() - found["resid_post", layer - 1].double()
        left = (
            update
            - norm(project(found["attn_out", layer])).double()
            - found["mlp_out", layer].double()
        )
        rounding = torch.finfo(lm.dtype).eps * found["resid_post", layer].double().norm()
        rows.append(
            (layer, (left.norm() / update.norm()).item(), (rounding / update.norm()).item())
        )
    return pd.DataFrame(rows, columns=["layer", "error", "rounding"])


def site_statistics(lm: LM, tokens: Tokens, batch_rows: int = 4) -> pd.DataFrame:
    """Scale of the activations, a row a site and layer; special positions count in `first_ratio`
    alone.

    Columns: `site`, `layer`, `mean_square` = E‖x‖², `mean_share` = ‖E x‖²/E‖x‖², the part that is
    the same for every token, and `first_ratio`: root mean square norm at the first position of the
    rows over that at the ordinary ones, far above 1 where the model parks its attention (attention
    sinks; Xiao et al. 2023, arXiv 2309.17453).
    """
    keys = [(site, layer) for site in SITES for layer in range(lm.n_layers)]
    sums: dict[tuple[str, int], list[Any]] = {key: [0.0, 0.0, 0.0] for key in keys}
    n_ordinary = 0
    for rows in tqdm(
        tokens.ids.split(batch_rows), desc="measuring sites", unit="batch", mininterval=2
    ):
        ordinary = ~lm.is_special(rows)
        n_ordinary += int(ordinary.sum())
        for key, value in capture(lm, keys, rows).items():
            x = value[ordinary.to(value.device)].double()
            sums[key][0] += x.sum(0)
            sums[key][1] += x.square().sum().item()
            sums[key][2] += value[:, 0].double().square().sum().item()
    table = []
    for (site, layer), (total, square, first) in sums.items():
        mean_square = square / n_ordinary
        share = (total / n_ordinary).square().sum().item() / mean_square
        table.append(
            (site, layer, mean_square, share, math.sqrt(first / len(tokens) / mean_square))
        )
    return pd.DataFrame(
        table, columns=["site", "layer", "mean_square", "mean_share", "first_ratio"]
    )
