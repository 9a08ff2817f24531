"""Contexts of latents: the windows of text in which each is most active, less active, and silent.

Notable here:
- two passes over the tokens, a batch of rows at a time. The first chooses positions: running top-k
  and reservoirs, a few numbers each. The second counts the histogram, which needs the maximum, and
  reads the activations around what was chosen. Activations of the model are kept in between while
  they fit (`KEPT`), and else computed again.
- memory: what is chosen, and one batch. Never [tokens, d_sae] of all tokens.
- random choices follow a hash of (seed, latent, row, position), so they do not depend on the size
  of the batches.
- BOS, EOS and padding give no activation and are nobody's centre, as everywhere in this package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..corpus import Tokens, as_tokens
from ..lm import LM
from ..sae import SAE
from ..sites import Key, capture

BINS = 32
"""Bins of the histogram."""
KEPT = 2**26
"""Numbers of the model's activations that are kept between the passes (256 MiB in float32); beyond,
they are computed twice."""
OVERSAMPLE = 4
"""The reservoir behind the quantile bins holds this many times the contexts asked of them."""
WAITING = 2**15
"""New entries are sorted in among those kept when there are this many, or half as many as are
kept."""
ATTEMPTS = 4
"""Places in a row at which a silent window is looked for."""

TOP, NEGATIVE, EMPTY = 0, -1, -2
"""Values of `Contexts.quantile` beside the numbers of bins, 1 and up."""


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
    """int64 [m, n]; −1 in empty slots, as are the next two."""
    row: torch.Tensor
    """int64 [m, n]: row of the tokens given."""
    position: torch.Tensor
    """int64 [m, n]: position in the row of the window's centre, its token number w // 2."""
    frequency: torch.Tensor
    """float64 [m]: share of tokens with activation > 0."""
    histogram: torch.Tensor
    """int64 [m, 32]: counts of positive activations in 32 equal bins of [0, maximum]."""
    maximum: torch.Tensor
    """float32 [m]."""


