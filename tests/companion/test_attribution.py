"""r_L0 by hand, and attributions against finite differences of the model's own logits."""

from __future__ import annotations

import math

import pytest
import torch
from companion.rails.attribution import _attributions, _draw, token_uniformity, uniformity
from models import random_ids, tiny_lm

from jumprelu.sae import SAE, Origin
from jumprelu.sites import capture
from jumprelu.splicing import splice

PLACES = [("resid_post", 1), ("mlp_out", 0), ("attn_out", 2)]


def an_sae(lm, site, layer, d_sae=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    d_in = capture(lm, [(site, layer)], random_ids(1, 2))[site, layer].shape[-1]
    W = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=-1)
    return SAE(
        W.T,
        torch.zeros(d_sae),
        W,
        torch.zeros(d_in),
        torch.full((d_sae,), 0.05),
        origin=Origin("tiny", site, layer),
    )


def test_uniformity_by_hand():
    y = torch.tensor(
        [[1.0, -1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    found = uniformity(y)
    two = 4 / 3**0.75 / 2  # p = (3/4, 1/4): exp(entropy) = 4 / 3^(3/4), of two that are active
    assert found[:3].tolist() == pytest.approx([1.0, 1.0, two])
    assert found[3].isnan()


def test_one_latent_among_many_that_hardly_matter_comes_near_one_over_l0():
    y = torch.full((10,), 1e-9)
    y[0] = 1
    assert uniformity(y).item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_an_attribution_is_what_the_objective_loses_by_a_small_change_of_the_latent(site, layer):
    lm = tiny_lm()
    lm.model.double()
    sae = an_sae(lm, site, layer).double()
    ids = random_ids(2, 9)
    keep = ids != 2
    position = torch.tensor([3, 6])
    y = _attributions(sae, lm, ids, keep, position, site, layer)

    def objective(row: int, latent: int, change: float) -> float:
        def replace(value):
            x = value[keep].double()
            f = sae.encode(x)
            own = (keep.flatten().cumsum(0) - 1).view(keep.shape)[row, position[row]]
            f[own, latent] *= 1 + change
            return value.index_put((keep,), sae.decode(f).to(value.dtype))

        with torch.no_grad(), splice(lm, site, layer, replace):
            logits = lm.model(ids, use_cache=False).logits[row, position[row]]
        return (logits[ids[row, position[row] + 1]] - logits.mean()).item()

    checked = 0
    for row in range(2):
        for latent in y[row].abs().topk(2).indices.tolist():
            slope = (
                objective(row, latent, 0.01) - objective(row, latent, -0.01)
            ) / 0.02  # Gemma norms in float32
            assert slope == pytest.approx(y[row, latent].item(), rel=1e-3, abs=1e-5)
            checked += y[row, latent].item() != 0
    assert checked >= 2


@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_resuming_behind_known_blocks_changes_nothing(site, layer):
    lm = tiny_lm()
    sae, ids = an_sae(lm, site, layer), random_ids(5, 12)
    found = token_uniformity(sae, lm, ids, per_row=2, seed=1, batch_rows=2)
    drawn = _draw(torch.ones(5, 11, dtype=torch.bool) & (ids[:, :-1] != 2), 2, 1)
    keep = ids != 2
    by_hand = {}
    for k in range(2):
        y = _attributions(sae, lm, ids, keep, drawn[:, k], site, layer)
        by_hand |= {(row, k): uniformity(y)[row].item() for row in range(5)}
    order = [(row, k) for rows in ([0, 1], [2, 3], [4]) for k in range(2) for row in rows]
    assert found.row.tolist() == [row for row, _ in order]
    expected = torch.tensor([by_hand[key] for key in order], dtype=torch.float64)
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    alive = ~found.value.isnan()
    assert (
        alive.any()
        and (found.value[alive] <= 1 + 1e-9).all()
        and (found.value[alive] * found.l0[alive] >= 1 - 1e-9).all()
    )


def test_the_mean_is_over_tokens_of_the_rows_that_were_drawn():
    lm = tiny_lm()
    found = token_uniformity(an_sae(lm, "resid_post", 1), lm, random_ids(3, 8), per_row=2)
    mean = found.mean(torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]], dtype=torch.float64))
    assert mean[0].item() == pytest.approx(found.value.nanmean().item())
    assert mean[1].item() == pytest.approx(found.value[found.row == 1].nanmean().item())
    assert math.isfinite(mean[0])


def test_positions_are_drawn_where_there_is_something_to_predict():
    allowed = torch.tensor([[False, True, True, False], [True, True, False, True]])
    drawn = _draw(allowed, 2, 0)
    assert sorted(drawn[0].tolist()) == [1, 2] and len(set(drawn[1].tolist())) == 2
    assert allowed.gather(1, drawn).all()
    with pytest.raises(ValueError, match="smaller per_row"):
        _draw(allowed, 3, 0)


def test_an_sae_without_a_place_is_refused():
    lm = tiny_lm()
    sae = an_sae(lm, "resid_post", 1)
    sae.origin = Origin()
    with pytest.raises(ValueError, match="does not remember"):
        token_uniformity(sae, lm, random_ids(2, 8))
