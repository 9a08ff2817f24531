"""Our Adam is torch's, with less memory at β₁ = 0 and with the atoms' projection in the same
pass."""

import pytest
import torch

from jumprelu import optim
from jumprelu.architectures import Trainee
from jumprelu.optim import Adam
from jumprelu.recipe import TrainConfig


def trainees(**changes):
    config = TrainConfig(d_sae=40, **changes)
    return [Trainee(12, config, torch.Generator().manual_seed(0)) for _ in range(2)]


def set_gradients(trainee, step):
    for name, parameter in trainee.named_parameters():
        generator = torch.Generator().manual_seed(1000 * step + len(name))
        parameter.grad = torch.empty_like(parameter).copy_(
            torch.randn(parameter.shape, generator=generator)
        )


@pytest.mark.parametrize("block", [1, 100, 2**17])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
def test_is_torchs_adam(betas, block, monkeypatch):
    monkeypatch.setattr(optim, "BLOCK", block)
    ours, theirs = trainees()
    rates = {
        name: 1e-2 if name == "threshold_parameter" else 1e-3 for name, _ in ours.named_parameters()
    }
    adam = Adam(dict(ours.named_parameters()), betas, 1e-8)
    groups = [{"params": [p], "lr": rates[name]} for name, p in theirs.named_parameters()]
    reference = torch.optim.Adam(groups, betas=betas, eps=1e-8)
    for step in range(20):
        set_gradients(ours, step), set_gradients(theirs, step)
        adam.step({name: rate * (1 + step) for name, rate in rates.items()})
        for group, rate in zip(reference.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (1 + step)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)
    kept = {"exp_avg_sq"} if betas[0] == 0 else {"exp_avg_sq", "exp_avg"}
    assert all(set(moments) == kept for moments in adam.moments.values())


def test_without_a_first_moment_it_is_torchs_fused_adam_to_the_bit():
    ours, theirs = trainees()
    adam = Adam(dict(ours.named_parameters()), (0.0, 0.999), 1e-8)
    reference = torch.optim.Adam(
        theirs.parameters(), lr=1e-3, betas=(0.0, 0.999), eps=1e-8, fused=True
    )
    for step in range(20):
        set_gradients(ours, step), set_gradients(theirs, step)
        adam.step(dict.fromkeys(adam.parameters, 1e-3))
        reference.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_a_matrix_of_one_column_is_no_encoder():
    """At d_in = 1 both strides of W_dec are 1."""
    config = TrainConfig(d_sae=5)
    trainee = Trainee(1, config, torch.Generator().manual_seed(0))
    set_gradients(trainee, 0)
    adam = Adam(dict(trainee.named_parameters()), (0.0, 0.999), unit_norm=("W_dec",))
    adam.step(dict.fromkeys(adam.parameters, 0.1))
    torch.testing.assert_close(trainee.W_dec.abs(), torch.ones(5, 1))


def test_atoms_keep_their_norm_and_move_along_the_sphere():
    ours, theirs = trainees()
    adam = Adam(dict(ours.named_parameters()), (0.0, 0.999), 1e-8, unit_norm=("W_dec",))
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.0, 0.999))
    for step in range(10):
        set_gradients(ours, step), set_gradients(theirs, step)
        adam.step(dict.fromkeys(adam.parameters, 1e-2))
        with torch.no_grad():
            atoms, gradient = theirs.W_dec, theirs.W_dec.grad
            gradient -= (gradient * atoms).sum(-1, keepdim=True) * atoms
            reference.step()
            atoms /= atoms.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.W_enc, theirs.W_enc, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.W_dec.norm(dim=-1), torch.ones(40))


def test_a_parameter_without_a_gradient_stays():
    ours, theirs = trainees()
    set_gradients(ours, 0)
    ours.b_dec.grad = None
    Adam(dict(ours.named_parameters()), (0.0, 0.999)).step(
        dict.fromkeys(dict(ours.named_parameters()), 1e-2)
    )
    assert torch.equal(ours.b_dec, theirs.b_dec) and not torch.equal(ours.b_enc, theirs.b_enc)
    assert all(p.grad is None for p in ours.parameters())