@dataclass(frozen=True)
class Choice:
    """Which contexts to collect, for each latent."""

    top: int = 10
    """Of greatest activation, one a document."""
    quantiles: int = 5
    """Bins of equal count of the positive activations: of all if there are few, else of a random
    sample of them."""
    per_quantile: int = 4
    """Drawn at random from each bin, one a document, and none that is a top context."""
    negatives: int = 10
    """Drawn at random, one a document, with the latent silent in the whole window."""
    window: int = 33
    """Tokens; the centre is number window // 2."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name) for name in ("top", "quantiles", "per_quantile", "negatives")
        }
        if min(counts.values()) < 0 or self.window < 1 or self.slots < 1:
            raise ValueError(
                f"expected counts of at least 0, one of them above, and a window of at least 1, got {self}"
            )

    @property
    def slots(self) -> int:
        return self.top + self.quantiles * self.per_quantile + self.negatives


def collect(
    lm: LM,
    sae: SAE,
    tokens: Tokens | torch.Tensor,
    site: str | None = None,
    layer: int | None = None,
    latents: torch.Tensor | None = None,
    top: int = 10,
    quantiles: int = 5,
    per_quantile: int = 4,
    negatives: int = 10,
    window: int = 33,
    seed: int = 0,
    batch_rows: int | None = None,
) -> Contexts:
    """Contexts of an SAE's latents on rows of tokens; see :class:`Choice` for the numbers and
    :class:`Contexts` for the result.

    tokens: [n_rows, context_size]. site, layer: by default where the SAE was trained. latents: [m],
    by default all. What a latent has too few contexts for stays empty. The result does not depend
    on batch_rows, but for the last bits of the model's sums.

    Raises ValueError if the SAE does not remember its place and none is given or if its width is
    not the site's, for latents that it does not have, for ids that are not of the model's
    vocabulary, and if all tokens are special.
    """
    choice = Choice(top, quantiles, per_quantile, negatives, window, seed)
    return collect_many(lm, [sae], tokens, site, layer, [latents], choice, batch_rows)[0]


@torch.no_grad()
def collect_many(
    lm: LM,
    saes: Sequence[SAE],
    tokens: Tokens | torch.Tensor,
    site: str | None = None,
    layer: int | None = None,
    latents: Sequence[torch.Tensor | None] | None = None,
    choice: Choice = Choice(),  # noqa: B008 (immutable)
    batch_rows: int | None = None,
) -> list[Contexts]:
    """:func:`collect` for several SAEs on one model, which reads the tokens once for all of them.
    latents: one entry an SAE."""
    tokens = as_tokens(tokens)
    lm.check_ids(tokens.ids)
    if not len(saes):
        return []
    batch_rows = batch_rows or lm.rows_at_once(tokens.ids.shape[1])
    places = [_place(sae, site, layer) for sae in saes]
    wanted = [
        _check(sae, some) for sae, some in zip(saes, latents or [None] * len(saes), strict=True)
    ]
    parts = [_part(sae, some, lm.device) for sae, some in zip(saes, wanted, strict=True)]
    keep = ~torch.isin(tokens.ids, torch.tensor(lm.special_ids))
    if not keep.any():
        raise ValueError("every token is a special one (BOS, EOS or pad): no context to collect")
    stream = _Stream(lm, tokens.ids, keep, list(dict.fromkeys(places)), batch_rows)
    choosers = [_Chooser(len(some), tokens, keep, choice) for some in wanted]
    for rows, x in stream.passes("choosing contexts"):
        for part, place, some, chooser in zip(parts, places, wanted, choosers, strict=True):
            chooser.add(rows, *_entries(part, x[place], some))
    readers = [
        _Reader(some, tokens, chooser, choice)
        for some, chooser in zip(wanted, choosers, strict=True)
    ]
    for rows, x in stream.passes("reading contexts"):
        for part, place, some, reader in zip(parts, places, wanted, readers, strict=True):
            reader.add(rows, keep[rows], *_entries(part, x[place], some))
    return [reader.contexts() for reader in readers]


@torch.no_grad()
def frequencies(
    lm: LM,
    saes: Sequence[SAE],
    tokens: Tokens | torch.Tensor,
    site: str | None = None,
    layer: int | None = None,
    batch_rows: int | None = None,
) -> list[torch.Tensor]:
    """Share of tokens on which each latent of each SAE fires, float64 [d_sae]; their sum is L0.
    Raises as :func:`collect`."""
    tokens = as_tokens(tokens)
    lm.check_ids(tokens.ids)
    places = [_place(sae, site, layer) for sae in saes]
    keep = ~torch.isin(tokens.ids, torch.tensor(lm.special_ids))
    batch_rows = batch_rows or lm.rows_at_once(tokens.ids.shape[1])
    fired = [torch.zeros(sae.d_sae, dtype=torch.float64) for sae in saes]
    for _, x in _Stream(lm, tokens.ids, keep, list(dict.fromkeys(places)), batch_rows).passes(
        "counting"
    ):
        for sae, place, own in zip(saes, places, fired, strict=True):
            found = sae.encode(
                x[place].to(sae.W_enc.device, sae.W_enc.dtype), sparse=True
            ).indices()[1]
            own += torch.bincount(found.cpu(), minlength=sae.d_sae)
    return [own / keep.sum() for own in fired]


# ---- the model and the SAE


def _place(sae: SAE, site: str | None, layer: int | None) -> Key:
    site, layer = site or sae.origin.site, sae.origin.layer if layer is None else layer
    if site is None or layer is None:
        raise ValueError(
            "this SAE does not remember where it was trained: give collect(..., site=..., layer=...)"
        )
    return site, layer


def _check(sae: SAE, latents: torch.Tensor | None) -> torch.Tensor:
    latents = torch.arange(sae.d_sae) if latents is None else torch.as_tensor(latents).cpu().long()
    if latents.ndim != 1 or not len(latents) or not 0 <= latents.min() <= latents.max() < sae.d_sae:
        raise ValueError(
            f"latents must be numbers from 0 to {sae.d_sae - 1} in one dimension, got {latents.tolist()}"
        )
    if len(latents.unique()) < len(latents):
        raise ValueError("latents names a latent twice: give latents.unique()")
    return latents


def _part(sae: SAE, latents: torch.Tensor, device: torch.device) -> SAE:
    """The SAE, with these latents alone where the others do not matter to them: TopK must see
    all."""
    if (
        sae.k is None and type(sae) is SAE and len(latents) < sae.d_sae
    ):  # others may encode in a way of their own
        at = latents.to(sae.W_enc.device)
        sae = SAE(
            sae.W_enc[:, at],
            sae.b_enc[at],
            sae.W_dec[at],
            sae.b_dec,
            sae.threshold[at],
            origin=sae.origin,
        )
    return sae if sae.W_enc.device == device else copy.deepcopy(sae).to(device)


def _entries(
    part: SAE, x: torch.Tensor, latents: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of the token among those of x, place of the latent in `latents`, activation; of all
    that is above 0."""
    found = part.encode(x.to(part.W_enc.dtype), sparse=True)
    (token, latent), value = found.indices().cpu(), found.values().float().cpu()
    if part.d_sae > len(latents):
        place = torch.full((part.d_sae,), -1)
        place[latents] = torch.arange(len(latents))
        latent = place[latent]
    positive = (latent >= 0) & (value > 0)
    return token[positive].numpy(), latent[positive].numpy(), value[positive].numpy()


