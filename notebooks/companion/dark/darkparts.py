"""Tables of notebook 07: what the nonlinear part of an SAE's error is, to other SAEs, to the model,
to a better search."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from jumprelu.activations import Activations, open_activations
from jumprelu.corpus import Tokens
from jumprelu.dark.darkmatter import (
    HeldOut,
    Split,
    decompose,
    linear_error,
    nonlinear_error,
)
from jumprelu.dark.pursuit import pursue
from jumprelu.dark.regression import Linear
from jumprelu.files import digest, tensor_digest
from jumprelu.lm import LM
from jumprelu.sae import SAE
from jumprelu.store import add_shard, shard_name, start_store

from ..rails.repeats import over_seeds
from .darkstudy import STATISTICS
from .downstream import Spliced, splice_variants
from .errors import Predicted, regress_errors

# ---- SAEs on parts of the error


@torch.no_grad()
def error_part(
    acts: Activations, sae: SAE, linear: Linear, part: str, out: str | Path
) -> Activations:
    """A store of one part of an SAE's error on each row of `acts`, "linear" or "nonlinear", a shard
    at a time."""
    request = {
        "source": acts.fingerprint,
        "sae": sae.fingerprint,
        "map": tensor_digest(linear._asdict()),
        "part": part,
        "site": acts.site,
        "layer": acts.layer,
        "dtype": acts.dtype,
    }
    index = start_store(Path(out), request, acts.model_name, acts.d_in, len(acts.index["shards"]))
    for number, shard in enumerate(acts.shards()):
        if shard_name(number) in index["shards"]:
            continue  # of a run that was interrupted
        x = shard.activations
        value = linear_error(x, linear) if part == "linear" else nonlinear_error(x, sae, linear)
        add_shard(Path(out), index, number, shard._replace(activations=value))
    return open_activations(out)


error_part.version, error_part.threads_matter = 1, False  # of its key, see rails/cache.py


class OnPart(SAE):
    """An SAE of a part of another one's error, made a function of the activation x: its contexts
    can be collected like any SAE's.

    sae: of that part, "linear" or "nonlinear"; of: the SAE whose error it is; linear: the map to
    that error's linear part.
    """

    def __init__(self, sae: SAE, of: SAE, linear: Linear, part: str):
        super().__init__(
            sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, sae.k, of.origin
        )
        self.of, self.part = of, part
        self.register_buffer("weight", linear.weight), self.register_buffer("bias", linear.bias)

    @property
    def fingerprint(self) -> str:
        mapped = tensor_digest({"weight": self.weight, "bias": self.bias})
        return digest(super().fingerprint, self.of.fingerprint, mapped, self.part)

    def encode(self, x: torch.Tensor, sparse: bool = False) -> torch.Tensor:
        linear = Linear(self.weight, self.bias)
        value = (
            linear_error(x, linear)
            if self.part == "linear"
            else nonlinear_error(x, self.of, linear)
        )
        return super().encode(value.to(x.dtype), sparse)


def purity(sae: SAE, acts: Activations, top: int = 20) -> pd.DataFrame:
    """How much the contexts of each latent have in common: a stand-in for interpretability that
    needs no reader.

    Of the `top` tokens on which a latent is most active, the share that have its most frequent
    token; latents that fire on fewer are left out. Columns latent, purity, chance: the share that
    so many tokens drawn at random would have, on average.
    """
    ids, tokens, latents, values, first = [], [], [], [], 0
    for shard in acts.shards():
        for some, of in zip(shard.activations.split(2**13), shard.ids.split(2**13), strict=True):
            found = sae.encode(some, sparse=True)
            token, latent = found.indices()
            tokens.append(token + first)
            latents.append(latent)
            values.append(found.values())
            ids.append(of)
            first += len(some)
    ids = torch.cat(ids).numpy()
    table = pd.DataFrame(
        {
            "token": ids[torch.cat(tokens).numpy()],
            "latent": torch.cat(latents).numpy(),
            "value": torch.cat(values).numpy(),
        }
    )
    best = table.sort_values("value", ascending=False, kind="stable").groupby("latent").head(top)
    counts = best.groupby("latent").token.agg(lambda some: some.value_counts().iloc[0])[
        best.groupby("latent").size() == top
    ]
    drawn = np.random.default_rng(0).choice(ids, (1000, top))
    chance = np.mean([np.unique(some, return_counts=True)[1].max() for some in drawn]) / top
    return pd.DataFrame(
        {"latent": counts.index, "purity": counts.to_numpy() / top, "chance": chance}
    )


# ---- what they do, and what explains them


class WithPart(NamedTuple):
    """x → Sae(x) + one part of the SAE's error, "linear" or "nonlinear"; [n, d_in] each."""

    sae: SAE
    linear: Linear
    part: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.part == "linear":
            return self.sae(x) + linear_error(x, self.linear)
        return self.sae(x) + nonlinear_error(x, self.sae, self.linear)


