"""Frontiers at equal L0: by hand, and the properties that a comparison must have."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from companion.rails import frontier
from scipy import stats


def runs(architecture, l0, fvu, seed=0, **columns):
    numbers = {"l0": np.array(l0, float), "fvu": np.array(fvu, float)}
    return pd.DataFrame({"architecture": architecture, "seed": seed, **numbers, **columns})


def test_a_metric_at_an_l0():
    one = runs("a", [100, 1], [0.1, 0.4])
    assert frontier.at_l0(one, 10.0) == pytest.approx(
        0.2
    )  # half way in log L0, and in the logarithm of FVU
    assert math.isnan(frontier.at_l0(runs("a", [1, 100], [-0.1, 0.5]), 10.0))
    assert math.isnan(frontier.at_l0(one, 200.0)) and math.isnan(frontier.at_l0(one, 0.5))
    assert frontier.at_l0(one, np.array([1.0, 100.0])).tolist() == pytest.approx([0.4, 0.1])


def test_a_run_in_which_nothing_fires_is_no_point_of_the_curve():
    collapsed = runs("a", [0, 1, 100], [1.0, 0.4, 0.1])
    assert frontier.at_l0(collapsed, 10.0, bend=-0.1) == frontier.at_l0(
        collapsed[1:], 10.0, bend=-0.1
    )
    assert math.isnan(frontier.at_l0(collapsed, 0.5))
    assert math.isnan(frontier.at_l0(collapsed[:1], 10.0))
    assert np.isnan(frontier.at_l0(collapsed[:1], np.array([1.0, 2.0]))).all()


def test_a_known_bend_makes_up_for_missing_points():
    """Two curves a constant factor apart, of which one has fewer points: chords get it wrong, the
    bend of a third does not."""
    grid = np.geomspace(5, 160, 9)

    def curve(l0):
        return np.exp(-1 - 0.3 * np.log(l0) - 0.08 * np.log(l0) ** 2)

    dense = runs("dense", grid, curve(grid))
    assert frontier.bend(dense) == pytest.approx(-0.08)
    assert frontier.bend(dense.assign(fvu=dense.fvu * dense.l0**2)) == pytest.approx(
        -0.08
    )  # a straight line does not bend
    few, many = runs("a", [10, 80], 0.9 * curve(np.array([10, 80]))), runs("b", grid, curve(grid))
    assert frontier.matched_ratio(few, many, bend=-0.08) == pytest.approx(0.9)
    assert frontier.matched_ratio(few, many) < 0.87
    assert frontier.at_l0(few, 40.0, bend=-0.08) == pytest.approx(0.9 * curve(40.0))
    both = pd.concat([few, many], ignore_index=True)
    assert frontier.compare(both, "a", "b", bend=-0.08).mean == pytest.approx(0.9)
    with pytest.raises(ValueError, match="three different L0"):
        frontier.bend(few)


def test_a_constant_factor_is_found_on_the_common_range_only():
    other = runs("b", [1, 10, 100], [0.6, 0.3, 0.2])
    mine = runs("a", [10, 100, 1000], [0.15, 0.1, 7.0])
    assert frontier.matched_ratio(mine, other) == pytest.approx(
        0.5
    )  # what it does beyond L0 100 does not count
    assert frontier.matched_ratio(other, mine) == pytest.approx(2.0)
    assert frontier.matched_ratio(mine, mine) == 1.0
    bent = runs("a", [1, 10, 100], [0.6, 0.6, 0.2])
    assert frontier.matched_ratio(bent, other, worst=True) == pytest.approx(
        2, rel=0.1
    )  # near L0 = 10, where it is 2
    assert 1 < frontier.matched_ratio(bent, other) < 1.5


def test_the_mean_is_geometric_over_log_l0():
    low, high = 10.0, 1000.0
    grid = np.geomspace(low, high, 400)
    mine, other = runs("a", grid, np.linspace(1, 3, 400)), runs("b", grid, np.ones(400))
    expected = np.exp((3 * np.log(3) - 2) / 2)  # the mean of log u for u from 1 to 3
    assert frontier.matched_ratio(mine, other) == pytest.approx(expected, rel=0.01)


def test_nothing_is_extrapolated():
    assert math.isnan(frontier.matched_ratio(runs("a", [1, 2], [1, 1]), runs("b", [3, 4], [1, 1])))
    assert math.isnan(frontier.matched_ratio(runs("a", [1, 2], [1, 1]), runs("b", [2, 4], [1, 1])))
    assert math.isnan(
        frontier.matched_ratio(runs("a", [1, 9], [-1, 1]), runs("b", [1, 9], [1, 1]))
    )  # no ratio of signs


def test_seeds_give_the_interval():
    factors = [0.9, 1.0, 1.2]
    table = pd.concat(
        [
            runs("b", [1, 10], [0.4, 0.2], seed, lr=0.1) for seed in range(4)
        ]  # one more, which a does not have
        + [runs("a", [1, 10], [0.4 * f, 0.2 * f], seed, lr=0.1) for seed, f in enumerate(factors)]
    )
    assert frontier.seed_ratios(table, "a", "b").tolist() == pytest.approx(factors)
    found = frontier.compare(table, "a", "b")
    logs = np.log(factors)
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / 3**0.5
    assert found == pytest.approx(
        (np.exp(logs.mean()), np.exp(logs.mean() - half), np.exp(logs.mean() + half))
    )
    assert frontier.log_interval([1.0], spread=logs.std(ddof=1), degrees=2).high == pytest.approx(
        np.exp(half * 3**0.5)
    )
    assert all(map(math.isnan, frontier.log_interval([math.nan])))
    with pytest.raises(ValueError, match="no runs of 'c'"):
        frontier.compare(table, "c", "a")


def test_bands_are_the_mean_curve_and_its_interval():
    table = pd.concat(
        [runs("a", [1, 10 + seed], [0.4 * f, 0.4 * f], seed) for seed, f in enumerate([0.5, 2.0])]
    )
    found = frontier.bands(table)
    assert found.l0.min() > 1 and found.l0.max() < 10
    assert found["mean"].to_numpy() == pytest.approx(0.4)  # geometric mean of 0.2 and 0.8
    half = stats.t.ppf(0.975, 1) * np.log([0.5, 2.0]).std(ddof=1) / 2**0.5
    assert (found.high / found["mean"]).to_numpy() == pytest.approx(np.exp(half))


def test_the_best_setting_of_each_architecture_is_that_of_least_ratio():
    table = pd.concat(
        [
            runs(name, [1, 10], [0.4 * f, 0.2 * f], lr=lr)
            for name, factors in {"a": [1, 0.8, 1.5], "b": [1, 1.1, 0.7]}.items()
            for lr, f in zip([1, 2, 3], factors, strict=True)
        ]
    )
    table = pd.concat(
        [table, runs("a", [20, 30], [0.001, 0.001], lr=4)]
    )  # nothing in common with the reference
    found = frontier.tuned(table, "lr", reference=1)
    assert found[found.best][["architecture", "lr"]].to_numpy().tolist() == [["a", 2], ["b", 3]]
    assert found[found.architecture == "b"].ratio.tolist() == pytest.approx([1, 1.1, 0.7])
    assert found[found.lr == 4].ratio.isna().all()
    with pytest.raises(ValueError, match="was not run at lr = 9"):
        frontier.tuned(table, "lr", reference=9)
