"""The toy's exact fits against a grid of others, its densities against its samples."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from companion.rails.repeats import summarise
from companion.ste import toy


@pytest.mark.parametrize("name", toy.ACTIVATIONS[1:])
def test_best_activation_beats_every_point_of_a_grid(name):
    y, s = toy.Mixture().sample(3000, torch.Generator().manual_seed(0))

    def objective(activation):
        return toy.activation_errors(activation, y, s, 0.1)["objective"]

    best = toy.best_activation(name, y, s, 0.1)
    gains = (0.8, 1.0, 1.2, 1.4, 1.6) if name.endswith("gain") else (1.0,)
    biases = {"JumpReLU": lambda t: 0.0}.get(name, lambda t: t)
    for threshold in np.linspace(0.01, 1.5, 60):
        for gain in gains:
            assert (
                objective(best)
                <= objective(toy.Activation(biases(threshold), threshold, gain)) + 1e-6
            )


def test_activation_errors_by_hand():
    y, s = torch.tensor([2.0, 0.6, 0.4, -1.0]).double(), torch.tensor([1.0, 0.0, 1.0, 0.0]).double()
    errors = toy.activation_errors(toy.Activation(0.0, 0.5, 1.0), y, s, sparsity=0.25)
    assert errors["false positives"] == 0.5 and errors["misses"] == 0.5
    assert errors["shrinkage"] == -1 and errors["magnitude error"] == 1
    assert math.isclose(errors["objective"], (1 + 0.36 + 1) / 4 + 0.25 / 2, rel_tol=1e-6)


def test_mixture_densities_are_the_density_of_its_samples():
    mixture = toy.Mixture()
    table = mixture.densities(np.linspace(-2, 6, 8001))
    assert math.isclose(table.absent.sum() * 1e-3, 0.9, rel_tol=1e-3)
    assert math.isclose(table.present.sum() * 1e-3, 0.1, rel_tol=1e-2)
    y, _ = mixture.sample(200_000, torch.Generator().manual_seed(0))
    above = table[table.pre_activation > 0.8]
    assert math.isclose(
        (y > 0.8).double().mean().item(), (above.absent + above.present).sum() * 1e-3, rel_tol=0.03
    )


def test_compare_activations_is_tidy_and_a_function_of_the_seed():
    first, again = (
        toy.compare_activations(toy.Mixture(), [0.1], n=500, repeats=2, seed=5) for _ in range(2)
    )
    pd.testing.assert_frame_equal(first, again)
    assert len(first) == 2 * 4 * 5
    summary = summarise(first, ["activation", "metric"])
    assert (summary.low <= summary["mean"]).all() and (summary["mean"] <= summary.high).all()


def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'GELU'"):
        toy.best_activation("GELU", torch.zeros(2), torch.zeros(2), 0.1)
