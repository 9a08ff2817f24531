"""Contexts of latents: the windows of text in which each is most active, less active, and silent.

- two passes over the tokens, a batch of rows at a time. The first chooses positions
  (:mod:`jumprelu.latents.choosing`). The second counts the histogram, which needs the maximum, and
  reads the activations around what was chosen. Activations of the model are kept in between while
  they fit (`KEPT`), and else computed again.
- BOS, EOS and padding give no activation and are nobody's centre, as everywhere in this package.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..corpus import Tokens, as_tokens
from ..lm import LM
from ..sae import SAE
from ..sites import capture
from ..splicing import on_device, place_of
from .choosing import EMPTY, Choice, Chooser, code, entries_of

BINS = 32
"""Bins of the histogram."""
KEPT = 2**26
"""Numbers of the model's activations that are kept between the passes (256 MiB in float32); beyond,
they are computed twice."""


class Contexts(NamedTuple):
    """m latents, n windows of w tokens each: top ones first, by falling activation, then bin after
    bin, then silent ones."""

    latents: torch.Tensor
    """int64 [m]."""
    tokens: torch.Tensor
    """int64 [m, n, w]: token ids; −1 where the window leaves the row, and in empty slots."""
    acts: torch.Tensor
    """float32 [m, n, w]: activation of that latent at each token of the window, raw units; 0 where
    padded."""
    quantile: torch.Tensor
    """int64 [m, n]: 0 a top context; 1 … q sampled from that bin of its positive activations, 1 the
    highest; −1 silent in the whole window; −2 an empty slot."""
    document: torch.Tensor
    """int64 [m, n]; −1 in empty slots, as are row, and position of the window's centre in it."""
    row: torch.Tensor
    position: torch.Tensor
    frequency: torch.Tensor
    """float64 [m]: share of tokens with activation > 0."""
    histogram: torch.Tensor
    """int64 [m, 32]: positive activations in 32 equal bins of [0, maximum], float32 [m]."""
    maximum: torch.Tensor


def collect(
    lm: LM,
    sae: SAE,
    tokens: Tokens | torch.Tensor,
    latents: torch.Tensor | None = None,
    batch_rows: int | None = None,
    **choice: int,
) -> Contexts:
    """Contexts of an SAE's latents on rows of tokens, at the place that its origin says.

    tokens: [n_rows, context_size]. latents: [m], by default all. choice: fields of :class:`Choice`
    that are not to have their defaults. What a latent has too few contexts for stays empty. The
    result does not depend on batch_rows, but for the last bits of the model's sums.

    Raises ValueError if the SAE does not remember its place or if its width is not the site's, for
    latents that it does not have, for ids that are not of the model's vocabulary, and if all tokens
    are special.
    """
    return collect_many(lm, [sae], tokens, [latents], Choice(**choice), batch_rows)[0]


@torch.no_grad()
def collect_many(
    lm: LM,
    saes: Sequence[SAE],
    tokens: Tokens | torch.Tensor,
    latents: Sequence[torch.Tensor | None] | None = None,
    choice: Choice = Choice(),  # noqa: B008 (immutable)
    batch_rows: int | None = None,
) -> list[Contexts]:
    """:func:`collect` for several SAEs on one model, which reads the tokens once for all of them.
    latents: one entry an SAE."""
    stream = _Stream(lm, saes, as_tokens(tokens), batch_rows)
    latents = latents or [None] * len(saes)
    wanted = [_check(sae, some) for sae, some in zip(saes, latents, strict=True)]
    parts = [_part(sae, some, lm.device) for sae, some in zip(saes, wanted, strict=True)]
    choosers = [Chooser(len(some), stream.tokens, stream.keep, choice) for some in wanted]
    for rows, row, position, inputs in stream.passes("choosing contexts"):
        for part, x, some, chooser in zip(parts, inputs, wanted, choosers, strict=True):
            chooser.add(rows, _entries(part, x, some, row, position))
    readers = [
        _Reader(some, stream.tokens, chooser, choice)
        for some, chooser in zip(wanted, choosers, strict=True)
    ]
    for rows, row, position, inputs in stream.passes("reading contexts"):
        for part, x, some, reader in zip(parts, inputs, wanted, readers, strict=True):
            reader.add(rows, _entries(part, x, some, row, position))
    return [reader.contexts() for reader in readers]


@torch.no_grad()
def frequencies(lm: LM, saes: Sequence[SAE], tokens: Tokens | torch.Tensor) -> list[torch.Tensor]:
    """Share of tokens on which each latent of each SAE fires, float64 [d_sae]; their sum is L0.
    Raises as :func:`collect`."""
    stream = _Stream(lm, saes, as_tokens(tokens))
    fired = [torch.zeros(sae.d_sae, dtype=torch.float64) for sae in saes]
    for *_, inputs in stream.passes("counting"):
        for sae, x, own in zip(saes, inputs, fired, strict=True):
            x = x.to(sae.W_enc.device, sae.W_enc.dtype)
            latent = sae.encode(x, sparse=True).indices()[1]
            own += torch.bincount(latent.cpu(), minlength=sae.d_sae)
    return [own / stream.keep.sum() for own in fired]


# ---- the model and the SAE


def _check(sae: SAE, latents: torch.Tensor | None) -> torch.Tensor:
    latents = torch.arange(sae.d_sae) if latents is None else torch.as_tensor(latents).cpu().long()
    if latents.ndim != 1 or not len(latents) or not 0 <= latents.min() <= latents.max() < sae.d_sae:
        numbers = f"numbers from 0 to {sae.d_sae - 1}"
        raise ValueError(f"latents must be {numbers} in one dimension, got {latents.tolist()}")
    if len(latents.unique()) < len(latents):
        raise ValueError("latents names a latent twice: give latents.unique()")
    return latents


