"""Statistics of repeated measurements, by hand and against each other."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from companion.rails.repeats import (
    jackknife,
    leave_one_out,
    mean_interval,
    over_seeds,
    share_interval,
    squared_length,
    summarise,
)

from jumprelu.intervals import bootstrap


def test_mean_interval_by_hand():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])  # sd 1, t(0.975, 2) = 4.3027
    assert mean == 2.0 and high - mean == mean - low == pytest.approx(
        4.302653 / math.sqrt(3), rel=1e-5
    )
    assert mean_interval([1.0]).mean == 1.0 and math.isnan(mean_interval([1.0]).half)
    assert mean_interval([0.0, 2.0], level=0.5).half == pytest.approx(1.0)  # t(0.75, 1) = 1
    with pytest.raises(ValueError, match="at least 1 value"):
        mean_interval([])


def test_mean_interval_gives_floats_or_one_interval_a_column():
    table = torch.tensor([[1.0, 10.0], [2.0, 30.0], [6.0, 20.0]])
    both = mean_interval(table)
    for column in range(2):
        one = mean_interval(table[:, column])
        assert all(type(v) is float for v in one)  # so that a comparison is a plain bool
        assert one == pytest.approx([v[column] for v in both])


def test_intervals_cover_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(3, 2, (6, 4000))

    def holds(comparisons: int) -> np.ndarray:
        found = mean_interval(draws, comparisons=comparisons)
        return (found.low <= 3.0) & (found.high >= 3.0)

    assert abs(holds(1).mean() - 0.95) < 0.012
    assert holds(20).reshape(-1, 20).all(1).mean() > 0.93


def test_summarise_is_an_interval_a_group():
    samples = pd.DataFrame({"name": ["b", "b", "a", "a", "b"], "value": [1.0, 2.0, 5.0, 7.0, 6.0]})
    table = summarise(samples, ["name"])
    assert table.name.tolist() == ["b", "a"]
    assert table.iloc[0, 1:].tolist() == list(mean_interval([1.0, 2.0, 6.0]))


def test_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(0).normal(size=12)
    found = jackknife(leave_one_out(lambda v: v.mean(), values))
    assert found == pytest.approx(mean_interval(values))
    assert found.half == pytest.approx(2.200985 * values.std(ddof=1) / math.sqrt(12), rel=1e-6)


def test_leave_one_out_leaves_out_the_same_place_of_each_array():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    assert leave_one_out(lambda x, y: x.sum() / y.sum(), a, b).tolist() == [
        7 / 4,
        6 / 3,
        5 / 3,
        3 / 2,
    ]


def test_squared_length_is_unbiased_where_the_plain_one_is_not():
    draws = np.random.default_rng(0).normal(0, 1, (3000, 5, 8)) + 0.5
    found = [squared_length(d) for d in draws]
    assert abs(np.mean(found) - 2.0) < 4 * np.std(found) / math.sqrt(3000)
    assert np.mean([np.square(d.mean(0)).sum() for d in draws]) > 3


def test_an_interval_over_seeds_covers_documents_and_seeds():
    values = (
        torch.rand(3, 40, generator=torch.Generator().manual_seed(2)).double()
        + torch.arange(3)[:, None]
    )
    seeds = [lambda w, one=one: w @ one / w.sum(-1) for one in values]
    both, alone, same = (
        over_seeds(seeds, 40),
        over_seeds(seeds[:1], 40),
        over_seeds(seeds[:1] * 3, 40),
    )
    between = mean_interval(values.mean(1))
    drawn = bootstrap(lambda w: w @ values.mean(0) / w.sum(-1), 40)
    assert both.mean == pytest.approx(between.mean)
    assert (both.high - both.mean) ** 2 == pytest.approx(
        (drawn.high - drawn.mean) ** 2 + between.half**2
    )
    assert tuple(alone) == pytest.approx(tuple(bootstrap(seeds[0], 40))) and tuple(
        same
    ) == pytest.approx(tuple(alone))
    pairs = over_seeds([lambda w, one=one: torch.stack([one(w), -one(w)], -1) for one in seeds], 40)
    assert (pairs.mean[0], pairs.low[0], pairs.high[0]) == pytest.approx(tuple(both))
    assert (-pairs.mean[1], -pairs.high[1], -pairs.low[1]) == pytest.approx(tuple(both))


def test_a_share_of_none_is_not_said_to_be_zero():
    found = share_interval(0, 100)
    assert found.mean == found.low == 0
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 100))  # (1 − p)^100 = 2.5 %
    with pytest.raises(ValueError, match="a share of 0"):
        share_interval(0, 0)
