"""One page to look at the latents of an SAE: a self-contained HTML file that needs no server and no
network.

    python -m jumprelu pages SAE LM OUT.html

- the list of latents stands at the beginning of the file, so it shows while the rest is read.
- contexts follow in compressed blocks of `BLOCK` latents, opened when one of them is looked at.
- `OUT.html#latent=123` leads to latent 123, in every page made of this SAE.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..files import write_text
from ..lm import LM
from ..sae import SAE
from ..splicing import place_of
from .contexts import Contexts
from .directions import logit_effects, nearest
from .webpage import layout, narrow, pack, page, shades, token_texts, vocabulary

BLOCK = 128
"""Latents whose contexts are compressed together."""
SHOWN = {"top": 8, "quantiles": 4, "per_quantile": 2, "negatives": 2, "window": 25}
"""What :func:`jumprelu.latents.contexts.collect` is asked for: 16k latents of it are about 10 to 25
MB."""


class Explanation(NamedTuple):
    """What somebody says about a latent, and how well it predicts; None: not known."""

    text: str
    score: float | None = None


def write_pages(
    out: str | Path,
    sae: SAE,
    lm: LM,
    contexts: Contexts,
    explanations: Mapping[int, Explanation] | None = None,
    title: str | None = None,
) -> Path:
    """Write the page of `contexts.latents` to the file `out`; returns its path.

    contexts: of this SAE on this model, from :func:`jumprelu.latents.contexts.collect` (its
    docstring has the shapes). explanations: by number of the latent. title: by default the model,
    site, layer and kind of the SAE.

    Raises ValueError for an SAE that does not remember its place, a latent that it does not have,
    token ids that the model does not have, an explanation of a latent that is not there, or a score
    that is no number; OSError if the file cannot be written.
    """
    numbers = contexts.latents
    explanations = dict(explanations or {})
    _check(sae, lm, contexts, explanations)
    site, layer = place_of(sae)
    effects, near = logit_effects(lm, sae, numbers), nearest(sae, numbers)
    where = torch.stack([contexts.document, contexts.row, contexts.position], -1)
    known, (tokens, top, bottom) = vocabulary(contexts.tokens, effects.top, effects.bottom)
    arrays = {  # what is shown of each latent, along the first axis
        "tokens": narrow(tokens),
        "acts": shades(contexts.acts, contexts.maximum),
        "quantile": contexts.quantile.numpy().astype(np.int8),
        "where": where.numpy().astype(np.int32),
        "histogram": contexts.histogram.clamp_max(2**32 - 1).numpy().astype(np.uint32),
        "top": narrow(top),
        "topValue": effects.top_value.numpy(),
        "bottom": narrow(bottom),
        "bottomValue": effects.bottom_value.numpy(),
        "near": near.latents.numpy().astype(np.uint32),
        "cosine": near.cosine.numpy(),
    }
    blocks = [
        {name: a[start : start + BLOCK] for name, a in arrays.items()}
        for start in range(0, len(numbers), BLOCK)
    ]
    model_name = sae.origin.model_name or lm.name
    of = f"{model_name}, {site} {layer}: {sae.origin.architecture}, {sae.d_sae} latents"
    title = title or of
    said = [explanations.get(n, Explanation("")) for n in numbers.tolist()]
    first = {
        "about": {
            "title": title,
            "model": lm.name,
            "sae": sae.fingerprint,
            "site": site,
            "layer": layer,
            "d_sae": sae.d_sae,
            "architecture": sae.origin.architecture,
            "l0": _number(contexts.frequency.sum()),
            "all": len(numbers) == sae.d_sae,
            "block": BLOCK,
            "window": contexts.tokens.shape[2],
            "slots": contexts.tokens.shape[1],
            "layout": layout(arrays),
        },
        "latents": {
            "number": numbers.tolist(),
            "frequency": _column(contexts.frequency),
            "maximum": _column(contexts.maximum),
            "threshold": _column(sae.threshold[numbers]),
            "decoder": _column(sae.W_dec[numbers].norm(dim=1)),
            "encoder": _column(sae.W_enc.T[numbers].norm(dim=1)),
            "score": [_number(one.score) for one in said],
            "explanation": [one.text for one in said],
            "peak": _peaks(contexts, tokens),
        },
        "vocabulary": ["", *token_texts(lm.tokenizer, known)],
    }
    later = {f"block-{i}": pack(block) for i, block in enumerate(blocks)}
    write_text(out, page("pages", title, first, later))
    return Path(out)


def _check(sae: SAE, lm: LM, contexts: Contexts, explanations: dict[int, Explanation]) -> None:
    numbers = contexts.latents
    if not len(numbers) or int(numbers.min()) < 0 or int(numbers.max()) >= sae.d_sae:
        known = f"0 to {sae.d_sae - 1}"
        raise ValueError(
            f"contexts must be of latents of this SAE, {known}, got {numbers.tolist()[:5]}"
        )
    if int(contexts.tokens.max()) >= lm.config.vocab_size:
        raise ValueError(
            f"the contexts hold token {int(contexts.tokens.max())}, {lm.name} has "
            f"{lm.config.vocab_size}: they are of another model"
        )
    if unknown := sorted(set(explanations) - set(numbers.tolist())):
        raise ValueError(f"explanations of latents without contexts: {unknown[:5]}")


def _peaks(contexts: Contexts, tokens: torch.Tensor, most: int = 4) -> list[list[int]]:
    """The first `most` distinct tokens of greatest activation in a latent's top contexts, for a
    latent without explanation."""
    value, at = contexts.acts.max(-1)
    peak = tokens.gather(-1, at[..., None])[..., 0]
    use = (contexts.quantile == 0) & (value > 0) & (peak > 0)
    rows = zip(peak.tolist(), use.tolist(), strict=True)
    return [
        list(dict.fromkeys(p for p, u in zip(peaks, used, strict=True) if u))[:most]
        for peaks, used in rows
    ]


def _number(value: Any) -> float | None:
    return None if value is None else float(f"{float(value):.5g}")


def _column(values: torch.Tensor) -> list[float | None]:
    return [_number(value) for value in values.detach().tolist()]


def read_explanations(path: str | Path) -> dict[int, Explanation]:
    """Explanations from a CSV with the columns latent, explanation and, if there are scores, score
    (may be empty).

    Raises FileNotFoundError for no such file, ValueError for one that is not of this form.
    """
    import pandas as pd

    options = {"keep_default_na": False, "na_values": {"score": [""]}}
    table = pd.read_csv(path, dtype={"explanation": str}, **options)
    if missing := {"latent", "explanation"} - set(table):
        names = " and ".join(sorted(missing))
        raise ValueError(f"{path} lacks the column {names}: expected latent, explanation, score")
    table["score"] = table.get("score", np.nan)
    if table.latent.dtype.kind != "i" or table.score.dtype.kind not in "if":
        raise ValueError(f"{path}: expected the number of a latent and a score or nothing in a row")
    if table.latent.duplicated().any():
        raise ValueError(f"{path}: latent {table.latent[table.latent.duplicated()].iloc[0]} twice")
    return {
        int(row.latent): Explanation(row.explanation, None if np.isnan(row.score) else row.score)
        for row in table.itertuples()
    }