def _alone(one: Spliced, weights: torch.Tensor, part: str, other: str) -> torch.Tensor:
    return one.share(weights, part, "both")


def _restored(one: Spliced, weights: torch.Tensor, part: str, other: str) -> torch.Tensor:
    return 1 - one.share(weights, other, "both")


def _harm(one: Spliced, weights: torch.Tensor, part: str, other: str) -> torch.Tensor:
    return (1 + one.share(weights, part, "both") - one.share(weights, other, "both")) / 2


def _size(one: Spliced, weights: torch.Tensor, part: str, other: str) -> torch.Tensor:
    return one.size(weights, part, "both")


def _over_size(
    quantity: Callable[..., torch.Tensor],
    one: Spliced,
    weights: torch.Tensor,
    part: str,
    other: str,
) -> torch.Tensor:
    return quantity(one, weights, part, other) / _size(one, weights, part, other)


QUANTITIES: dict[str, Callable[..., torch.Tensor]] = {
    "harm": _harm,
    "alone": _alone,
    "restored": _restored,
    "size": _size,
    "harm over size": functools.partial(_over_size, _harm),
    "alone over size": functools.partial(_over_size, _alone),
    "restored over size": functools.partial(_over_size, _restored),
}
"""Name → (what was spliced, weights of documents, part that is missing, the other one) → [draws];
see :func:`harm_table`."""


def harm_table(
    lm: LM,
    tokens: Tokens,
    saes: Sequence[SAE],
    linears: Sequence[Linear],
    site: str,
    layer: int,
    start: int,
    draws: int = 1000,
) -> pd.DataFrame:
    """How much of the rise in cross-entropy each part of an SAE's error causes, beside its share of
    the squared error.

    With x̂ + linear error in the place of x, the nonlinear error is what is missing, and the other
    way round. The rise with one part missing ("alone") and the fall when it is given back
    ("restored"), both as shares of the rise with x̂ alone, differ, because cross-entropy does not
    add up: "harm" is their mean, and the harms of both parts add up to 1.

    saes, linears: SAEs that differ in their seed, and the map of each. Columns missing ("linear",
    "nonlinear"), quantity, mean, low, high (over documents and seeds): harm, alone, restored;
    "size", the part's squared length over that of the error where x was replaced; "harm over size"
    and the same of the others; and, under missing "both", "rise": nats per token with x̂ alone.
    """
    spliced = []
    for sae, linear in zip(saes, linears, strict=True):
        variants = {
            "both": sae,
            "nonlinear": WithPart(sae, linear, "linear"),
            "linear": WithPart(sae, linear, "nonlinear"),
        }
        spliced.append(splice_variants(lm, tokens, variants, site, layer, start))
    documents = len(spliced[0].tokens)
    rise = [functools.partial(Spliced.rise, one, name="both") for one in spliced]
    rows = [("both", "rise", *over_seeds(rise, documents, draws))]
    for part, other in (("linear", "nonlinear"), ("nonlinear", "linear")):
        for name, quantity in QUANTITIES.items():
            of = [functools.partial(quantity, one, part=part, other=other) for one in spliced]
            rows.append((part, name, *over_seeds(of, documents, draws)))
    return pd.DataFrame(rows, columns=["missing", "quantity", "mean", "low", "high"])


