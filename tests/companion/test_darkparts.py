"""What the nonlinear error is: stores of its parts, and what they do, against the same by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from companion.dark.darkparts import (
    OnPart,
    Source,
    error_part,
    harm_table,
    purity,
    pursue_all,
    pursuit_table,
    source_table,
)
from companion.dark.darkstudy import random_sae
from companion.dark.downstream import splice_variants
from companion.dark.errors import regress_errors
from models import random_ids, tiny_lm

import jumprelu as jr
from jumprelu.activations import activations_from_tensor, open_activations
from jumprelu.corpus import Tokens
from jumprelu.dark.darkmatter import decompose, linear_error, nonlinear_error, split
from jumprelu.dark.pursuit import pursue
from jumprelu.dark.regression import Linear
from jumprelu.store import add_shard, start_store


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    x = torch.randn(1200, 5, generator=generator(1)) @ torch.randn(5, 5, generator=generator(2)) + 1
    return activations_from_tensor(
        x,
        tmp_path_factory.mktemp("acts") / "store",
        torch.arange(30).repeat_interleave(40),
        shard_rows=500,
    )


def small_sae(seed, d_in=5, d_sae=12, threshold=0.3):
    atoms = F.normalize(torch.randn(d_sae, d_in, generator=generator(seed)), dim=-1)
    return jr.SAE(
        atoms.T * 0.8, torch.zeros(d_sae), atoms, torch.zeros(d_in), torch.full((d_sae,), threshold)
    )


def with_ids(store, ids, out):
    """The same store with these tokens; its shards are rewritten."""
    index = start_store(out, dict(store.index["request"]), None, store.d_in, 1)
    (shard,) = store.shards()
    add_shard(out, index, 0, shard._replace(ids=ids))
    return open_activations(out)


def test_a_store_of_part_of_an_error(acts, tmp_path):
    config = jr.TrainConfig(architecture="topk", k=2, d_sae=9, steps=1)
    sae = random_sae(acts, config)
    linear = decompose(acts, {"sae": sae}, split(acts))[0]["sae"].linear
    parts = {
        part: error_part(acts, sae, linear, part, tmp_path / part)
        for part in ("linear", "nonlinear")
    }
    x, one, other = (
        torch.cat([shard.activations for shard in store.shards()])
        for store in (acts, *parts.values())
    )
    assert torch.allclose(sae(x) + one + other, x, atol=1e-5)
    assert torch.allclose(one.double(), linear(x), atol=1e-5)
    assert [shard.document.tolist() for shard in parts["linear"].shards()] == [
        shard.document.tolist() for shard in acts.shards()
    ]


@pytest.mark.parametrize("part", ["linear", "nonlinear"])
def test_an_sae_of_a_part_of_the_error_reads_x(acts, tmp_path, part):
    sae, second = small_sae(4), small_sae(5)
    linear = decompose(acts, {"sae": sae}, split(acts))[0]["sae"].linear
    stored = torch.cat(
        [
            shard.activations
            for shard in error_part(acts, sae, linear, part, tmp_path / part).shards()
        ]
    )
    wrapped = OnPart(second, sae, linear, part)
    x = torch.cat([shard.activations for shard in acts.shards()])
    torch.testing.assert_close(wrapped.encode(x), second.encode(stored), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapped.encode(x, sparse=True).to_dense(), wrapped.encode(x))
    others = [
        OnPart(second, small_sae(6), linear, part),
        OnPart(small_sae(6), sae, linear, part),
        second,
    ]
    assert len({one.fingerprint for one in (wrapped, *others)}) == 4


def test_purity_of_latents_that_stand_for_tokens(tmp_path):
    """The first two latents fire on one token each, the third on all; the fourth on too few to
    count."""
    ids = torch.arange(300, dtype=torch.int32) % 3
    x = torch.eye(5)[ids.long()] + 0.01 * torch.rand(300, 5, generator=generator(3))
    x[:4, 3] = 5.0
    store = activations_from_tensor(x, tmp_path / "x")
    store = with_ids(store, ids, tmp_path / "ids")
    W_enc = torch.zeros(5, 4)
    W_enc[0, 0] = W_enc[1, 1] = W_enc[3, 3] = 1
    W_enc[4, 2] = 1  # noise alone
    sae = jr.SAE(
        W_enc, torch.zeros(4), W_enc.T.clone(), torch.zeros(5), torch.tensor([0.5, 0.5, 0.0, 1.0])
    )
    found = purity(sae, store, top=20).set_index("latent")
    assert found.index.tolist() == [0, 1, 2]
    assert found.purity[0] == found.purity[1] == 1.0 and found.purity[2] < 0.75
    assert 0.4 < found.chance.iloc[0] < 0.6  # of 20 tokens of three kinds


def test_an_interrupted_store_of_an_error_goes_on(acts, tmp_path):
    sae = small_sae(0)
    linear = decompose(acts, {"sae": sae}, split(acts))[0]["sae"].linear
    error_part(acts, sae, linear, "nonlinear", tmp_path)
    shards = sorted(tmp_path.glob("shard-*"))
    before = [shard.read_bytes() for shard in shards]
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    error_part(acts, sae, linear, "nonlinear", tmp_path)
    assert [shard.read_bytes() for shard in shards] == before and shards[
        0
    ].stat().st_mtime_ns == kept


def values(table, *index):
    return table.set_index(list(index))["mean"]


def test_harm_and_size_of_the_parts_by_hand():
    lm = tiny_lm()
    tokens = Tokens(random_ids(5, 14), torch.tensor([3, 3, 7, 7, 9]))
    saes = [small_sae(seed, lm.d_model, 40, 0.2) for seed in (0, 1)]
    g = generator(7)
    linears = [
        Linear(
            torch.randn(lm.d_model, lm.d_model, generator=g).double() * 0.1,
            torch.zeros(lm.d_model).double(),
        )
        for _ in saes
    ]
    found = values(
        harm_table(lm, tokens, saes, linears, "resid_post", 1, 3, draws=20), "missing", "quantity"
    )
    once, expected = torch.ones(1, 3, dtype=torch.float64), []
    for sae, linear in zip(saes, linears, strict=True):
        variants = {
            "none": sae,
            "with linear": lambda x, sae=sae, linear=linear: sae(x) + linear_error(x, linear),
            "with nonlinear": lambda x, sae=sae, linear=linear: (
                sae(x) + nonlinear_error(x, sae, linear)
            ),
        }
        one = splice_variants(lm, tokens, variants, "resid_post", 1, 3)
        rise = {name: one.rise(once, name).item() for name in variants}
        sizes, other = ((one.missing[n].sum() / one.missing[0].sum()).item() for n in (1, 2))
        alone, restored = (
            rise["with linear"] / rise["none"],
            1 - rise["with nonlinear"] / rise["none"],
        )
        harm = (alone + restored) / 2
        expected.append((alone, restored, harm, sizes, harm / sizes, other, restored / sizes))
    alone, restored, harm, size, ratio, other, given_back = torch.tensor(expected).mean(0).tolist()
    assert found["nonlinear", "alone"] == pytest.approx(alone, rel=1e-5)
    assert found["nonlinear", "restored"] == pytest.approx(restored, rel=1e-5)
    assert found["nonlinear", "harm"] == pytest.approx(harm, rel=1e-5)
    assert found["nonlinear", "size"] == pytest.approx(size, rel=1e-5)
    assert found["nonlinear", "harm over size"] == pytest.approx(ratio, rel=1e-5)
    assert found["linear", "harm"] == pytest.approx(1 - harm, rel=1e-5)
    assert found["linear", "size"] == pytest.approx(other, rel=1e-5)
    assert abs(other + size - 1) > 0.01  # these maps are not least squares
    assert found["nonlinear", "restored over size"] == pytest.approx(given_back, rel=1e-5)


def test_pursuit_beside_the_encoder(acts):
    parts = split(acts)
    saes = [small_sae(0), small_sae(1), small_sae(2, d_sae=20)]
    pursued = pursue_all(saes, acts, parts)
    found = values(pursuit_table([12, 12, 20], pursued, draws=20), "d_sae", "quantity")
    x = torch.cat(
        [
            rows.activations[
                parts.fold[torch.searchsorted(parts.documents, rows.document.long())] < 0
            ]
            for rows in acts.shards()
        ]
    )
    with torch.no_grad():
        ratios = [
            ((x - sae.decode(pursue(sae, x))).square().sum() / (x - sae(x)).square().sum()).item()
            for sae in saes
        ]
    assert found[12, "fvu"] == pytest.approx((ratios[0] + ratios[1]) / 2, rel=1e-4)
    assert found[20, "fvu"] == pytest.approx(ratios[2], rel=1e-4) and ratios[2] < 1


def test_what_other_places_explain_beyond_pursuit(acts):
    parts = split(acts)
    saes, others = [small_sae(0), small_sae(1)], [small_sae(5), small_sae(6)]
    pursued = pursue_all(saes, acts, parts)
    sources = {"other": [Source(acts, sae) for sae in others]}
    found = values(source_table(acts, saes, sources, pursued, parts, draws=20), "source", "vector")
    once = torch.ones(1, len(pursued[0].encoder.tokens), dtype=torch.float64)
    r2, removed = [], []
    for sae, other, one in zip(saes, others, pursued, strict=True):
        r2.append(
            regress_errors(acts, sae, one.linear, acts, other, parts)["nonlinear"].r2(once).item()
        )
        removed.append(
            1 - one.pursuit.fvu_nonlinear(once).item() / one.encoder.fvu_nonlinear(once).item()
        )
    assert found["other", "nonlinear"] == pytest.approx(sum(r2) / 2)
    assert found["other", "beyond pursuit"] == pytest.approx((sum(r2) - sum(removed)) / 2)