def _part(sae: SAE, latents: torch.Tensor, device: torch.device) -> SAE:
    """The SAE, with these latents alone where the others do not matter to them: TopK must see
    all."""
    # a subclass may encode in a way of its own
    if sae.k is None and type(sae) is SAE and len(latents) < sae.d_sae:
        at = latents.to(sae.W_enc.device)
        encoder, decoder = (sae.W_enc[:, at], sae.b_enc[at]), (sae.W_dec[at], sae.b_dec)
        sae = SAE(*encoder, *decoder, sae.threshold[at], origin=sae.origin)
    return on_device(sae, device)


def _entries(
    part: SAE, x: torch.Tensor, latents: torch.Tensor, row: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """All that is above 0 at the tokens of x, whose rows and positions are given, as entries;
    latent: the place in `latents`."""
    found = part.encode(x.to(part.W_enc.dtype), sparse=True)
    (token, latent), value = found.indices().cpu(), found.values().float().cpu()
    if part.d_sae > len(latents):
        place = torch.full((part.d_sae,), -1)
        place[latents] = torch.arange(len(latents))
        latent = place[latent]
    positive = (latent >= 0) & (value > 0)
    token, latent, value = (each[positive].numpy() for each in (token, latent, value))
    return entries_of(latent=latent, row=row[token], position=position[token], value=value)


class _Stream:
    """Activations of the model at the tokens kept, a batch of rows at a time, as often as asked
    for."""

    def __init__(self, lm: LM, saes: Sequence[SAE], tokens: Tokens, batch_rows: int | None = None):
        lm.check_ids(tokens.ids)
        self.lm, self.tokens, self.keep = lm, tokens, ~lm.is_special(tokens.ids)
        if not self.keep.any():
            raise ValueError("every token is a special one (BOS, EOS or pad): nothing to read")
        self.places = [place_of(sae) for sae in saes]
        self.batch_rows = batch_rows or lm.rows_at_once(tokens.ids.shape[1])
        self.fits = int(self.keep.sum()) * lm.d_model * len(set(self.places)) <= KEPT
        self.kept: dict[int, dict] = {}

    def passes(
        self, label: str
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray, list[torch.Tensor]]]:
        """Yields rows, the row and position of each token kept in them, [n], and its activations
        for each SAE, [n, d_in]."""
        starts = range(0, len(self.tokens), self.batch_rows)
        for start in tqdm(starts, desc=label, unit="batch", mininterval=1):
            rows = slice(start, min(start + self.batch_rows, len(self.tokens)))
            x = self.kept.get(start)
            if x is None:
                kept = self.keep[rows].to(self.lm.device)
                found = capture(self.lm, dict.fromkeys(self.places), self.tokens.ids[rows])
                x = {key: value[kept] for key, value in found.items()}
                if self.fits:
                    self.kept[start] = x
            row, position = self.keep[rows].numpy().nonzero()
            yield rows, row + start, position, [x[place] for place in self.places]


# ---- the second pass: reading


class _Reader:
    """Second pass: the histogram, and the activations in the windows chosen."""

    def __init__(self, latents: torch.Tensor, tokens: Tokens, chooser: Chooser, choice: Choice):
        m, n, w = len(latents), choice.slots, choice.window
        self.latents, self.tokens, self.chooser = latents, tokens, chooser
        chosen = chooser.chosen()
        self.chosen = chosen[np.argsort(chosen["row"], kind="stable")]
        self.offsets = np.arange(w) - w // 2
        self.histogram = torch.zeros(m * BINS, dtype=torch.int64)
        self.ids, self.acts = np.full((m, n, w), -1), np.zeros((m, n, w), np.float32)

    def add(self, rows: slice, entries: np.ndarray) -> None:
        """Take in what :meth:`Chooser.add` was given."""
        latent, value, m = entries["latent"], entries["value"], len(self.latents)
        share = value.astype(float) / self.chooser.maximum.numpy()[latent]
        bins = np.minimum((BINS * share).astype(np.int64), BINS - 1)
        self.histogram += torch.bincount(torch.from_numpy(latent * BINS + bins), minlength=m * BINS)

        codes = self.chooser.codes(entries)
        order = np.argsort(codes)
        # one entry beyond all others, so that looking up never leaves the array
        codes, value = np.append(codes[order], -1), np.append(value[order], 0)
        here = self.chosen[slice(*np.searchsorted(self.chosen["row"], [rows.start, rows.stop]))]
        row, latent = here["row"][:, None], here["latent"][:, None]
        places, length = here["position"][:, None] + self.offsets, self.tokens.ids.shape[1]
        inside = (places >= 0) & (places < length)
        places = places.clip(0, length - 1)
        asked = code(row, latent, places, m, length)
        at = np.searchsorted(codes[:-1], asked)
        to = here["latent"], here["slot"]
        self.acts[to] = np.where(inside & (codes[at] == asked), value[at], 0)
        self.ids[to] = np.where(inside, self.tokens.ids.numpy()[row, places], -1)

    def contexts(self) -> Contexts:
        where = {}
        for name, empty in (("quantile", EMPTY), ("row", -1), ("position", -1)):
            where[name] = np.full(self.ids.shape[:2], empty)
            where[name][self.chosen["latent"], self.chosen["slot"]] = self.chosen[name]
        quantile, row, position = map(torch.from_numpy, where.values())
        return Contexts(
            self.latents,
            torch.from_numpy(self.ids),
            torch.from_numpy(self.acts),
            quantile,
            torch.where(row >= 0, self.tokens.document[row.clamp_min(0)], -1),
            row,
            position,
            self.chooser.fired.double() / self.chooser.keep.sum(),
            self.histogram.view(-1, BINS),
            self.chooser.maximum,
        )