class Pursued(NamedTuple):
    """One SAE with its encoder and with pursuit, on the same documents."""

    encoder: HeldOut
    pursuit: HeldOut
    linear: Linear
    """The map to the error with the encoder."""

    def ratio(self, weights: torch.Tensor, name: str) -> torch.Tensor:
        """One of :data:`STATISTICS` with pursuit over that with the encoder."""
        return STATISTICS[name](self.pursuit, weights) / STATISTICS[name](self.encoder, weights)


class ByPursuit(NamedTuple):
    """x → the decoding of the code that pursuit finds."""

    sae: SAE

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae.decode(pursue(self.sae, x))


def pursue_all(saes: Sequence[SAE], acts: Activations, parts: Split) -> list[Pursued]:
    """Both ways to a code for each SAE, at equal L0 token by token
    (:func:`jumprelu.dark.pursuit.pursue`)."""
    found = []
    for sae in saes:
        ways = {"encoder": sae, "pursuit": ByPursuit(sae)}
        encoder, pursuit = decompose(acts, ways, parts, device="cpu")[0].values()
        found.append(Pursued(encoder.test, pursuit.test, encoder.linear))
    return found


def pursuit_table(
    d_sae: Sequence[int], pursued: Sequence[Pursued], draws: int = 1000
) -> pd.DataFrame:
    """FVU and FVU_nl with pursuit over those with the encoder, over documents and over SAEs of one
    width.

    d_sae: of each SAE. Columns d_sae, quantity ("fvu", "fvu_nonlinear"), mean, low, high.
    """
    rows = []
    for width in dict.fromkeys(d_sae):
        several = [one for n, one in zip(d_sae, pursued, strict=True) if n == width]
        rows += [
            (
                width,
                name,
                *over_seeds(
                    [functools.partial(one.ratio, name=name) for one in several],
                    len(several[0].encoder.tokens),
                    draws,
                ),
            )
            for name in ("fvu", "fvu_nonlinear")
        ]
    return pd.DataFrame(rows, columns=["d_sae", "quantity", "mean", "low", "high"])


class Source(NamedTuple):
    """An SAE at another place, whose output may explain an error. acts: there, of the same
    tokens."""

    acts: Activations
    sae: SAE


def source_table(
    acts: Activations,
    origins: Sequence[SAE],
    sources: dict[str, Sequence[Source]],
    pursued: Sequence[Pursued],
    parts: Split,
    draws: int = 1000,
) -> pd.DataFrame:
    """What outputs of SAEs elsewhere explain of the error of `origins`, over documents and seeds.

    origins: SAEs that differ in their seed; pursued: of each, on `acts` and `parts`; sources: name
    → one for each origin. Columns source, vector, mean, low, high. Vectors: error, linear and
    nonlinear (R²), and "beyond pursuit": R² of the nonlinear error minus the share of it that
    pursuit removes from the same SAE, on the same documents.
    """
    rows = []
    for name, several in sources.items():
        found = [
            regress_errors(acts, sae, each.linear, one.acts, one.sae, parts)
            for sae, each, one in zip(origins, pursued, several, strict=True)
        ]
        documents = len(found[0]["error"].tokens)
        rows += [
            (name, vector, *over_seeds([each[vector].r2 for each in found], documents, draws))
            for vector in found[0]
        ]
        beyond = [
            functools.partial(_beyond_pursuit, each["nonlinear"], one)
            for each, one in zip(found, pursued, strict=True)
        ]
        rows.append((name, "beyond pursuit", *over_seeds(beyond, documents, draws)))
    return pd.DataFrame(rows, columns=["source", "vector", "mean", "low", "high"])


def _beyond_pursuit(found: Predicted, pursued: Pursued, weights: torch.Tensor) -> torch.Tensor:
    return found.r2(weights) - 1 + pursued.ratio(weights, "fvu_nonlinear")
