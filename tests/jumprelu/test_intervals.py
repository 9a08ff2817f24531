"""Intervals by hand, and against the spread of repeated samples."""

import math

import numpy as np
import pytest
import torch

from jumprelu.intervals import (
    Estimate,
    bootstrap,
    ratio_estimate,
    share_estimate,
)


def test_ratio_estimate_by_hand():
    # r = 4/4 = 1; residuals −1 and 1; √(2/1 · 2)/4 = 1/2
    assert ratio_estimate(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])) == Estimate(1.0, 0.5)
    assert math.isnan(
        ratio_estimate(torch.tensor([2.0]), torch.tensor([4.0])).se
    )  # one cluster: not known


def test_ratio_error_is_the_spread_over_repeated_samples():
    g = torch.Generator().manual_seed(0)
    size = torch.randint(1, 9, (2000, 40), generator=g).double()  # 2000 corpora of 40 documents
    own = torch.randn(
        2000, 40, generator=g, dtype=torch.float64
    )  # shared by all tokens of a document
    estimates = [ratio_estimate(size[i] * (3 + own[i]), size[i]) for i in range(2000)]
    spread = torch.tensor([e.value for e in estimates]).std().item()
    claimed = torch.tensor([e.se for e in estimates]).mean().item()
    assert claimed == pytest.approx(spread, rel=0.08)


def test_share_estimate_by_hand():
    fired = torch.tensor([[10.0, 0.0, 1.0], [10.0, 0.0, 0.0]])
    tokens = torch.tensor([10.0, 10.0])
    assert share_estimate(fired, tokens, 0.5).value == pytest.approx(1 / 3)
    assert share_estimate(fired, tokens, 0.5).se == 0.0
    dead = share_estimate(fired, tokens, -1.0, 0.0)
    assert dead.value == pytest.approx(1 / 3)
    # without the first group latent 2 is dead as well: shares 2/3 and 1/3
    assert dead.se == pytest.approx((0.5 * 2 * (1 / 6) ** 2) ** 0.5)


def test_estimates_print_to_their_precision():
    assert str(Estimate(0.123456, 0.0123)) == "0.123 ± 0.012"
    assert str(Estimate(41.23, 2.1)) == "41.2 ± 2.1"


def test_bootstrap_draws_documents():
    g = torch.Generator().manual_seed(5)
    numerator, denominator = (
        torch.rand(200, generator=g).double() + 0.5,
        torch.rand(200, generator=g).double() + 1,
    )
    found = bootstrap(lambda w: (w @ numerator) / (w @ denominator), 200, draws=4000)
    known = ratio_estimate(numerator, denominator)
    assert found.mean == pytest.approx(known.value) and found.low < known.value < found.high
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(known.se, rel=0.06)
    assert bootstrap(lambda w: w.sum(-1), 7, draws=50) == (7, 7, 7)  # as many as there are


def test_bootstrap_of_several_statistics_at_once():
    values = torch.rand(30, generator=torch.Generator().manual_seed(1)).double()
    both = bootstrap(
        lambda w: torch.stack([w @ values, torch.full(w.shape[:1], float("nan")).double()], -1),
        30,
        draws=200,
    )
    assert (both.mean[0], both.low[0], both.high[0]) == pytest.approx(
        bootstrap(lambda w: w @ values, 30, draws=200)
    )
    assert np.isnan([end[1] for end in both]).all()
