"""Intervals by hand, and against the spread of repeated samples."""

import math

import pytest
import torch

from jumprelu.intervals import Estimate, mean_interval, ratio_estimate, share_estimate


def test_ratio_estimate_by_hand():
    # r = 4/4 = 1; residuals −1 and 1; √(2/1 · 2)/4 = 1/2
    assert ratio_estimate(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])) == Estimate(1.0, 0.5)
    assert math.isnan(ratio_estimate(torch.tensor([2.0]), torch.tensor([4.0])).se)  # one cluster: not known


def test_ratio_error_is_the_spread_over_repeated_samples():
    g = torch.Generator().manual_seed(0)
    size = torch.randint(1, 9, (2000, 40), generator=g).double()  # 2000 corpora of 40 documents
    own = torch.randn(2000, 40, generator=g, dtype=torch.float64)  # shared by all tokens of a document
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


def test_mean_interval_by_hand():
    mean, half = mean_interval([1.0, 2.0, 3.0])  # sd 1, t(0.975, 2) = 4.3027
    assert mean == 2.0 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert math.isnan(mean_interval([1.0]).half)
    interval = mean_interval([0.0, 2.0])
    assert (interval.low + interval.high) / 2 == 1.0 and interval.high > 2
