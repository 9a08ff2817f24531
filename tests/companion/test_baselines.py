"""Directions, neurons and random weights, which latents are compared with."""

import numpy as np
import pytest
import torch
from companion.reading.baselines import (
    activations,
    as_latents,
    neurons,
    random_directions,
    random_weights,
)

from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE, Origin
from tests.models import random_ids, tiny_model, tiny_tokenizer

PLACE = ("resid_post", 0)


@pytest.fixture(scope="module")
def setting():
    lm = LM(tiny_model("gemma2"), tiny_tokenizer(), "tiny")
    ids = random_ids(120, 20, seed=3) % 40 + 60
    ids[:, 0] = 2
    g = torch.Generator().manual_seed(1)
    W = torch.randn(30, lm.d_model, generator=g)
    sae = SAE(
        W.T,
        torch.zeros(30),
        W,
        torch.zeros(lm.d_model),
        8 * torch.rand(30, generator=g),
        origin=Origin("tiny", *PLACE),
    )
    sae.b_enc.data[7] = -1e9
    return lm, sae, Tokens(ids, torch.arange(120) // 3)


def test_directions_fire_as_often_as_asked_and_on_their_highest_projections():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 6, generator=g) + 5
    frequency = torch.tensor([0.1, 0.0, 0.25, 0.002])
    found = as_latents(x, 3 * torch.eye(6)[:4], frequency, Origin())
    f = found.encode(x).detach()
    np.testing.assert_allclose((f > 0).double().mean(0), frequency)
    for latent in (0, 2):
        highest = x[:, latent].topk(int(1000 * frequency[latent])).indices
        assert set((f[:, latent] > 0).nonzero()[:, 0].tolist()) == set(highest.tolist())
    torch.testing.assert_close(f[f[:, 0] > 0, 0], (x - x.mean(0))[f[:, 0] > 0, 0])
    often = as_latents(x, torch.eye(6), torch.full((6,), 0.9), Origin())
    torch.testing.assert_close(often.encode(x).detach(), (x - x.mean(0)).relu())


def test_random_directions_and_neurons_fire_as_often_as_the_saes_latents(setting):
    lm, sae, tokens = setting
    x = activations(lm, tokens, *PLACE)
    assert x.shape == (120 * 19, lm.d_model)
    frequency = (sae.encode(x) > 0).double().mean(0)
    found = random_directions(sae, x)
    below_half = frequency < 0.4
    torch.testing.assert_close(
        (found.encode(x) > 0).double().mean(0)[below_half],
        frequency[below_half],
        atol=0.002,
        rtol=0,
    )
    assert (found.W_dec.norm(dim=1) - 1).abs().max() < 1e-5 and (
        found.origin.site,
        found.origin.layer,
    ) == PLACE
    basis = neurons(sae, x)
    assert torch.equal(basis.W_dec, torch.eye(lm.d_model))
    fires = (basis.encode(x) > 0).double().mean(0)
    assert all(min(abs(frequency - f)) < 0.002 or f > 0.4 for f in fires)


def test_a_model_with_random_weights_is_another_and_leaves_the_generator_alone(setting):
    lm, _, tokens = setting
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = random_weights(lm), random_weights(lm), random_weights(lm, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.fingerprint == again.fingerprint != other.fingerprint != lm.fingerprint
    assert (
        one.tokenizer is lm.tokenizer
        and one.d_model == lm.d_model
        and activations(one, tokens[:2], *PLACE).isfinite().all()
    )
