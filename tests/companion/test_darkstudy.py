"""Tables of the dark-matter notebooks: seeds put together rightly, known laws found again, features
in the order of tokens."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from companion.dark import darkstudy
from companion.rails.by_seed import statistic_at
from companion.rails.lm_loss import token_losses
from companion.rails.repeats import over_seeds
from models import random_ids, tiny_lm

import jumprelu as jr
from jumprelu.activations import activations_from_tensor
from jumprelu.corpus import Tokens
from jumprelu.dark.darkmatter import HeldOut, TokenNorms, decompose, split, stream
from jumprelu.dark.regression import Linear


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    x = torch.randn(1200, 5, generator=generator(1)) @ torch.randn(5, 5, generator=generator(2)) + 1
    return activations_from_tensor(
        x, tmp_path_factory.mktemp("acts") / "store", torch.arange(30).repeat_interleave(40)
    )


@pytest.fixture(scope="module")
def tests(acts):
    """Of six reconstructions with known FVU: (1 − shrink)² of the variance is left, all of it
    linear."""
    shrinks = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    found, _ = decompose(
        acts,
        {str(shrink): lambda x, shrink=shrink: shrink * (x - 1) + 1 for shrink in shrinks},
        split(acts),
    )
    return [one.test for one in found.values()]


def table(rows):
    return pd.DataFrame(rows, columns=["architecture", "seed", "l0", "d_sae"])


RUNS = table(
    [
        ("a", 0, 10.0, 8),
        ("a", 0, 40.0, 8),
        ("a", 1, 11.0, 8),
        ("a", 1, 44.0, 8),
        ("b", 0, 20.0, 8),
        ("b", 1, 22.0, 8),
    ]
)


def test_points_are_runs_that_differ_in_their_seed_only(tests):
    found = darkstudy.by_point(RUNS, tests, draws=50).set_index(
        ["architecture", "point", "quantity"]
    )
    assert found.loc[("a", 1, "fvu"), "l0"] == 42.0 and found.loc[("b", 0, "fvu"), "l0"] == 21.0
    expected = over_seeds([tests[1].fvu, tests[3].fvu], len(tests[1].tokens), 50)
    assert found.loc[("a", 1, "fvu"), ["mean", "low", "high"]].tolist() == pytest.approx(
        list(expected)
    )
    each = darkstudy.run_table(RUNS, tests)
    assert found.loc[("a", 0, "fvu"), "mean"] == pytest.approx(each.fvu[[0, 2]].mean())
    norms = darkstudy.by_point(RUNS, tests, 50, darkstudy.NORM_STATISTICS)
    assert norms.quantity.unique().tolist() == ["x", "sae", "error", "linear", "nonlinear"]


def test_a_statistic_at_one_l0(tests):
    once = torch.ones(1, len(tests[0].tokens), dtype=torch.float64)
    fvu = [test.fvu(once).item() for test in tests]
    found = [one(once).item() for one in statistic_at(RUNS, tests, "a", HeldOut.fvu, 20.0)]
    second = math.log(20 / 11) / math.log(4)
    assert found == pytest.approx([(fvu[0] + fvu[1]) / 2, fvu[2] * (1 - second) + fvu[3] * second])
    at_end = statistic_at(RUNS, tests, "b", HeldOut.fvu, 20.0)
    assert at_end[0](once).item() == pytest.approx(fvu[4]) and math.isnan(at_end[1](once).item())
    drawn = torch.rand(3, len(once[0]), generator=generator(5)).double()
    assert torch.allclose(at_end[0](drawn), tests[4].fvu(drawn))


def test_a_value_that_all_reach():
    assert darkstudy.shared_value(RUNS, ["a"], "l0") == pytest.approx(math.sqrt(11 * 40))
    assert math.isnan(
        darkstudy.shared_value(RUNS, ["a", "b"], "l0")
    )  # one run a seed has one value, and no two are equal


def known_errors(fvu, nonlinear):
    """What was held out of two documents whose errors have these FVU and FVU_nl, whichever are
    drawn."""
    one = torch.ones(2, dtype=torch.float64)
    x = torch.zeros(2, 1, dtype=torch.float64)
    share = torch.full((2, 1), fvu, dtype=torch.float64)
    left = torch.full((2, 1), nonlinear, dtype=torch.float64)
    empty = torch.zeros(2, 5, dtype=torch.float64)
    return HeldOut(one, x, one, 0 * x, share, left, empty, empty, empty)


def test_breakdown_of_known_laws_over_seeds():
    widths = [16, 32, 64, 128]
    rows = [(seed, width) for seed in (0, 1) for width in widths]
    runs = pd.DataFrame(rows, columns=["seed", "d_sae"])
    held = [known_errors(0.1 + 0.02 * seed + width**-0.5, 0.03) for seed, width in rows]
    found = darkstudy.breakdown_table(runs, held, draws=2).set_index(["component", "d_sae"])["mean"]
    assert found["offset"].item() == pytest.approx(0.11, abs=1e-4) and found[
        "exponent"
    ].item() == pytest.approx(0.5, abs=1e-3)
    assert found["miss"].item() == pytest.approx(1, abs=1e-3)
    for width in widths:
        assert found["absent", width] == pytest.approx(width**-0.5, abs=1e-3)
        assert found["linear", width] == pytest.approx(0.08, abs=1e-3) and found[
            "nonlinear", width
        ] == pytest.approx(0.03)


def test_a_direction_beside_the_latents(acts):
    """The error of this SAE is its dead direction: the direction that predicts it has nothing to do
    with the one latent."""
    sae = jr.SAE(
        torch.tensor([[1.0], [0], [0], [0], [0]]),
        torch.zeros(1),
        torch.tensor([[1.0, 0, 0, 0, 0]]),
        torch.zeros(5),
        torch.zeros(1),
    )
    weight = torch.zeros(5, 5, dtype=torch.float64)
    weight[0, 2] = 0.25
    found = darkstudy.direction_table(sae, acts, split(acts), Linear(weight, torch.zeros(5)))
    x = torch.cat([rows.x for rows in stream(acts, split(acts), "fit")])[:, 0]
    assert found.along.tolist() == [0.25]
    assert found.active_mean.item() == pytest.approx(x[x > 0].mean().item(), rel=1e-5)
    assert found.frequency.item() == pytest.approx((x > 0).double().mean().item())


def test_errors_of_a_wide_sae_from_those_of_a_narrow_one():
    n, g = 6000, generator(4)
    narrow = torch.rand(n, 2, generator=g) + 1
    wide = 0.5 * narrow + 0.1 + 0.05 * torch.randn(n, 2, generator=g)
    document = torch.arange(n) % 40
    norms = TokenNorms(
        torch.stack([narrow[:, 0], wide[:, 0], narrow[:, 1], wide[:, 1]], -1),
        torch.rand(n, 4, generator=g),
        torch.rand(n, generator=g),
        document,
        torch.where(document < 24, document % 4, -1),
        document,
    )
    runs = table(
        [("TopK", 0, 4.0, 8), ("TopK", 0, 4.0, 32), ("TopK", 1, 4.0, 8), ("TopK", 1, 4.0, 32)]
    )
    found = darkstudy.pair_table(runs, norms, draws=20).set_index(["narrow", "wide", "quantity"])[
        "mean"
    ]
    explained = (0.25 / 12) / (0.25 / 12 + 0.05**2)
    assert found[8, 32, "error"] == pytest.approx(explained, abs=0.02)
    assert (
        abs(found[8, 32, "nonlinear"]) < 0.01 and abs(found[32, 32, "x"]) < 0.01 and len(found) == 4
    )


def test_features_of_tokens_are_in_the_order_of_the_store(tmp_path):
    lm = tiny_lm()
    tokens = Tokens(random_ids(6, 12), torch.arange(6))
    store = jr.harvest(lm, tokens, layer=0, out=tmp_path / "store", shard_rows=2)
    config = jr.TrainConfig(architecture="topk", k=3, d_sae=16, steps=1)
    sae = darkstudy.random_sae(store, config)
    found = darkstudy.token_features(store, sae, lm, tokens, split(store, 0.5, 2))
    assert len(found) == len(store) == 6 * 11  # BOS is not there
    losses = token_losses(lm, tokens.ids)
    assert np.isnan(found.loss.to_numpy().reshape(6, 11)[:, -1]).all()
    assert found.loss.to_numpy().reshape(6, 11)[:, :-1] == pytest.approx(losses[:, 1:].numpy())
    x = torch.cat([shard.activations for shard in store.shards()])
    assert found.x.tolist() == pytest.approx(x.norm(dim=-1).tolist())
    assert found.l0.tolist() == (sae.encode(x) > 0).sum(-1).tolist()
    later = darkstudy.token_features(store, sae, lm, tokens, split(store, 0.5, 2, start=4))
    assert len(later) == 6 * 8 and later.x.tolist() == pytest.approx(
        x.view(6, 11, -1)[:, 3:].norm(dim=-1).flatten().tolist()
    )


def test_controls_that_learned_nothing(acts, tmp_path):
    loose = darkstudy.shuffled(acts, tmp_path / "loose")
    before, after = (
        torch.cat([shard.activations for shard in one.shards()]) for one in (acts, loose)
    )
    assert torch.equal(before.sort(0).values, after.sort(0).values) and not torch.equal(
        before, after
    )
    correlated, apart = (torch.corrcoef(x.T).fill_diagonal_(0).abs().max() for x in (before, after))
    assert correlated > 0.3 and apart < 0.12
    config = jr.TrainConfig(architecture="topk", k=2, d_sae=9, steps=1, seed=3)
    sae = darkstudy.random_sae(acts, config)
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(9)) and torch.allclose(
        sae.W_enc, sae.W_dec.T, atol=1e-6
    )
    assert torch.allclose(sae.b_dec, before.mean(0), atol=1e-5)
    assert torch.equal(darkstudy.random_sae(acts, config).W_dec, sae.W_dec)


def test_means_of_tokens_come_from_the_documents_for_fitting():
    y = torch.tensor([1.0, 3.0, 10.0, 100.0, 50.0])
    empty = torch.empty(0)
    norms = TokenNorms(
        empty,
        empty,
        empty,
        torch.arange(5),
        torch.tensor([0, 1, 0, -1, -1]),
        torch.tensor([7, 7, 2, 7, 4]),
    )
    assert darkstudy._means_by_id(y, norms).tolist() == pytest.approx([2, 2, 10, 2, 14 / 3])