class _Stream:
    """Activations of the model at the tokens kept, a batch of rows at a time, as often as asked
    for."""

    def __init__(
        self, lm: LM, ids: torch.Tensor, keep: torch.Tensor, places: list[Key], batch_rows: int
    ):
        self.lm, self.ids, self.keep, self.places, self.batch_rows = (
            lm,
            ids,
            keep,
            places,
            batch_rows,
        )
        self.fits = int(keep.sum()) * lm.d_model * len(places) <= KEPT
        self.kept: dict[int, dict[Key, torch.Tensor]] = {}

    def passes(self, label: str) -> Iterator[tuple[slice, dict[Key, torch.Tensor]]]:
        for start in tqdm(
            range(0, len(self.ids), self.batch_rows), desc=label, unit="batch", mininterval=1
        ):
            rows = slice(start, min(start + self.batch_rows, len(self.ids)))
            x = self.kept.get(start)
            if x is None:
                kept = self.keep[rows].to(self.lm.device)
                x = {
                    key: value[kept]
                    for key, value in capture(self.lm, self.places, self.ids[rows]).items()
                }
                if self.fits:
                    self.kept[start] = x
            yield rows, x


# ---- the first pass: choosing


def uniform(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seed and on integers, alike in every order of asking.

    Source: the mixing function of SplitMix64, Steele, Lea and Flood 2014, one round a part.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
        for part in parts:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)) * 2.0**-53


class _Least:
    """Of all entries, the `size` of each latent that come first in `order`, ties by row and
    position; one a document if asked."""

    COLUMNS = ("latent", "order", "row", "position", "value")

    def __init__(self, latents: int, size: int, document: np.ndarray | None = None):
        self.size, self.document = size, document  # document: of each row
        self.bar = np.full(
            latents, np.inf if size else -np.inf
        )  # what does not come before it can no longer get in
        self.kept = {
            name: np.zeros(0, float if name in ("order", "value") else np.int64)
            for name in self.COLUMNS
        }
        self.waiting: list[dict[str, np.ndarray]] = []

    def may_enter(self, latent: np.ndarray, order: np.ndarray) -> np.ndarray:
        return order < self.bar[latent]

    def add(self, **columns: np.ndarray) -> None:
        enter = self.may_enter(columns["latent"], columns["order"])
        if enter.any():
            self.waiting.append({name: columns[name][enter] for name in self.COLUMNS})
        if sum(len(new["latent"]) for new in self.waiting) > max(
            WAITING, len(self.kept["latent"]) // 2
        ):
            self.settle()

    def settle(self) -> dict[str, np.ndarray]:
        """What is kept, by latent and then in order."""
        merged = {
            name: np.concatenate([self.kept[name], *(new[name] for new in self.waiting)])
            for name in self.COLUMNS
        }
        self.waiting = []
        merged = _take(
            merged,
            np.lexsort((merged["position"], merged["row"], merged["order"], merged["latent"])),
        )
        if self.document is not None:
            merged = _take(merged, _first_of(merged["latent"], self.document[merged["row"]]))
        rank = _rank(merged["latent"])
        last = rank == self.size - 1
        self.bar[merged["latent"][last]] = merged["order"][last]
        self.kept = _take(merged, rank < self.size)
        return self.kept


