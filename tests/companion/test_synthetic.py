"""Known features and known noise: the truth by hand, and limits in which the split of the error is
known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from companion.dark.synthetic import Shares, absent_part, shares_table, synthetic_table, truth

import jumprelu as jr
from jumprelu.activations import activations_from_tensor
from jumprelu.dark.darkmatter import split

D_IN, D_SAE = 8, 24


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    x = torch.randn(6000, D_IN, generator=torch.Generator().manual_seed(1)) + 0.5
    return activations_from_tensor(
        x, tmp_path_factory.mktemp("acts") / "store", torch.arange(60).repeat_interleave(100)
    )


@pytest.fixture(scope="module")
def sae():
    atoms = F.normalize(
        torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    return jr.SAE(
        atoms.T, torch.zeros(D_SAE), atoms, torch.full((D_IN,), 0.1), torch.full((D_SAE,), 0.8)
    )


@pytest.fixture(scope="module")
def known(acts, sae):
    return truth(acts, sae, split(acts), 5000)


def test_the_truth_is_what_the_sae_makes_of_the_tokens(acts, sae, known):
    x = torch.cat([shard.activations for shard in acts.shards()])[:5000]
    assert torch.allclose(known.s, sae(x), atol=1e-5) and known.fold.shape == (5000,)
    assert torch.allclose(known.code.to_dense(), sae.encode(x), atol=1e-6)
    with pytest.raises(
        ValueError, match="the first 90 tokens have no documents to test on, or too few"
    ):
        truth(acts, sae, split(acts), 90)


def test_absent_features_are_some_latents_in_whole(known, sae):
    for share in (0.1, 0.5):
        part = absent_part(known, sae, share)
        code = known.code.to_dense()
        variance = [(v - v.mean(0)).square().sum() for v in (part, known.s)]
        assert share <= variance[0] / variance[1] < share + 0.25
        chosen = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
        sums = [
            torch.zeros_like(code).index_copy(1, chosen[:n], code[:, chosen[:n]])
            @ sae.W_dec.detach()
            for n in range(D_SAE)
        ]
        assert min((one - part).abs().max() for one in sums) < 1e-5
    assert not absent_part(known, sae, 0.0).any()


def rows(known, sae, **levels):
    return shares_table(known, sae, {"input": [0], "absent": [0], "output": [0]} | levels)


def test_nothing_added_is_no_error(known, sae):
    found = rows(known, sae)
    assert found.columns.tolist() == list(Shares._fields) and found.iloc[0].abs().max() < 1e-9


def test_noise_in_the_output_is_nonlinear_error_alone(known, sae):
    found = rows(known, sae, output=[0.1, 0.3])
    assert found.fvu.tolist() == pytest.approx([0.1, 0.3], rel=0.1)
    assert found.fvu_nonlinear.tolist() == pytest.approx(found.fvu.tolist(), rel=0.02)


def test_noise_in_the_input_is_split_as_least_squares_of_known_covariances_say(known, sae):
    """error = noise, x = s + noise: of it Σ_noise (Σ_s + Σ_noise)⁻¹ Σ_noise is linear in x, with an
    intercept."""
    found = rows(known, sae, input=[0.5]).iloc[0]
    s = known.s - known.s.mean(0)
    covariance = s.T @ s / len(s)
    dense = 0.5 * covariance.trace() / D_IN * torch.eye(D_IN)
    linear = (dense @ torch.linalg.inv(covariance + dense) @ dense).trace() / (
        covariance + dense
    ).trace()
    assert found.fvu_linear == pytest.approx(linear.item(), rel=0.1)
    assert found.input == pytest.approx(
        (dense.trace() / (covariance + dense).trace()).item(), rel=0.05
    )


def test_every_combination_has_a_row(acts, sae):
    found = synthetic_table(
        acts, sae, split(acts), {"input": [0, 0.1], "absent": [0, 0.2], "output": [0, 0.1]}, 5000
    )
    assert (
        len(found) == 8
        and (
            found.fvu_nonlinear[1::2].to_numpy() > found.fvu_nonlinear[::2].to_numpy() + 0.05
        ).all()
    )
    assert found.fvu.tolist() == pytest.approx((found.fvu_linear + found.fvu_nonlinear).tolist())
    with pytest.raises(ValueError, match="expected exactly input, absent, output"):
        synthetic_table(acts, sae, split(acts), {"noise": [0]}, 5000)
