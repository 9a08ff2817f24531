"""Which positions become contexts of a latent: running top-k and reservoirs.

Random choices follow a hash of (seed, latent, row, position), so they do not depend on the size of
the batches.
"""

from __future__ import annotations

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

Columns = dict[str, np.ndarray]
"""A table: arrays of one length by name."""


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
            raise ValueError(
                "expected counts of at least 0, one of them above, and a window of at least 1, got "
                f"{self}"
            )

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


def take(columns: Columns, rows: np.ndarray | slice) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def ordered(columns: Columns, *by: str) -> Columns:
    """Rows sorted by the columns `by`, the first one first."""
    return take(columns, np.lexsort([columns[name] for name in reversed(by)]))


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


def code(
    row: np.ndarray, latent: np.ndarray, position: np.ndarray, latents: int, length: int
) -> np.ndarray:
    """One number for (row, latent, position), ascending in this order."""
    return (row.astype(np.int64) * latents + latent) * length + position


class Least:
    """Of all entries, the `size` of each latent that come first in `order`, ties by row and
    position; one a document if asked."""

    COLUMNS = ("latent", "order", "row", "position", "value")

    def __init__(self, latents: int, size: int, document: np.ndarray | None = None):
        self.size, self.document = size, document  # document: of each row
        # what does not come before the bar can no longer get in
        self.bar = np.full(latents, np.inf if size else -np.inf)
        types = (np.int64, float, np.int64, np.int64, float)
        self.kept = {name: np.zeros(0, t) for name, t in zip(self.COLUMNS, types, strict=True)}
        self.waiting: list[Columns] = []

    def may_enter(self, latent: np.ndarray, order: np.ndarray) -> np.ndarray:
        return order < self.bar[latent]

    def add(self, **columns: np.ndarray) -> None:
        enter = self.may_enter(columns["latent"], columns["order"])
        if enter.any():
            self.waiting.append({name: columns[name][enter] for name in self.COLUMNS})
        new = sum(len(columns["latent"]) for columns in self.waiting)
        if new > max(WAITING, len(self.kept["latent"]) // 2):
            self.settle()

    def settle(self) -> Columns:
        """What is kept, by latent and then in order."""
        columns = {
            name: np.concatenate([self.kept[name], *(new[name] for new in self.waiting)])
            for name in self.COLUMNS
        }
        self.waiting = []
        columns = ordered(columns, "latent", "order", "row", "position")
        if self.document is not None:
            first = _first_of(columns["latent"], self.document[columns["row"]])
            columns = take(columns, first)
        rank = _rank(columns["latent"])
        last = rank == self.size - 1
        self.bar[columns["latent"][last]] = columns["order"][last]
        self.kept = take(columns, rank < self.size)
        return self.kept


class Chooser:
    """First pass: which positions become contexts, and what is counted for each latent.

    tokens: [rows, length]; keep: which of them are no special ones.
    """

    def __init__(self, latents: int, tokens: Tokens, keep: torch.Tensor, choice: Choice):
        document = tokens.document.numpy()
        self.choice, self.keep, self.length = choice, keep.numpy(), tokens.ids.shape[1]
        self.maximum, self.fired = torch.zeros(latents), torch.zeros(latents, dtype=torch.int64)
        self.top = Least(latents, choice.top, document)
        self.positive = Least(latents, OVERSAMPLE * choice.quantiles * choice.per_quantile)
        self.silent = Least(latents, choice.negatives, document)

    def add(self, rows: slice, token: np.ndarray, latent: np.ndarray, value: np.ndarray) -> None:
        """Take in all that is active in some rows: number of the token among those kept, latent,
        activation; each [entries]."""
        row, position = (place[token] for place in self.keep[rows].nonzero())
        codes = np.sort(code(row, latent, position, len(self.fired), self.length))
        entries = {"latent": latent, "row": row + rows.start, "position": position, "value": value}
        self.fired += torch.bincount(torch.from_numpy(latent), minlength=len(self.fired))
        self.maximum.scatter_reduce_(0, torch.from_numpy(latent), torch.from_numpy(value), "amax")
        self.top.add(order=-value.astype(float), **entries)
        order = uniform(self.choice.seed, 0, latent, entries["row"], position)
        self.positive.add(order=order, **entries)
        if self.choice.negatives:
            self._add_silent(rows, codes)

    def _add_silent(self, rows: slice, codes: np.ndarray) -> None:
        """In each row, one window in which a latent is silent; codes: where one is active."""
        seed, count = self.choice.seed, self.keep[rows].sum(1)
        row, latent = (grid.ravel() for grid in np.indices((len(count), len(self.fired))))
        order = uniform(seed, 1, latent, row + rows.start)
        may = self.silent.may_enter(latent, order) & (count[row] > 0)
        row, latent, order = row[may], latent[may], order[may]
        kept_first = np.argsort(~self.keep[rows], axis=1, kind="stable")
        found = np.full(len(row), -1)
        before, after = self.choice.window // 2, (self.choice.window - 1) // 2
        for attempt in range(ATTEMPTS):
            drawn = uniform(seed, 2 + attempt, latent, row + rows.start) * count[row]
            position = kept_first[row, drawn.astype(np.int64)]
            low = np.maximum(position - before, 0)
            high = np.minimum(position + after, self.length - 1)
            first = code(row, latent, low, len(self.fired), self.length)
            begin = np.searchsorted(codes, first)
            silent = begin == np.searchsorted(codes, first + high - low, side="right")
            found = np.where((found < 0) & silent, position, found)
        columns = {"latent": latent, "order": order, "row": row + rows.start, "position": found}
        columns["value"] = np.zeros(len(found))
        self.silent.add(**take(columns, found >= 0))

    def chosen(self) -> Columns:
        """Columns latent, slot, quantile, row, position of every context."""
        choice, top, silent = self.choice, self.top.settle(), self.silent.settle()
        last = choice.slots - choice.negatives
        parts = [
            self._placed(top, 0, TOP),
            self._from_bins(top),
            self._placed(silent, last, NEGATIVE),
        ]
        names = ("latent", "slot", "quantile", "row", "position")
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _placed(self, columns: Columns, first: int, quantile: int) -> Columns:
        """With the slots from `first` on, in order."""
        slot = first + _rank(columns["latent"])
        return {**columns, "slot": slot, "quantile": np.full(len(slot), quantile)}

    def _from_bins(self, top: Columns) -> Columns:
        """What is drawn from each bin of positive activations, without what is among the top."""
        choice, sample = self.choice, dict(self.positive.settle())
        sample["falling"] = -sample["value"]
        sample = ordered(sample, "latent", "falling", "row", "position")
        size = np.bincount(sample["latent"], minlength=len(self.fired))[sample["latent"]]
        sample["quantile"] = 1 + _rank(sample["latent"]) * choice.quantiles // np.maximum(size, 1)
        sample = take(sample, ~np.isin(self._codes(sample), self._codes(top)))
        sample = ordered(sample, "latent", "quantile", "order")
        document = self.top.document[sample["row"]]
        sample = take(sample, _first_of(sample["latent"], sample["quantile"], document))
        rank = _rank(sample["latent"] * (choice.quantiles + 1) + sample["quantile"])
        sample["slot"] = choice.top + (sample["quantile"] - 1) * choice.per_quantile + rank
        return take(sample, rank < choice.per_quantile)

    def _codes(self, columns: Columns) -> np.ndarray:
        where = columns["row"], columns["latent"], columns["position"]
        return code(*where, len(self.fired), self.length)