def _take(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


def _first_of(*columns: np.ndarray) -> np.ndarray:
    """Places of the first of each combination of values, ascending."""
    if not len(columns[0]):
        return np.zeros(0, np.int64)
    order = np.lexsort(columns)  # stable
    new = np.zeros(len(order), bool)
    new[0] = True
    for column in columns:
        new[1:] |= column[order][1:] != column[order][:-1]
    return np.sort(order[new])


def _rank(group: np.ndarray) -> np.ndarray:
    """Number of each place within its run of equal values; group: sorted."""
    return np.arange(len(group)) - np.searchsorted(group, group)


class _Chooser:
    """First pass: which positions become contexts, and what is counted for each latent."""

    def __init__(self, latents: int, tokens: Tokens, keep: torch.Tensor, choice: Choice):
        document = tokens.document.numpy()
        self.choice, self.keep, self.length = choice, keep.numpy(), tokens.ids.shape[1]
        self.maximum, self.fired = torch.zeros(latents), torch.zeros(latents, dtype=torch.int64)
        self.top = _Least(latents, choice.top, document)
        self.positive = _Least(latents, OVERSAMPLE * choice.quantiles * choice.per_quantile)
        self.silent = _Least(latents, choice.negatives, document)

    def add(self, rows: slice, token: np.ndarray, latent: np.ndarray, value: np.ndarray) -> None:
        row, position = (place[token] for place in self.keep[rows].nonzero())
        codes = np.sort(_code(row, latent, position, len(self.fired), self.length))
        entries = {"latent": latent, "row": row + rows.start, "position": position, "value": value}
        self.fired += torch.bincount(torch.from_numpy(latent), minlength=len(self.fired))
        self.maximum.scatter_reduce_(0, torch.from_numpy(latent), torch.from_numpy(value), "amax")
        self.top.add(order=-value.astype(float), **entries)
        self.positive.add(
            order=uniform(self.choice.seed, 0, latent, entries["row"], position), **entries
        )
        if self.choice.negatives:
            self._add_silent(rows, codes)

    def _add_silent(self, rows: slice, codes: np.ndarray) -> None:
        seed, count = self.choice.seed, self.keep[rows].sum(1)
        row, latent = (grid.ravel() for grid in np.indices((len(count), len(self.fired))))
        order = uniform(seed, 1, latent, row + rows.start)
        may = self.silent.may_enter(latent, order) & (count[row] > 0)
        row, latent, order = row[may], latent[may], order[may]
        ordinary = np.argsort(
            ~self.keep[rows], axis=1, kind="stable"
        )  # first the positions that are no special tokens
        found = np.full(len(row), -1)
        before, after = self.choice.window // 2, (self.choice.window - 1) // 2
        for attempt in range(ATTEMPTS):
            position = ordinary[
                row,
                (uniform(seed, 2 + attempt, latent, row + rows.start) * count[row]).astype(
                    np.int64
                ),
            ]
            low, high = (
                np.maximum(position - before, 0),
                np.minimum(position + after, self.length - 1),
            )
            first = _code(row, latent, low, len(self.fired), self.length)
            silent = np.searchsorted(codes, first) == np.searchsorted(
                codes, first + high - low, side="right"
            )
            found = np.where((found < 0) & silent, position, found)
        some = found >= 0
        self.silent.add(
            latent=latent[some],
            order=order[some],
            row=row[some] + rows.start,
            position=found[some],
            value=np.zeros(some.sum()),
        )

    def chosen(self) -> dict[str, np.ndarray]:
        """Columns latent, slot, quantile, row, position of every context."""
        choice, top, silent = self.choice, self.top.settle(), self.silent.settle()
        drawn, last = self._from_bins(top), choice.slots - choice.negatives
        parts = [
            {**top, "slot": _rank(top["latent"]), "quantile": np.full(len(top["row"]), TOP)},
            drawn,
            {
                **silent,
                "slot": last + _rank(silent["latent"]),
                "quantile": np.full(len(silent["row"]), NEGATIVE),
            },
        ]
        names = ("latent", "slot", "quantile", "row", "position")
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _from_bins(self, top: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        choice, sample = self.choice, self.positive.settle()
        sample = _take(
            sample,
            np.lexsort((sample["position"], sample["row"], -sample["value"], sample["latent"])),
        )
        size = np.bincount(sample["latent"], minlength=len(self.fired))[sample["latent"]]
        sample["quantile"] = 1 + _rank(sample["latent"]) * choice.quantiles // np.maximum(size, 1)
        places = [
            _code(
                columns["row"], columns["latent"], columns["position"], len(self.fired), self.length
            )
            for columns in (sample, top)
        ]
        sample = _take(sample, ~np.isin(*places))
        sample = _take(sample, np.lexsort((sample["order"], sample["quantile"], sample["latent"])))
        sample = _take(
            sample,
            _first_of(sample["latent"], sample["quantile"], self.top.document[sample["row"]]),
        )
        bins = sample["latent"] * (choice.quantiles + 1) + sample["quantile"]
        sample["slot"] = choice.top + (sample["quantile"] - 1) * choice.per_quantile + _rank(bins)
        return _take(sample, _rank(bins) < choice.per_quantile)


def _code(
    row: np.ndarray, latent: np.ndarray, position: np.ndarray, latents: int, length: int
) -> np.ndarray:
    """One number for (row, latent, position), ascending in this order."""
    return (row.astype(np.int64) * latents + latent) * length + position


# ---- the second pass: reading


class _Reader:
    """Second pass: the histogram, and the activations in the windows chosen."""

    def __init__(self, latents: torch.Tensor, tokens: Tokens, chooser: _Chooser, choice: Choice):
        m, n, w = len(latents), choice.slots, choice.window
        chosen = chooser.chosen()
        self.latents, self.tokens, self.chooser, self.length = (
            latents,
            tokens,
            chooser,
            tokens.ids.shape[1],
        )
        self.chosen = _take(chosen, np.argsort(chosen["row"], kind="stable"))
        self.offsets = np.arange(w) - w // 2
        self.histogram = torch.zeros(m * BINS, dtype=torch.int64)
        self.ids, self.acts = torch.full((m, n, w), -1), torch.zeros(m, n, w)
        self.quantile, self.row, self.position = (
            torch.full((m, n), value) for value in (EMPTY, -1, -1)
        )
        at = torch.from_numpy(chosen["latent"]), torch.from_numpy(chosen["slot"])
        for name in ("quantile", "row", "position"):
            getattr(self, name)[at] = torch.from_numpy(chosen[name])

    def add(
        self,
        rows: slice,
        keep: torch.Tensor,
        token: np.ndarray,
        latent: np.ndarray,
        value: np.ndarray,
    ) -> None:
        m = len(self.latents)
        top = self.chooser.maximum.numpy()[latent]
        bins = np.minimum((BINS * (value.astype(float) / top)).astype(np.int64), BINS - 1)
        self.histogram += torch.bincount(torch.from_numpy(latent * BINS + bins), minlength=m * BINS)

        row, position = (place[token] for place in keep.numpy().nonzero())
        codes = _code(row, latent, position, m, self.length)
        order = np.argsort(codes)
        codes, value = codes[order], value[order]
        start, end = np.searchsorted(self.chosen["row"], [rows.start, rows.stop])
        here = _take(self.chosen, slice(start, end))
        places = here["position"][:, None] + self.offsets
        inside = (places >= 0) & (places < self.length)
        places = places.clip(0, self.length - 1)
        asked = _code(
            here["row"][:, None] - rows.start, here["latent"][:, None], places, m, self.length
        )
        at = np.searchsorted(codes, asked).clip(max=max(len(codes) - 1, 0))
        fires = inside & (codes[at] == asked) if len(codes) else np.zeros_like(inside)
        acts = np.where(fires, value[at], 0) if len(codes) else np.zeros(asked.shape)
        ids = np.where(inside, self.tokens.ids.numpy()[here["row"][:, None], places], -1)
        to = torch.from_numpy(here["latent"]), torch.from_numpy(here["slot"])
        self.acts[to], self.ids[to] = torch.from_numpy(acts).float(), torch.from_numpy(ids)

    def contexts(self) -> Contexts:
        document = torch.where(self.row >= 0, self.tokens.document[self.row.clamp_min(0)], -1)
        return Contexts(
            self.latents,
            self.ids,
            self.acts,
            self.quantile,
            document,
            self.row,
            self.position,
            self.chooser.fired.double() / self.chooser.keep.sum(),
            self.histogram.view(-1, BINS),
            self.chooser.maximum,
        )
