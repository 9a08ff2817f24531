"""The n-gram model: a proper distribution, and the formula of interpolated modified Kneser-Ney."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from companion.subject.ngram import NGram

V = 6


@pytest.fixture
def data():
    """200 rows of 20 symbols of a Markov chain; symbol 5 never comes."""
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet(np.full(5, 0.4), size=5)
    rows = np.zeros((200, 20), int)
    for t in range(1, 20):
        rows[:, t] = [rng.choice(5, p=transitions[previous]) for previous in rows[:, t - 1]]
    return rows


def flat(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.ravel(), np.repeat(np.arange(len(rows)), rows.shape[1])


def distribution(model: NGram, context: list[int]) -> np.ndarray:
    rows = np.array([[*context, symbol] for symbol in range(model.vocab_size)])
    return 2 ** -model.bits(*flat(rows)).reshape(rows.shape)[:, -1]


CONTEXTS = [[], [0], [5], [0, 1], [5, 0, 1], [0, 1, 2, 3], [1, 0, 5, 0], [3, 2, 1, 0, 1, 2]]


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_probabilities_add_up_to_one(data, order, context):
    p = distribution(NGram(*flat(data), vocab_size=V, order=order), context)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).all()  # also for the symbol that was never seen


def reference(rows: np.ndarray, order: int, context: list[int]) -> np.ndarray:
    """The same model with dictionaries and loops."""
    ngrams = [Counter() for _ in range(order)]  # [k][(context, symbol)] with k symbols of context
    for row in rows.tolist():
        for t, symbol in enumerate(row):
            for k in range(min(t, order - 1) + 1):
                ngrams[k][tuple(row[t - k : t]), symbol] += 1
    for k in range(order - 1):  # below the highest order, count what comes before instead
        before = defaultdict(set)
        for longer, symbol in ngrams[k + 1]:
            before[longer[1:], symbol].add(longer[0])
        starts = Counter((tuple(row[:k]), row[k]) for row in rows.tolist())
        ngrams[k] = Counter({key: len(before[key]) + starts[key] for key in ngrams[k]})
    p = np.full(V, 1 / V)
    for k in range(order):
        c = tuple(context[len(context) - k :])
        counts = {symbol: n for (known, symbol), n in ngrams[k].items() if known == c}
        if k > len(context) or not counts:
            break
        n1, n2, n3, n4 = (max(1, sum(n == m for n in ngrams[k].values())) for m in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        best = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        discounts = [min(max(d, 0.1), most) for d, most in zip(best, (0.9, 1.8, 2.7), strict=True)]
        total = sum(counts.values())
        left = sum(discounts[min(n, 3) - 1] for n in counts.values()) / total
        shares = [
            (counts[s] - discounts[min(counts[s], 3) - 1]) / total if s in counts else 0
            for s in range(V)
        ]
        p = np.array(shares) + left * p
    return p


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_it_is_modified_kneser_ney(data, context):
    model = NGram(*flat(data), vocab_size=V, order=4)
    np.testing.assert_allclose(
        distribution(model, context), reference(data, 4, context), rtol=1e-12
    )


def test_contexts_do_not_cross_rows(data):
    model = NGram(*flat(data), vocab_size=V, order=4)
    alone, after = model.bits(*flat(data[3:4])), model.bits(*flat(data[2:4]))[20:]
    assert np.array_equal(alone, after)


def test_bits_come_near_the_entropy_rate():
    rng = np.random.default_rng(1)
    stay = 0.9  # a chain of two states that stays with this probability
    states = np.logical_xor.accumulate(rng.random((400, 100)) > stay, axis=1).astype(int)
    model = NGram(*flat(states[:300]), vocab_size=2, order=3)
    bits = model.bits(*flat(states[300:])).reshape(100, 100)[:, 1:]
    rate = -stay * math.log2(stay) - (1 - stay) * math.log2(1 - stay)
    assert bits.mean() == pytest.approx(rate, abs=4 * bits.mean(1).std() / 10)


def test_rows_shorter_than_the_order():
    model = NGram(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), vocab_size=2, order=5)
    assert distribution(model, [0])[1] > 0.5
    assert distribution(model, [1, 1, 1, 0, 0, 0]).sum() == pytest.approx(1)


@pytest.mark.parametrize(("symbols", "order"), [([0, 7], 2), ([-1], 2), ([], 2), ([0], 0)])
def test_what_it_cannot_be_trained_on(symbols, order):
    with pytest.raises(ValueError, match=r"expected order ≥ 1 and symbols in \[0, 6\), got order"):
        NGram(np.array(symbols, int), np.zeros(len(symbols), int), vocab_size=V, order=order)
