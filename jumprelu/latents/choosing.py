"""Which positions become contexts of a latent: running top-k and reservoirs.

Random choices follow a hash of (seed, latent, row, position), so they do not depend on the size of
the batches.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..corpus import Tokens

OVERSAMPLE = 4
"""The reservoir behind the quantile bins holds this many times the contexts asked of them."""
WAITING = 2**15
"""New entries are sorted in among those kept when there are this many, or half as many as are
kept."""
ATTEMPTS = 4
"""Places in a row at which a silent window is looked for."""

TOP, NEGATIVE, EMPTY = 0, -1, -2
"""Values of `Contexts.quantile` beside the numbers of bins, 1 and up."""

NUMBERS = ("latent", "row", "position", "slot", "quantile")
ENTRY = np.dtype([("value", "f4"), ("order", "f8"), *((name, "i8") for name in NUMBERS)])
"""A position at which a latent may have a context. order: what is kept first; slot, quantile: known
once it is chosen."""


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
        counts = self.top, self.quantiles, self.per_quantile, self.negatives
        if min(counts) < 0 or self.window < 1 or self.slots < 1:
            raise ValueError(f"expected counts of at least 0, one of them above, got {self}")

    @property
    def slots(self) -> int:
        return self.top + self.quantiles * self.per_quantile + self.negatives


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


def entries_of(**columns: np.ndarray) -> np.ndarray:
    """Entries, [n], with these columns, [n] each; 0 in the others."""
    found = np.zeros(len(columns["latent"]), ENTRY)
    for name, column in columns.items():
        found[name] = column
    return found


def code(
    row: np.ndarray, latent: np.ndarray, position: np.ndarray, latents: int, length: int
) -> np.ndarray:
    """One number for (row, latent, position), ascending in this order."""
    return (row * latents + latent) * length + position


def _ordered(entries: np.ndarray, *by: str) -> np.ndarray:
    """Entries sorted by the columns `by`, the first one first."""
    return entries[np.lexsort([entries[name] for name in reversed(by)])]


def _rank(group: np.ndarray) -> np.ndarray:
    """Number of each place within its run of equal values; group: sorted."""
    return np.arange(len(group)) - np.searchsorted(group, group)


class Least:
    """Of all entries, the `size` of each latent that come first in `order`, ties by row and
    position; one a document where `document`, the number of each row's, is given."""

    def __init__(self, latents: int, size: int, document: np.ndarray | None = None):
        self.size, self.document = size, document
        # what does not come before the bar can no longer get in
        self.bar = np.full(latents, np.inf if size else -np.inf)
        self.kept, self.waiting = np.zeros(0, ENTRY), []

    def add(self, entries: np.ndarray) -> None:
        self.waiting.append(entries[entries["order"] < self.bar[entries["latent"]]])
        if sum(map(len, self.waiting)) > max(WAITING, len(self.kept) // 2):
            self.settle()

    def settle(self) -> np.ndarray:
        """What is kept, by latent and then in order."""
        entries = np.concatenate([self.kept, *self.waiting])
        entries = _ordered(entries, "latent", "order", "row", "position")
        if self.document is not None:
            entries = first_of_each_document(entries, entries["latent"], self.document)
        rank = _rank(entries["latent"])
        last = entries[rank == self.size - 1]
        self.bar[last["latent"]] = last["order"]
        self.kept, self.waiting = entries[rank < self.size], []
        return self.kept


def first_of_each_document(
    entries: np.ndarray, group: np.ndarray, document: np.ndarray
) -> np.ndarray:
    """The first entry of each group and document, in the order given. document: of each row."""
    key = group * (document.max(initial=0) + 1) + document[entries["row"]]
    return entries[np.sort(np.unique(key, return_index=True)[1])]


class Chooser:
    """First pass: which positions become contexts, and what is counted for each latent.

    tokens: [rows, length]; keep: which of them are no special ones.
    """

    def __init__(self, latents: int, tokens: Tokens, keep: torch.Tensor, choice: Choice):
        self.document = tokens.document.unique(return_inverse=True)[1].numpy()
        self.choice, self.keep, self.length = choice, keep.numpy(), tokens.ids.shape[1]
        self.maximum, self.fired = torch.zeros(latents), torch.zeros(latents, dtype=torch.int64)
        self.top = Least(latents, choice.top, self.document)
        self.positive = Least(latents, OVERSAMPLE * choice.quantiles * choice.per_quantile)
        self.silent = Least(latents, choice.negatives, self.document)

    def add(self, rows: slice, entries: np.ndarray) -> None:
        """Take in all that is active in some rows."""
        latent, value = (torch.from_numpy(entries[name].copy()) for name in ("latent", "value"))
        self.fired += torch.bincount(latent, minlength=len(self.fired))
        self.maximum.scatter_reduce_(0, latent, value, "amax")
        entries["order"] = -entries["value"]
        self.top.add(entries)
        where = (entries[name] for name in ("latent", "row", "position"))
        entries["order"] = uniform(self.choice.seed, 0, *where)
        self.positive.add(entries)
        if self.choice.negatives:
            self._add_silent(rows, np.sort(self.codes(entries)))

    def codes(self, entries: np.ndarray) -> np.ndarray:
        where = entries["row"], entries["latent"], entries["position"]
        return code(*where, len(self.fired), self.length)

    def _add_silent(self, rows: slice, codes: np.ndarray) -> None:
        """In each row, one window in which a latent is silent; codes: where one is active."""
        seed, keep = self.choice.seed, self.keep[rows]
        row, latent = (grid.ravel() for grid in np.indices((len(keep), len(self.fired))))
        order = uniform(seed, 1, latent, row + rows.start)
        count = keep.sum(1)[row]
        may = (order < self.silent.bar[latent]) & (count > 0)
        row, latent, order, count = row[may], latent[may], order[may], count[may]
        kept_first = np.argsort(~keep, axis=1, kind="stable")
        found = np.full(len(row), -1)
        before, after = self.choice.window // 2, (self.choice.window - 1) // 2
        for attempt in range(ATTEMPTS):
            drawn = uniform(seed, 2 + attempt, latent, row + rows.start) * count
            position = kept_first[row, drawn.astype(np.int64)]
            low = np.maximum(position - before, 0)
            high = np.minimum(position + after, self.length - 1)
            first = code(row + rows.start, latent, low, len(self.fired), self.length)
            begin = np.searchsorted(codes, first)
            silent = begin == np.searchsorted(codes, first + high - low, side="right")
            found = np.where((found < 0) & silent, position, found)
        entries = entries_of(latent=latent, order=order, row=row + rows.start, position=found)
        self.silent.add(entries[found >= 0])

    def chosen(self) -> np.ndarray:
        """Entries of every context, with their slots and quantiles."""
        choice, top, silent = self.choice, self.top.settle(), self.silent.settle()
        top["slot"], top["quantile"] = _rank(top["latent"]), TOP
        first = choice.slots - choice.negatives
        silent["slot"], silent["quantile"] = first + _rank(silent["latent"]), NEGATIVE
        return np.concatenate([top, self._from_bins(top), silent])

    def _from_bins(self, top: np.ndarray) -> np.ndarray:
        """What is drawn from each bin of positive activations, without what is among the top."""
        choice, sample = self.choice, self.positive.settle()
        falling = sample["position"], sample["row"], -sample["value"], sample["latent"]
        sample = sample[np.lexsort(falling)]
        size = np.bincount(sample["latent"], minlength=len(self.fired))[sample["latent"]]
        sample["quantile"] = 1 + _rank(sample["latent"]) * choice.quantiles // np.maximum(size, 1)
        sample = sample[~np.isin(self.codes(sample), self.codes(top))]
        sample = _ordered(sample, "latent", "quantile", "order")
        group = sample["latent"] * (choice.quantiles + 1) + sample["quantile"]
        sample = first_of_each_document(sample, group, self.document)
        rank = _rank(sample["latent"] * (choice.quantiles + 1) + sample["quantile"])
        sample["slot"] = choice.top + (sample["quantile"] - 1) * choice.per_quantile + rank
        return sample[rank < choice.per_quantile]
