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
    over_seeds,
    squared_length,
    summarise,
)

from jumprelu.intervals import bootstrap, mean_interval


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
