"""What SAEs do to the model's loss, token by token: by position in the row, and by kind of text.

Notable here:
- losses are kept token by token, so that positions, documents and kinds of text are all means over
  parts of one table.
- as in `metrics.py`, BOS, EOS and padding are neither replaced nor counted, and "loss at position
  t" is the cross-entropy of the token at t + 1. Rows are drawn for intervals, so each should be of
  a document of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import datasets
import pandas as pd
import torch

from jumprelu.corpus import Tokens, tokenize
from jumprelu.intervals import bootstrap
from jumprelu.lm import LM
from jumprelu.sae import SAE, check_autoencoder
from jumprelu.splicing import Splicer, on_device, place_of


class Rises(NamedTuple):
    """Cross-entropy with each SAE spliced in minus the model's own, at each position of each
    row."""

    names: list[str]
    rise: torch.Tensor
    """Nats, float32 [SAEs, rows, positions − 1]; NaN at special tokens and for predicting them.
    Place t predicts t + 1."""

    def mean(
        self, weights: torch.Tensor, name: str, where: torch.Tensor | bool = True
    ) -> torch.Tensor:
        """Mean over tokens, [draws]; weights: how often each row was drawn, [draws, rows]
        (`intervals.bootstrap`).

        where: which tokens count, bool, broadcast to [rows, positions − 1].
        """
        rise = self.rise[self.names.index(name)].double()
        counted = ~rise.isnan() & torch.as_tensor(where)
        return weights @ rise.where(counted, 0).sum(-1) / (weights @ counted.double().sum(-1))

    def ratio(
        self,
        weights: torch.Tensor,
        name: str,
        one: torch.Tensor | bool,
        other: torch.Tensor | bool = True,
    ) -> torch.Tensor:
        """Mean where `one` over that where `other`."""
        return self.mean(weights, name, one) / self.mean(weights, name, other)

    def at(self, begin: int, end: int | None = None) -> torch.Tensor:
        """Mask of the positions from `begin` to before `end`, [positions − 1]."""
        place = torch.arange(self.rise.shape[-1])
        return (place >= begin) & (place < (len(place) if end is None else end))


@torch.no_grad()
def token_rises(
    lm: LM, tokens: Tokens, saes: Mapping[str, SAE], batch_rows: int | None = None
) -> Rises:
    """What splicing in each SAE does to the model's loss, token by token; each SAE's origin says
    where, its type in which precision. The model's own pass is computed once for all, the others
    from their place on."""
    for sae in saes.values():
        check_autoencoder(sae)
    places = {name: place_of(sae) for name, sae in saes.items()}
    saes = {name: on_device(sae, lm.device) for name, sae in saes.items()}
    rise = torch.full((len(saes), len(tokens), tokens.ids.shape[1] - 1), torch.nan)
    for batch, log_p in Splicer(lm, tokens, places.values(), batch_rows=batch_rows):
        own, counted = batch.losses(log_p), batch.counted.cpu()
        for number, (name, sae) in enumerate(saes.items()):
            reconstruct = partial(_reconstruct, sae)
            losses = batch.losses(batch.spliced(*places[name], reconstruct))
            rise[number, batch.rows][counted] = (losses - own).cpu()
    return Rises(list(saes), rise)


def _reconstruct(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return sae(x.to(sae.W_enc.dtype))


def octaves(length: int) -> list[tuple[int, int]]:
    """Positions 1 to length − 1 in bins that double: (1, 2), (2, 4), (4, 8), …; the end of each is
    not in it."""
    edges = [2**n for n in range(length.bit_length()) if 2**n < length]
    return list(zip(edges, [*edges[1:], length], strict=True))


def position_table(rises: Rises, names: Sequence[str], draws: int = 1000) -> pd.DataFrame:
    """Columns site (of `names`), start, end (inclusive), quantity, mean, low, high (95 %, over
    documents: rows).

    Quantities: "delta_loss" in each bin of :func:`octaves`, and "relative", over the mean at all
    positions.
    """
    rows, documents = [], rises.rise.shape[1]
    for name in names:
        for begin, end in octaves(rises.rise.shape[-1]):
            here = rises.at(begin, end)
            for quantity, f in (
                ("delta_loss", partial(rises.mean, name=name, where=here)),
                ("relative", partial(rises.ratio, name=name, one=here)),
            ):
                rows.append((name, begin, end - 1, quantity, *bootstrap(f, documents, draws)))
    return pd.DataFrame(rows, columns=["site", "start", "end", "quantity", "mean", "low", "high"])


def kind_of(document: Mapping[str, Any], column: str) -> str:
    """What kind of text a document is: its `column`, such as "meta.pile_set_name"; '': the first
    part of its path."""
    if not column:
        return PurePosixPath(document["path"]).parts[0]
    try:
        return str(reduce(getitem, column.split("."), document))
    except (KeyError, TypeError):
        raise ValueError(
            f"the documents have no {column}: their columns are {', '.join(document)}"
        ) from None


def tokenize_kinds(
    texts: Iterable[dict[str, Any]], tokenizer: Any, context_size: int, rows: int, column: str = ""
) -> tuple[Tokens, list[str]]:
    """At most `rows` rows of tokens, one a document, and the kind of text of each
    (:func:`kind_of`)."""
    kinds: list[str] = []

    def noted() -> Iterator[dict[str, Any]]:
        for document in texts.shuffle(seed=0) if isinstance(texts, datasets.Dataset) else texts:
            kinds.append(kind_of(document, column))
            yield document

    tokens = tokenize(noted(), tokenizer, context_size, rows, rows_per_document=1)
    return tokens, [kinds[number] for number in tokens.document.tolist()]


def subset_table(
    rises: Rises, names: Sequence[str], kinds: Sequence[str], least: int, draws: int = 1000
) -> pd.DataFrame:
    """Delta LM loss by kind of text, of kinds with at least `least` rows, in the order of their
    number.

    Columns subset, documents, site, quantity, mean, low, high (95 %, over documents: rows).
    Quantities: "delta_loss", and "ratio", over that of all other rows, of small kinds too.
    """
    number, rows = pd.Series(kinds).value_counts(), []
    for kind in number.index[number >= least]:
        here = torch.tensor([each == kind for each in kinds])[:, None]
        for name in names:
            for quantity, f in (
                ("delta_loss", partial(rises.mean, name=name, where=here)),
                ("ratio", partial(rises.ratio, name=name, one=here, other=~here)),
            ):
                rows.append((kind, number[kind], name, quantity, *bootstrap(f, len(kinds), draws)))
    return pd.DataFrame(
        rows, columns=["subset", "documents", "site", "quantity", "mean", "low", "high"]
    )
