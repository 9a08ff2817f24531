"""Descriptions of latents by hand, against pandas on the dense activations, and on a small
model."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from companion.rails.repeats import mean_interval
from companion.training import describe
from companion.training.describe import (
    DESCRIPTORS,
    LatentSums,
    describe_latents,
    explained_share,
    log_bins,
)
from companion.training.frequency import (
    beside_reference,
    excess_right,
    extreme_share,
    frequency_bands,
    frequency_histogram,
    nearest_runs,
    values_at,
)
from scipy import stats

from jumprelu.corpus import Tokens
from jumprelu.sae import SAE, Origin
from jumprelu.sites import capture
from tests.models import random_ids, tiny_lm


def share(f, group):
    """ε² of activations f, [tokens, latents], from the definition: adjusted R² of the groups'
    means."""
    f = pd.DataFrame(np.asarray(f, dtype=float))
    groups = f.groupby(np.asarray(group))
    n, g = len(f), groups.ngroups
    within = ((f - groups.transform("mean")) ** 2).sum() / (n - g)
    return (1 - within / (((f - f.mean()) ** 2).sum() / (n - 1))).to_numpy()


def described(x, f, W_dec=None, directions=1, latents=None, batches=1, **groups):
    W_dec = torch.eye(f.shape[1], x.shape[1]) if W_dec is None else W_dec
    sums = LatentSums(
        W_dec, {name: int(group.max()) + 1 for name, group in groups.items()}, latents
    )
    for rows in torch.arange(len(x)).chunk(batches):
        sums.add(
            x[rows], f[rows].to_sparse(), **{name: group[rows] for name, group in groups.items()}
        )
    return sums.table(directions)


def test_latents_by_hand():
    token = torch.tensor([0, 0, 1, 1, 2, 2])
    x = torch.tensor(
        [[3.0, 4.0], [6.0, 8.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]
    )  # norms 5, 10, 1, 1, 2, 2
    f = torch.zeros(6, 5)
    f[:, 0] = 7.0 * (token == 1)  # fires for one id
    f[:, 1] = x.norm(dim=-1)
    f[:, 2] = torch.tensor(
        [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    )  # the same in every group: SS_between = 0
    f[:, 3] = 2.0  # does not vary; latent 4 is dead
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-4.0, -5.0], [0.0, 1.0]])
    table = described(x, f, W_dec, token=token, directions=2)
    assert table.latent.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(table.frequency, [1 / 3, 1, 1 / 2, 1, 0])
    np.testing.assert_allclose(table.mean_activation, [7, 21 / 6, 1, 2, np.nan])
    assert table.by_token[0] == pytest.approx(1)
    assert table.by_token[2] == pytest.approx(
        1 - (1.5 / 3) / (1.5 / 5)
    )  # below 0: less than chance
    assert table.by_token[3:].isna().all() and table.norm_correlation[3:].isna().all()
    assert table.norm_correlation[1] == pytest.approx(1)
    assert table.norm_correlation[0] == pytest.approx(np.corrcoef(f[:, 0], x.norm(dim=-1))[0, 1])
    length = np.hypot(12, 15)  # 6 x̄ = (12, 15)
    cosines = [
        12 / length,
        15 / length,
        27 / length / 2**0.5,
        -(48 + 75) / length / 41**0.5,
        15 / length,
    ]
    np.testing.assert_allclose(table.mean_cosine, cosines)
    np.testing.assert_allclose(table.top_direction, 1)  # two of two directions hold all of it
    energy = np.array([2 * 49, 4 * (25 + 100 + 1 + 1 + 4 + 4), 3 * 2, 6 * 4 * 41, 0])
    np.testing.assert_allclose(table.norm_share, energy / energy.sum())


def test_explained_share_is_zero_on_average_over_all_ways_to_deal_the_tokens():
    f, group = [0.0, 1.0, 5.0, 0.0, 2.0], torch.tensor([0, 0, 1, 1, 2])
    one_group_each = torch.nn.functional.one_hot(group, 4).double()  # the fourth has no token
    dealt = torch.tensor(list(itertools.permutations(f)), dtype=torch.float64).T
    found = explained_share(one_group_each.T @ dealt, one_group_each.sum(0), dealt.square().sum(0))
    assert found.mean().item() == pytest.approx(0, abs=1e-12) and found.std() > 0.1
    np.testing.assert_allclose(found, share(dealt, group), atol=1e-12)


def test_explained_share_needs_more_tokens_than_groups():
    f = torch.tensor([[0.1], [0.3], [0.7]], dtype=torch.float64)
    assert explained_share(f, torch.ones(3), f.square().sum(0)).isnan().all()


def test_a_latent_that_ignores_the_token_explains_nothing():
    g = torch.Generator().manual_seed(0)
    n, groups, latents = 3000, 600, 200
    f = (torch.randn(n, latents, generator=g) - 1).relu()
    token = torch.cat(
        [torch.arange(groups), torch.randint(0, groups, (n - groups,), generator=g)]
    )  # about 5 tokens each
    found = described(torch.randn(n, 4, generator=g), f, token=token).by_token
    assert abs(found.mean()) < 4 * found.std() / latents**0.5
    dense = pd.DataFrame(f.double().numpy())
    means = dense.groupby(token.numpy()).transform("mean")
    naive = ((means - dense.mean()) ** 2).sum() / (
        (dense - dense.mean()) ** 2
    ).sum()  # η², which the correction is for
    assert naive.mean() == pytest.approx((groups - 1) / (n - 1), rel=0.05)
    assert abs(found.mean()) < 0.01 * naive.mean()


@pytest.mark.parametrize("batches", [1, 7])
def test_sums_equal_a_dense_reference(batches):
    g = torch.Generator().manual_seed(1)
    n, d, d_sae = 400, 6, 15
    x = torch.randn(n, d, generator=g) * torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 1.0]) + 2
    token, position = (
        torch.randint(0, 30, (n,), generator=g),
        torch.randint(0, 5, (n,), generator=g),
    )
    W_dec = torch.randn(d_sae, d, generator=g)
    f = (x @ W_dec.T + token[:, None] / 10 - 3).relu()
    table = described(x, f, W_dec, directions=2, batches=batches, token=token, position=position)
    np.testing.assert_allclose(table.by_token, share(f, token), rtol=1e-8)
    np.testing.assert_allclose(table.by_position, share(f, position), rtol=1e-8)
    x, f, atoms = (t.double().numpy() for t in (x, f, W_dec))
    np.testing.assert_allclose(table.frequency, (f > 0).mean(0))
    np.testing.assert_allclose(table.mean_activation, f.sum(0) / (f > 0).sum(0))
    norms = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(table.norm_correlation, np.corrcoef(f.T, norms)[-1, :-1])
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    np.testing.assert_allclose(table.mean_cosine, unit @ x.mean(0) / np.linalg.norm(x.mean(0)))
    _, _, directions = np.linalg.svd(x - x.mean(0))
    np.testing.assert_allclose(table.top_direction, np.square(unit @ directions[:2].T).sum(1))
    written = np.square(f[:, :, None] * atoms).sum((0, 2))
    np.testing.assert_allclose(table.norm_share, written / written.sum())


def test_positions_fall_into_bins_of_equal_log_width():
    assert log_bins(torch.arange(7), 7, 3).tolist() == [
        0,
        1,
        1,
        2,
        2,
        2,
        2,
    ]  # 1 + position: 1 | 2 3 | 4 … 7 of 8
    everything = log_bins(torch.arange(256), 256, 16)
    assert everything.min() == 0 and everything.max() == 15 and (everything.diff() >= 0).all()


@pytest.fixture(scope="module")
def setting():
    lm = tiny_lm("gemma2")
    ids = random_ids(12, 16, seed=3) % 20 + 3  # of few ids, so that each comes several times
    ids[:, 0] = 2
    ids[4, 7] = 1  # an EOS in the middle: not counted, but the id before the next
    g = torch.Generator().manual_seed(1)
    sae = SAE(
        torch.randn(lm.d_model, 20, generator=g),
        torch.zeros(20),
        torch.randn(20, lm.d_model, generator=g),
        torch.zeros(lm.d_model),
        4 * torch.rand(20, generator=g),
        origin=Origin(site="resid_post", layer=1),
    )
    sae.b_enc.data[3] = -1e9
    return sae, lm, Tokens(ids, torch.arange(12))


def test_description_on_a_model(setting):
    sae, lm, tokens = setting
    table = describe_latents(sae, lm, tokens, position_bins=4, directions=2, batch_rows=5)
    assert list(table.columns) == ["latent", "frequency", *DESCRIPTORS] and len(table) == 20
    x = capture(lm, [("resid_post", 1)], tokens.ids)["resid_post", 1]
    keep = tokens.ids > 2
    assert (~keep).sum() == 12 + 1
    f = sae.encode(x)[keep].detach()
    np.testing.assert_allclose(table.frequency, (f > 0).double().mean(0))
    np.testing.assert_allclose(table.threshold, sae.threshold.detach())
    previous, position = tokens.ids.roll(1, 1), torch.arange(16).expand(12, 16)
    alive = table.frequency > 0
    assert (
        not alive[3]
        and table.loc[3, ["by_token", "norm_correlation", "mean_activation"]].isna().all()
    )
    for column, group in (
        ("by_token", tokens.ids),
        ("by_previous", previous),
        ("by_position", log_bins(position, 16, 4)),
    ):
        np.testing.assert_allclose(
            table[column][alive], share(f, group[keep])[alive], rtol=1e-4, err_msg=column
        )
    assert table.norm_share.sum() == pytest.approx(1)


def test_description_of_some_latents(setting):
    sae, lm, tokens = setting
    whole = describe_latents(sae, lm, tokens)
    some = describe_latents(sae, lm, tokens, latents=torch.tensor([11, 0, 3]), batch_rows=3)
    pd.testing.assert_frame_equal(some, whole.iloc[[11, 0, 3]].reset_index(drop=True), rtol=1e-5)


def test_a_row_without_bos_has_a_first_token_with_no_token_before_it(setting):
    sae, lm, _ = setting
    ids = random_ids(30, 6, seed=5, bos=False) % 7 + 3
    table = describe_latents(sae, lm, ids)
    f = sae.encode(capture(lm, [("resid_post", 1)], ids)["resid_post", 1]).detach().flatten(0, 1)
    previous = torch.cat([torch.full((30, 1), -1), ids[:, :-1]], 1).flatten()
    alive = table.frequency > 0
    np.testing.assert_allclose(table.by_previous[alive], share(f, previous)[alive], rtol=1e-4)


def test_description_errors(setting, monkeypatch):
    sae, lm, tokens = setting
    with pytest.raises(ValueError, match="does not remember"):
        describe_latents(SAE(*sae.parameters()), lm, tokens)
    with pytest.raises(ValueError, match="directions must be from 1 to d_in = 16, got 17"):
        describe_latents(sae, lm, tokens, directions=17)
    with pytest.raises(ValueError, match="nothing to describe"):
        describe_latents(sae, lm, torch.full((2, 4), 2))
    with pytest.raises(ValueError, match="vocabulary"):
        describe_latents(sae, lm, torch.full((2, 4), 10_000))
    with pytest.raises(ValueError, match="numbers from 0 to 19"):
        describe_latents(sae, lm, tokens, latents=torch.tensor([20]))
    with pytest.raises(ValueError, match="twice"):
        describe_latents(sae, lm, tokens, latents=torch.tensor([4, 4]))
    monkeypatch.setattr(describe, "MOST_SUMS", 100)
    with pytest.raises(ValueError, match=r"latents=\.\.\.\), at most 4"):
        describe_latents(sae, lm, tokens)
    assert len(describe_latents(sae, lm, tokens, latents=torch.arange(4))) == 4


def test_bands_by_hand():
    one = pd.DataFrame(
        {
            "frequency": [0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9],
            **{name: np.arange(7.0) for name in DESCRIPTORS},
        }
    )
    one.loc[[0, 4], "by_token"] = np.nan
    two = pd.DataFrame(
        {"frequency": [0.2, 0.02, 0.03], **{name: [10.0, 1.0, 2.0] for name in DESCRIPTORS}}
    )
    found = frequency_bands([one, two]).set_index(["band", "quantity"])
    assert list(dict.fromkeys(found.index.get_level_values(0))) == [
        "over 10 %",
        "1–10 %",
        "under 1 %",
        "dead",
    ]
    columns = ["mean", "low", "high", "seeds", "latents"]
    over = found.loc["over 10 %"]
    assert tuple(over.loc["threshold", columns]) == (
        *mean_interval([5.0, 10.0]),
        2,
        4,
    )  # each seed counts once
    assert tuple(over.loc["by_token", columns]) == (*mean_interval([5.5, 10.0]), 2, 3)
    assert tuple(found.loc[("1–10 %", "threshold"), columns]) == (*mean_interval([2.5, 1.5]), 2, 4)
    assert tuple(found.loc[("under 1 %", "by_token"), ["mean", "seeds", "latents"]]) == (1.0, 1, 1)
    assert np.isnan(found.loc[("under 1 %", "by_token"), "low"])  # one seed has no interval
    assert (
        np.isnan(found.loc[("dead", "by_token"), "mean"])
        and found.loc[("dead", "by_token"), "latents"] == 0
    )
    assert found.loc[("dead", "frequency"), "latents"] == 1
    assert list(frequency_bands([one], edges=[0.2]).band.unique()) == [
        "over 20 %",
        "under 20 %",
        "dead",
    ]
    for edges in ([], [0.1, 0.01], [0.0, 0.1], [0.1, 0.1]):
        with pytest.raises(ValueError, match="ascending"):
            frequency_bands([one], edges)
    for tables in (one, []):
        with pytest.raises(ValueError, match="one table of describe_latents a seed"):
            frequency_bands(tables)


def test_histogram_by_hand():
    seeds = [torch.tensor([0.0, 0.5, 0.5, 0.02]), torch.tensor([0.0, 0.0, 1.0, 0.005])]
    found = frequency_histogram({"a": seeds, "b": [torch.tensor([0.02, 0.0])]}, bins=2)
    a, b = (
        found[found.architecture == "a"].reset_index(),
        found[found.architecture == "b"].reset_index(),
    )
    # down to log10 0.005 = −2.3: bins from −2.5
    assert a.dead.tolist() == [True] + [False] * 5 and np.isnan(a.log10_frequency[0])
    np.testing.assert_allclose(a.log10_frequency[1:], [-2.25, -1.75, -1.25, -0.75, -0.25])
    np.testing.assert_allclose(a["mean"], [3 / 8, 1 / 8, 1 / 8, 0, 0, 3 / 8])
    assert (a.low[0], a.high[0]) == mean_interval([1 / 4, 1 / 2])[1:]
    np.testing.assert_allclose(b["mean"], [1 / 2, 0, 1 / 2, 0, 0, 0])
    assert b.low.isna().all()
    decades = frequency_histogram({"a": [torch.tensor([1e-3, 1e-2, 1e-1, 1.0])]}, bins=1)
    assert (
        decades["mean"].tolist() == [0] + [0.25] * 4
    )  # none is dead; a bin has its upper edge, as "over 10 %" has not 10 %
    with pytest.raises(ValueError, match="no latent of a ever fires"):
        frequency_histogram({"a": [torch.zeros(3)]})


def test_excess_of_a_log_normal_and_of_a_right_mode():
    quantile = torch.distributions.Normal(0, 1).icdf(
        (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    )
    bulk = (quantile - 4.5).exp()
    found = excess_right(bulk, above=0.1)
    assert found.observed == pytest.approx(found.expected, rel=0.01)  # P(z > 4.5 − log 10) = 1.4 %
    both = torch.cat(
        [bulk, torch.zeros(100_000), torch.full((100,), 0.5)]
    )  # too few to move the quartiles much
    more = excess_right(both, above=0.1)
    assert more.observed == pytest.approx((found.observed * 100_000 + 100) / 200_100)
    assert more.observed - more.expected == pytest.approx(100 / 200_100, rel=0.2)
    assert excess_right(torch.tensor([0.2, 0.2, 0.0]), above=0.1) == pytest.approx(
        (2 / 3, 2 / 3)
    )  # no spread
    with pytest.raises(ValueError, match="no latent fires"):
        excess_right(torch.zeros(4))


def test_an_extreme_share_of_none_has_an_interval():
    none = extreme_share([torch.full((500,), 0.5), torch.zeros(500)])
    assert none.mean == 0 and none.low == 0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 1000))  # P(none of 1000 | high) = 2.5 %
    some = extreme_share([torch.tensor([0.6, 0.4]), torch.tensor([0.1, 0.9, 0.2, 0.3])], above=0.5)
    assert some.mean == pytest.approx(2 / 6)
    assert stats.binom.sf(1, 6, some.low) == pytest.approx(0.025)  # P(2 or more of 6)
    assert stats.binom.cdf(2, 6, some.high) == pytest.approx(0.025)
    for nothing in ([], [torch.zeros(0)]):
        with pytest.raises(ValueError, match="no latents"):
            extreme_share(nothing)


def power(l0, seed):
    return 2e-4 * l0**1.5 * (1 + seed) - 0.001


@pytest.fixture
def runs():
    """Two seeds of a reference whose share is a power of L0 but for one latent of 1,000, and of
    others."""
    rows = [("plain", seed, l0, power(l0, seed)) for seed in (0, 1) for l0 in (8.0, 32.0, 128.0)]
    rows += [
        ("other", 1, 16.0, 0.3),
        ("other", 0, 64.0, 0.5),
        ("other", 1, 64.0, 0.4),
        ("other", 0, 256.0, 0.9),
    ]
    return pd.DataFrame(rows, columns=["architecture", "seed", "l0", "dense_10"]).assign(d_sae=1000)


def test_nearest_runs(runs):
    found = nearest_runs(
        runs, 60.0
    )  # between 32 and 128 by ratio nearer to 32, by difference too; 70 differs
    assert found.l0.tolist() == [
        32.0,
        32.0,
        16.0,
        64.0,
    ]  # settings: the first of "other" has L0 √(16·64) = 32, the other 128
    assert found.index.tolist() == [1, 4, 6, 7]
    assert nearest_runs(runs, 70.0).l0.tolist() == [128.0, 128.0, 64.0, 256.0]


def test_shares_at_equal_l0(runs):
    at = values_at(runs, "plain", 64.0)
    assert at.index.tolist() == [0, 1]
    np.testing.assert_allclose(at, [power(64, 0), power(64, 1)])
    assert values_at(runs, "plain", 129.0).isna().all()
    with pytest.raises(ValueError, match="no runs of 'TopK': the table has plain, other"):
        values_at(runs, "TopK", 64.0)
    other, plain = runs[runs.architecture == "other"], runs[runs.architecture == "plain"]
    beside = beside_reference(other, plain)
    assert beside.index.tolist() == other.index.tolist()
    np.testing.assert_allclose(
        beside, [0.3 - power(16, 1), 0.5 - power(64, 0), 0.4 - power(64, 1), np.nan]
    )
    with pytest.raises(ValueError, match="no reference runs of seed 1"):
        beside_reference(other, plain[plain.seed == 0])
