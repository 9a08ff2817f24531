"""Power laws: exact recovery, by hand, against a dense search, and what they predict unseen."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from companion.rails.scaling import STEEPEST, PowerLaw, fit_power_law, fits
from scipy import stats

WIDTHS = np.array([512.0, 1024, 2048, 4096, 8192, 16384])
TOKENS = np.array([1e6, 3e6, 1e7, 3e7, 1e8, 1e9])


def curves(x, values, architecture="relu", **columns):
    """A table of one architecture from values [seeds, len(x)]."""
    rows = [pd.DataFrame({"seed": seed, "x": x, "fvu": y}) for seed, y in enumerate(values)]
    return pd.concat(rows, ignore_index=True).assign(architecture=architecture, **columns)


def cost(law, x, y):
    return np.square(np.log(law.at(x) / y)).sum()


def test_a_law_by_hand():
    law = PowerLaw(6.0, 0.5, 1.0)
    assert law.at(4) == 4.0 and isinstance(law.at(4), float)
    assert law.at([[1, 4, 9]]).tolist() == [[7.0, 4.0, 3.0]]
    assert fit_power_law([1, 4], [6, 3]) == pytest.approx((6.0, 0.5, 0.0))
    # three points: the slope of log y over log x = 0, 1, 2 is half the difference of the ends, the
    # middle point does not count
    assert fit_power_law([1, 10, 100], [8, 1, 0.5]).exponent == pytest.approx(math.log10(16) / 2)


@pytest.mark.parametrize("x", [WIDTHS, TOKENS])
@pytest.mark.parametrize(
    "law", [PowerLaw(3.0, 0.31), PowerLaw(50.0, 1.2), PowerLaw(0.2, 0.0), PowerLaw(1e-3, -0.4)]
)
def test_a_law_without_offset_is_recovered_in_any_order(x, law):
    assert fit_power_law(x, law.at(x)) == pytest.approx(law, rel=1e-9, abs=1e-9)
    assert fit_power_law(x[::-1], law.at(x[::-1])) == pytest.approx(law, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("x", [WIDTHS, TOKENS])
@pytest.mark.parametrize(
    ("exponent", "share"), [(0.3, 0.1), (0.3, 0.6), (0.6, 0.9), (1.2, 0.3), (0.15, 0.02)]
)
def test_a_law_with_offset_is_recovered(x, exponent, share):
    last = x[-1] ** -exponent
    law = PowerLaw(
        0.2 * (1 - share) / last, exponent, 0.2 * share
    )  # 0.2 at the largest x, a share of it the floor
    found = fit_power_law(x, law.at(x), offset=True)
    assert found == pytest.approx(law, rel=1e-4)
    three = fit_power_law(x[::2], law.at(x[::2]), offset=True)  # as many points as parameters
    assert three == pytest.approx(law, rel=1e-3)


def test_an_offset_that_is_not_there_is_not_found():
    law = PowerLaw(3.0, 0.31)
    assert fit_power_law(WIDTHS, law.at(WIDTHS), offset=True) == pytest.approx(law, abs=1e-6)
    steeper = law.at(WIDTHS) * np.exp(
        -0.02 * np.arange(6) ** 2
    )  # bends down: the best offset would be below 0
    assert fit_power_law(WIDTHS, steeper, offset=True).offset == pytest.approx(0, abs=1e-6)
    assert fit_power_law(WIDTHS, steeper, offset=True) == pytest.approx(
        fit_power_law(WIDTHS, steeper), rel=1e-4, abs=1e-6
    )


def test_the_offset_is_the_best_of_a_dense_search():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        y = PowerLaw(2.0, 0.4, 0.06).at(WIDTHS) * np.exp(0.05 * rng.standard_normal(6))
        found = fit_power_law(WIDTHS, y, offset=True)
        offset = np.linspace(0, y.min(), 100, endpoint=False)[:, None, None, None]
        exponent = np.linspace(0.05, 3, 100)[:, None, None]
        scale = np.geomspace(0.3, 3, 40)[:, None] * y[2] * WIDTHS[2] ** exponent
        law = scale * WIDTHS**-exponent + offset
        assert 0 <= found.offset < y.min()
        assert cost(found, WIDTHS, y) <= np.square(np.log(law / y)).sum(-1).min()
        assert cost(found, WIDTHS, y) <= cost(fit_power_law(WIDTHS, y), WIDTHS, y)


def test_the_units_of_y_change_nothing_but_scale_and_offset():
    rng = np.random.default_rng(3)
    y = PowerLaw(2.0, 0.4, 0.06).at(WIDTHS) * np.exp(0.05 * rng.standard_normal(6))
    found, scaled = (
        fit_power_law(WIDTHS, y, offset=True),
        fit_power_law(WIDTHS, 1e4 * y, offset=True),
    )
    assert scaled == pytest.approx(
        (1e4 * found.scale, found.exponent, 1e4 * found.offset), rel=1e-4
    )


def test_a_curve_at_its_floor_at_once_has_the_steepest_law_and_not_an_infinite_one():
    found = fit_power_law(TOKENS, [2.0, 1, 1, 1, 1, 1], offset=True)
    assert math.isfinite(found.scale) and abs(found.exponent) <= STEEPEST
    assert found.at(TOKENS) == pytest.approx([2, 1, 1, 1, 1, 1], rel=1e-3)


def test_the_interval_over_seeds_by_hand():
    slopes = np.array([0.2, 0.3, 0.4])
    values = [(WIDTHS / 512) ** -slope for slope in slopes]
    row = fits(curves(WIDTHS, values), "x", "fvu", level=0.9).iloc[0]
    half = stats.t.ppf(0.95, 2) * 0.1 / math.sqrt(3)
    assert row[["exponent", "exponent_low", "exponent_high"]].tolist() == pytest.approx(
        [0.3, 0.3 - half, 0.3 + half]
    )
    assert row[["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx(
        [1, 1, 1]
    )  # all of them power laws


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    rng = np.random.default_rng(0)
    clean = PowerLaw(2.0, 0.35).at(WIDTHS)
    groups = [
        curves(WIDTHS, clean * np.exp(0.1 * rng.standard_normal((4, 6))), repeat=i)
        for i in range(300)
    ]
    found = fits(pd.concat(groups), "x", "fvu", by=["architecture", "repeat"])
    assert found.columns[:2].tolist() == ["architecture", "repeat"] and len(found) == 300
    for column, truth in (("exponent", 0.35), ("ratio", 1.0)):
        held = ((found[f"{column}_low"] < truth) & (truth < found[f"{column}_high"])).mean()
        assert 0.91 < held < 0.985  # 95 %, three standard errors either way


def test_a_curve_that_flattens_is_measured_above_its_prediction():
    flat = PowerLaw(2.0, 0.5, 0.1)
    table = pd.concat(
        [
            curves(WIDTHS, [flat.at(WIDTHS), 1.1 * flat.at(WIDTHS)], "flattens"),
            curves(WIDTHS, [1 / flat.at(1 / WIDTHS)] * 2, "steepens"),
        ]
    )
    found = fits(table.sample(frac=1, random_state=0), "x", "fvu").set_index("architecture")
    unseen = fit_power_law(WIDTHS[:-1], flat.at(WIDTHS[:-1])).at(WIDTHS[-1])
    assert (
        found.ratio["flattens"] == pytest.approx(flat.at(WIDTHS[-1]) / unseen)
        and found.ratio["flattens"] > 1.05
    )
    # a common factor cancels: the two seeds agree
    assert found.ratio_low["flattens"] == pytest.approx(found.ratio_high["flattens"])


def test_a_miss_by_hand_and_its_interval():
    # the seeds' largest points lie at 2 and at 8 times their prediction: the middle is 4, in
    # logarithms
    values = [[1, 0.5, 0.25 * 2], [1, 0.5, 0.25 * 8]]
    row = fits(curves([1.0, 2, 4], values), "x", "fvu").iloc[0]
    reach = math.exp(stats.t.ppf(0.975, 1) * math.log(2))
    assert row[["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx(
        [4, 4 / reach, 4 * reach]
    )


def test_what_too_few_seeds_or_points_leave_unknown_is_nan():
    one = fits(curves(WIDTHS, [WIDTHS**-0.5]), "x", "fvu").iloc[0]
    assert one.exponent == pytest.approx(0.5) and one.ratio == pytest.approx(1)
    assert one[["exponent_low", "exponent_high", "ratio_low", "ratio_high"]].isna().all()
    two = fits(curves([1.0, 4], [[2, 1], [2, 1]]), "x", "fvu").iloc[0]
    assert two.exponent == pytest.approx(0.5) and math.isnan(two.ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=[8, 8], y=[1, 2]), r"needs as many distinct x, got \[8.0\]"),
        (
            dict(x=[1, 2, 2], y=[1, 2, 3], offset=True),
            r"with offset has 3 parameters .* got \[1.0, 2.0\]",
        ),
        (dict(x=[0, 2], y=[1, 2]), r"x must be positive .* got \[0.0, 2.0\]"),
        (dict(x=[1, 2], y=[1, -0.1]), r"y must be positive .* got \[1.0, -0.1\]"),
        (dict(x=[1, 2], y=[1, math.nan]), r"y must be positive and finite"),
        (dict(x=[1, 2], y=[1, 2, 3]), r"one shape \[n\], got \[2\] and \[3\]"),
        (dict(x=[1, 2, 3], y=[3, 2, 1], offset=True, starts=0), "starts must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(**arguments)


def test_a_table_that_cannot_be_fitted_says_where():
    table = curves(WIDTHS, [WIDTHS**-0.5, WIDTHS**-0.5])
    with pytest.raises(ValueError, match="relu, seed 1: y must be positive"):
        fits(table.assign(fvu=table.fvu.where(table.index != 7, -1.0)), "x", "fvu")
    with pytest.raises(ValueError, match="relu: every seed needs one row at each x"):
        fits(table.drop(7), "x", "fvu")
    with pytest.raises(ValueError, match="relu: every seed needs one row at each x"):
        fits(pd.concat([table.assign(metric="fvu"), table.assign(metric="kl")]), "x", "fvu")
