"""Tables of the dark-matter notebooks: seeds put together rightly, known laws found again, features in the order of tokens."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from models import random_ids, tiny_lm

import jumprelu as jr
from jumprelu import darkstudy
from jumprelu.activations import activations_from_tensor, add_shard, open_activations, start_store
from jumprelu.corpus import Tokens
from jumprelu.darkmatter import TokenNorms, decompose, over_seeds, split
from jumprelu.language import token_losses


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    x = torch.randn(1200, 5, generator=generator(1)) @ torch.randn(5, 5, generator=generator(2)) + 1
    return activations_from_tensor(x, tmp_path_factory.mktemp("acts") / "store", torch.arange(30).repeat_interleave(40))


@pytest.fixture(scope="module")
def tests(acts):
    """Of six reconstructions with known FVU: (1 − shrink)² of the variance is left, all of it linear."""
    shrinks = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    found, _ = decompose(acts, {str(shrink): lambda x, shrink=shrink: shrink * (x - 1) + 1 for shrink in shrinks}, split(acts))
    return [one.test for one in found.values()]


def with_ids(store, ids, out):
    """The same store with these tokens; its shards are rewritten."""
    index = start_store(out, dict(store.index["request"]), None, store.d_in, 1)
    (shard,) = store.shards()
    add_shard(out, index, 0, shard._replace(ids=ids))
    return open_activations(out)


def table(rows):
    return pd.DataFrame(rows, columns=["architecture", "seed", "l0", "d_sae"])


RUNS = table([("a", 0, 10.0, 8), ("a", 0, 40.0, 8), ("a", 1, 11.0, 8), ("a", 1, 44.0, 8), ("b", 0, 20.0, 8), ("b", 1, 22.0, 8)])


def test_points_are_runs_that_differ_in_their_seed_only(tests):
    found = darkstudy.by_point(RUNS, tests, draws=50).set_index(["architecture", "point", "quantity"])
    assert found.loc[("a", 1, "fvu"), "l0"] == 42.0 and found.loc[("b", 0, "fvu"), "l0"] == 21.0
    expected = over_seeds([tests[1], tests[3]], darkstudy.STATISTICS["fvu"], 50)
    assert found.loc[("a", 1, "fvu"), ["mean", "low", "high"]].tolist() == pytest.approx(list(expected))
    each = darkstudy.run_table(RUNS, tests)
    assert found.loc[("a", 0, "fvu"), "mean"] == pytest.approx(each.fvu[[0, 2]].mean())
    norms = darkstudy.by_point(RUNS, tests, 50, darkstudy.NORM_STATISTICS)
    assert norms.quantity.unique().tolist() == ["x", "sae", "error", "linear", "nonlinear"]


def test_a_quantity_at_one_l0(tests):
    runs = RUNS.assign(r2=[0.2, 0.6, 0.1, 0.5, 0.9, 0.9])
    found = darkstudy.at_one_l0(runs, "a", "r2", 20.0)
    assert found == pytest.approx([0.4, 0.1 + 0.4 * math.log(20 / 11) / math.log(4)])
    assert math.isnan(darkstudy.at_one_l0(runs, "b", "r2", 20.0)[1])


def test_breakdown_of_known_laws_over_seeds():
    widths = [16, 32, 64, 128]
    rows = [(seed, width, 0.1 + 0.02 * seed + width**-0.5, 0.03) for seed in (0, 1) for width in widths]
    runs = pd.DataFrame(rows, columns=["seed", "d_sae", "fvu", "fvu_nonlinear"])
    found = darkstudy.breakdown_table(runs).set_index(["component", "d_sae"])["mean"]
    assert found["offset"].item() == pytest.approx(0.11, abs=1e-4) and found["exponent"].item() == pytest.approx(0.5, abs=1e-3)
    assert found["miss"].item() == pytest.approx(1, abs=1e-3)
    for width in widths:
        assert found["absent", width] == pytest.approx(width**-0.5, abs=1e-3)
        assert found["linear", width] == pytest.approx(0.08, abs=1e-3) and found["nonlinear", width] == pytest.approx(0.03)


def test_errors_of_a_wide_sae_from_those_of_a_narrow_one():
    n, g = 6000, generator(4)
    narrow = torch.rand(n, 2, generator=g) + 1
    wide = 0.5 * narrow + 0.1 + 0.05 * torch.randn(n, 2, generator=g)
    document = torch.arange(n) % 40
    norms = TokenNorms(torch.stack([narrow[:, 0], wide[:, 0], narrow[:, 1], wide[:, 1]], -1), torch.rand(n, 4, generator=g),
                       torch.rand(n, generator=g), document, torch.where(document < 24, document % 4, -1), document)  # fmt: skip
    runs = table([("TopK", 0, 4.0, 8), ("TopK", 0, 4.0, 32), ("TopK", 1, 4.0, 8), ("TopK", 1, 4.0, 32)])
    found = darkstudy.pair_table(runs, norms, draws=20).set_index(["narrow", "wide", "quantity"])["mean"]
    explained = (0.25 / 12) / (0.25 / 12 + 0.05**2)
    assert found[8, 32, "error"] == pytest.approx(explained, abs=0.02)
    assert abs(found[8, 32, "nonlinear"]) < 0.01 and abs(found[32, 32, "x"]) < 0.01 and len(found) == 4


def test_features_of_tokens_are_in_the_order_of_the_store(tmp_path):
    lm = tiny_lm()
    tokens = Tokens(random_ids(6, 12), torch.arange(6))
    store = jr.harvest(lm, tokens, layer=0, out=tmp_path / "store", shard_rows=2)
    config = jr.TrainConfig(architecture="topk", k=3, d_sae=16, steps=1)
    sae = darkstudy.random_sae(store, config)
    found = darkstudy.token_features(store, sae, lm, tokens)
    assert len(found) == len(store) == 6 * 11  # BOS is not there
    losses = token_losses(lm, tokens.ids)
    assert np.isnan(found.loss.to_numpy().reshape(6, 11)[:, -1]).all()
    assert found.loss.to_numpy().reshape(6, 11)[:, :-1] == pytest.approx(losses[:, 1:].numpy())
    x = torch.cat([shard.activations for shard in store.shards()])
    assert found.x.tolist() == pytest.approx(x.norm(dim=-1).tolist())
    assert found.l0.tolist() == (sae.encode(x) > 0).sum(-1).tolist()


def test_controls_that_learned_nothing(acts, tmp_path):
    loose = darkstudy.shuffled(acts, tmp_path / "loose")
    before, after = (torch.cat([shard.activations for shard in one.shards()]) for one in (acts, loose))
    assert torch.equal(before.sort(0).values, after.sort(0).values) and not torch.equal(before, after)
    correlated, apart = (torch.corrcoef(x.T).fill_diagonal_(0).abs().max() for x in (before, after))
    assert correlated > 0.3 and apart < 0.12
    config = jr.TrainConfig(architecture="topk", k=2, d_sae=9, steps=1, seed=3)
    sae = darkstudy.random_sae(acts, config)
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(9)) and torch.allclose(sae.W_enc, sae.W_dec.T, atol=1e-6)
    assert torch.allclose(sae.b_dec, before.mean(0), atol=1e-5)
    assert torch.equal(darkstudy.random_sae(acts, config).W_dec, sae.W_dec)


def test_means_of_tokens_come_from_the_documents_for_fitting():
    y = torch.tensor([1.0, 3.0, 10.0, 100.0, 50.0])
    empty = torch.empty(0)
    norms = TokenNorms(empty, empty, empty, torch.arange(5), torch.tensor([0, 1, 0, -1, -1]), torch.tensor([7, 7, 2, 7, 4]))
    assert darkstudy._means_by_id(y, norms).tolist() == pytest.approx([2, 2, 10, 2, 14 / 3])


def test_a_store_of_part_of_an_error(acts, tmp_path):
    config = jr.TrainConfig(architecture="topk", k=2, d_sae=9, steps=1)
    sae = darkstudy.random_sae(acts, config)
    linear = decompose(acts, {"sae": sae}, split(acts))[0]["sae"].linear
    parts = {part: darkstudy.error_part(acts, sae, linear, part, tmp_path / part) for part in ("linear", "nonlinear")}
    x, one, other = (torch.cat([shard.activations for shard in store.shards()]) for store in (acts, *parts.values()))
    assert torch.allclose(sae(x) + one + other, x, atol=1e-5)
    assert torch.allclose(one.double(), linear(x), atol=1e-5)
    assert [shard.document.tolist() for shard in parts["linear"].shards()] == [shard.document.tolist() for shard in acts.shards()]


def test_purity_of_latents_that_stand_for_tokens(tmp_path):
    """The first two latents fire on one token each, the third on all; the fourth on too few to count."""
    ids = torch.arange(300, dtype=torch.int32) % 3
    x = torch.eye(5)[ids.long()] + 0.01 * torch.rand(300, 5, generator=generator(3))
    x[:4, 3] = 5.0
    store = activations_from_tensor(x, tmp_path / "x")
    store = with_ids(store, ids, tmp_path / "ids")
    W_enc = torch.zeros(5, 4)
    W_enc[0, 0] = W_enc[1, 1] = W_enc[3, 3] = 1
    W_enc[4, 2] = 1  # noise alone
    sae = jr.SAE(W_enc, torch.zeros(4), W_enc.T.clone(), torch.zeros(5), torch.tensor([0.5, 0.5, 0.0, 1.0]))
    found = darkstudy.purity(sae, store, top=20).set_index("latent")
    assert found.index.tolist() == [0, 1, 2]
    assert found.purity[0] == found.purity[1] == 1.0 and found.purity[2] < 0.75
    assert 0.4 < found.chance.iloc[0] < 0.6  # of 20 tokens of three kinds
