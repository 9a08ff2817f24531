"""Losses against values worked out by hand."""

import pytest
import torch

from jumprelu import losses


def test_reconstruction_sums_over_dimensions():
    x, x_hat = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    assert losses.reconstruction(x, x_hat).item() == (5 + 4) / 2


def test_l1_weights_by_the_atoms_norms():
    assert (
        losses.l1(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([10.0, 1.0])).item()
        == (12 + 3) / 2
    )


def test_l0_counts_and_trains_the_threshold_only():
    pre = torch.tensor([[0.5, 0.1], [0.34, 0.9]], requires_grad=True)
    threshold = torch.tensor([0.3, 0.2], requires_grad=True)
    count = losses.l0(pre, threshold, bandwidth=0.1)
    assert count.tolist() == [1.0, 2.0]
    count.mean().backward()
    assert pre.grad is None
    # one of two samples of latent 0 lies in the window: −(1/ε)/2
    torch.testing.assert_close(threshold.grad, torch.tensor([-5.0, 0.0]))


def test_l0_targets():
    l0 = torch.tensor([1.0, 3.0])
    assert losses.l0_target(l0, 2.0, per_sample=True).item() == pytest.approx(0.25)
    assert losses.l0_target(l0, 2.0, per_sample=False).item() == 0.0


def test_frequency_penalty_prefers_spread():
    concentrated = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    spread = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert losses.frequency_penalty(concentrated, 0.5).item() == 1 * (1 + 1 / 0.5)
    assert losses.frequency_penalty(spread, 0.5).item() == 2 * 0.5 * (1 + 0.5 / 0.5)


def test_auxk_uses_dead_latents_only():
    W_dec = torch.eye(3)
    residual = torch.tensor([[1.0, 2.0, 3.0]])
    pre = torch.tensor([[1.5, 2.5]])  # of the last two, which are dead
    # one dead latent, the larger, reconstructs (0, 0, 2.5)
    assert losses.auxk(residual, pre, W_dec[1:], k=1).item() == pytest.approx(1 + 4 + 0.25)
    assert losses.auxk(residual, pre[:, :0], W_dec[:0], k=1).item() == 0.0
