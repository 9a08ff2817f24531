"""An n-gram language model: interpolated modified Kneser-Ney, trained with nothing but sorted
integers.

Notable here:
- a context of k symbols is the id of the context of k − 1 symbols and one older symbol, so a key
  never needs more than (number of contexts) · (vocabulary) and any order and vocabulary fit 64
  bits.
- down to the uniform distribution it is interpolation all the way: p sums to 1 over the vocabulary
  for every context, seen or not, and no symbol has probability 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class _Level(NamedTuple):
    contexts: np.ndarray
    """Known contexts, sorted: id of the context without its oldest symbol · vocab_size + oldest
    symbol."""
    ngrams: np.ndarray
    """Known n-grams, sorted: id of the context · vocab_size + next symbol."""
    share: np.ndarray
    """Of each n-gram: its discounted count over the context's total."""
    backoff: np.ndarray
    """Of each context: the share that discounting left for the shorter context."""


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each wanted key in the sorted keys, −1 where it is missing."""
    if len(keys) == 0:
        return np.full(len(wanted), -1)
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


def _depth(row: np.ndarray) -> np.ndarray:
    """Position within its row of every symbol; row: non-decreasing row numbers."""
    first = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
    return np.arange(len(row)) - np.repeat(first, np.diff(first, append=len(row)))


def _older(
    context: np.ndarray, symbols: np.ndarray, depth: np.ndarray, k: int, vocab_size: int
) -> np.ndarray:
    """Keys of the contexts of length k, from the ids of those of length k − 1; −1 where the row or
    the context ends."""
    oldest = np.roll(symbols, k)  # what wraps around has depth < k
    return np.where((depth >= k) & (context >= 0), context * vocab_size + oldest, -1)


class NGram:
    """Interpolated modified Kneser-Ney of order n over the symbols 0 … vocab_size − 1 (Chen &
    Goodman 1998).

        p_k(w | c) = (N_k(c, w) − D(N_k(c, w)))₊ / N_k(c, ·)  +  backoff_k(c) · p_{k−1}(w | c
        without its oldest symbol)

    p_0 is uniform. N_n are counts; below the highest order N_k counts the distinct symbols seen
    before the k-gram. A context never seen gets the next shorter one's distribution. Contexts do
    not cross rows.
    """

    def __init__(self, symbols: np.ndarray, row: np.ndarray, vocab_size: int, order: int = 5):
        """symbols: integers, shape [n]; row: the row of each, non-decreasing, shape [n]; order: at
        least 1."""
        if order < 1 or len(symbols) == 0 or symbols.min() < 0 or symbols.max() >= vocab_size:
            raise ValueError(
                f"expected order ≥ 1 and symbols in [0, {vocab_size}), got order {order} and "
                f"{len(symbols)} symbols"
                + (f" in [{symbols.min()}, {symbols.max()}]" if len(symbols) else "")
            )
        self.vocab_size = vocab_size
        symbols, depth = symbols.astype(np.int64), _depth(row)
        # Order 1 has the empty context alone, with id 0.
        contexts, keys = (
            [np.zeros(1, np.int64)],
            [symbols],
        )
        context = np.zeros(len(symbols), np.int64)
        for k in range(1, order):
            key = _older(context, symbols, depth, k, vocab_size)
            known, ids = np.unique(key, return_inverse=True)
            # The first symbol of a row has no context, so known[0] is −1, and stays −1
            context = ids - 1
            contexts.append(known[1:])
            keys.append(np.where(context >= 0, context * vocab_size + symbols, -1))
        self.levels = [None] * order
        longer = np.empty(0, np.int64)  # distinct (k+1)-grams, without their oldest symbol
        for k in reversed(range(order)):
            # a k-gram that begins its row has nothing before it: it keeps its plain count
            counted = keys[k][depth == k] if k < order - 1 else keys[k][depth >= k]
            self.levels[k] = self._level(contexts[k], np.concatenate([longer, counted]))
            if k > 0:
                ngrams = self.levels[k].ngrams
                longer = (
                    contexts[k][ngrams // vocab_size] // vocab_size * vocab_size
                    + ngrams % vocab_size
                )

    def _level(self, contexts: np.ndarray, keys: np.ndarray) -> _Level:
        ngrams, counts = np.unique(keys, return_counts=True)
        n1, n2, n3, n4 = (max(int((counts == n).sum()), 1) for n in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        best = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        # with few n-grams the estimates stray: a discount stays above 0 and below the count
        discount = np.clip(best, [0, 0.1, 0.1, 0.1], [0, 0.9, 1.8, 2.7])[counts.clip(max=3)]
        context = ngrams // self.vocab_size
        total = np.bincount(context, counts, minlength=len(contexts))
        return _Level(
            contexts,
            ngrams,
            (counts - discount) / total[context],
            np.bincount(context, discount, minlength=len(contexts)) / total,
        )

    def bits(self, symbols: np.ndarray, row: np.ndarray) -> np.ndarray:
        """−log₂ p of every symbol given those before it in its row; shapes as for training, result
        [n]."""
        symbols, depth = symbols.astype(np.int64), _depth(row)
        context = np.zeros(len(symbols), np.int64)
        p = np.full(len(symbols), 1 / self.vocab_size)
        for k, level in enumerate(self.levels):
            if len(level.contexts) == 0:
                break  # no training row was this long
            if k > 0:
                context = _find(level.contexts, _older(context, symbols, depth, k, self.vocab_size))
            ngram = _find(level.ngrams, context * self.vocab_size + symbols)
            mixed = np.where(ngram >= 0, level.share[ngram], 0) + level.backoff[context] * p
            p = np.where(context >= 0, mixed, p)
        return -np.log2(p)
