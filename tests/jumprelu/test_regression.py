"""Least squares from sums against least squares on everything."""

from __future__ import annotations

import pytest
import torch

from jumprelu.dark.regression import RIDGES, Moments


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def regressors(n=600, p=5, seed=0):
    """Activations in small: far from zero, of different scales, correlated."""
    g = generator(seed)
    mixed = torch.randn(n, p, generator=g, dtype=torch.float64) @ torch.randn(
        p, p, generator=g, dtype=torch.float64
    )
    return mixed * torch.logspace(-1, 1, p, dtype=torch.float64) + torch.linspace(
        -50, 300, p, dtype=torch.float64
    )


def targets(x, m=4, seed=1):
    g = generator(seed)
    return (
        x @ torch.randn(x.shape[1], m, generator=g, dtype=torch.float64)
        + torch.randn(len(x), m, generator=g)
        + 7
    )


def moments(x, y, folds=3, shift=None):
    """Given in uneven pieces, rows of the folds mixed."""
    found = Moments(x[:5].mean(0) if shift is None else shift, y.shape[1], folds)
    fold = torch.arange(len(x)) % folds
    for some in torch.arange(len(x)).split(97):
        found.add(x[some], y[some], fold[some])
    return found, fold


def direct(x, y, bias=True):
    """Least squares on all rows at once, by a QR decomposition."""
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(
        torch.cat([x, ones], 1) if bias else x, y, driver="gelsd"
    ).solution
    return (
        (solution[:-1], solution[-1])
        if bias
        else (solution, torch.zeros(y.shape[1], dtype=torch.float64))
    )


@pytest.mark.parametrize("bias", [True, False])
def test_sums_give_the_least_squares_of_all_rows(bias):
    x = regressors()
    y = targets(x)
    weight, offset = direct(x, y, bias)
    fit = moments(x, y)[0].fit(bias=bias)
    assert torch.allclose(fit.weight, weight, rtol=1e-8, atol=0)
    assert torch.allclose(fit.bias, offset, rtol=1e-8, atol=1e-9)
    assert torch.allclose(fit(x.float()), x.float().double() @ weight + offset, rtol=1e-8)


def test_squared_errors_come_from_sums_alone():
    x = regressors()
    y = targets(x)
    sums, fold = moments(x, y)
    fit = sums.fit(0.01)
    for number in range(3):
        expected = (y - fit(x))[fold == number].square().sum(0)
        assert torch.allclose(sums.squared_error(fit, number), expected, rtol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_is_the_closed_form(bias):
    x = regressors()
    y = targets(x)
    ridge = torch.tensor([0.0, 1e-3, 0.1, 2.0])
    fit = moments(x, y)[0].fit(ridge, bias)
    about, height = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    gram = about.T @ about / len(x)
    for column, share in enumerate(ridge.tolist()):
        penalised = gram + share * gram.trace() / len(gram) * torch.eye(
            len(gram), dtype=torch.float64
        )
        expected = torch.linalg.solve(penalised, about.T @ height[:, column] / len(x))
        assert torch.allclose(fit.weight[:, column], expected, rtol=1e-6)
    assert torch.allclose(fit(x).mean(0), y.mean(0), rtol=1e-9) == bias


def test_best_ridge_is_that_of_cross_validation_by_hand():
    x = regressors(60, 20)
    y = torch.cat(
        [
            x[:, :2] @ torch.ones(2, 2, dtype=torch.float64),
            torch.randn(60, 3, generator=generator(4)).double(),
        ],
        1,
    )
    sums, fold = moments(x, y, folds=4)
    group = torch.tensor([0, 0, 1, 1, 2])
    expected = []
    for columns in ([0, 1], [2, 3], [4]):
        errors = []
        for ridge in RIDGES:
            error = 0.0
            for left_out in range(4):
                rest = fold != left_out
                fit = moments(x[rest], y[rest], folds=1, shift=sums.shift)[0].fit(ridge)
                error += (y - fit(x))[~rest][:, columns].square().sum().item()
            errors.append(error)
        expected += [RIDGES[errors.index(min(errors))]] * len(columns)
    assert sums.best_ridge(group).tolist() == expected
    assert (
        expected[0] == 0.0 and expected[2] > 0
    )  # an exact law needs none; noise wants to be shrunk


def test_other_targets_of_the_same_rows():
    x = regressors()
    y = targets(x, seed=3)
    once, fold = moments(x, targets(x))
    again = once.again(y.shape[1])
    again.add(x, y, fold)
    fresh = moments(x, y)[0]
    assert torch.allclose(again.fit(0.01).weight, fresh.fit(0.01).weight, rtol=1e-9)
    assert torch.equal(once.n, fresh.n)  # rows were not counted twice


def test_a_direction_in_which_x_does_not_vary_gets_no_weight():
    x = regressors()
    x = torch.cat([x, x[:, :1] * 2, torch.full((len(x), 1), 3.0)], 1)
    y = targets(x)
    fit = moments(x, y)[0].fit()
    weight, offset = direct(x, y)
    assert torch.allclose(fit(x), x @ weight + offset, rtol=1e-6)
    assert fit.weight[-1].abs().max() < 1e-6


def test_nothing_to_fit_is_an_error():
    empty = Moments(torch.zeros(3), 2, 2)
    with pytest.raises(ValueError, match="no rows to fit"):
        empty.fit()
    empty.add(torch.randn(9, 3), torch.randn(9, 2))
    with pytest.raises(ValueError, match="rows in at least two folds, got 1"):
        empty.best_ridge(torch.zeros(2, dtype=torch.long))
