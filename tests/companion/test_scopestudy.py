"""A release built, chosen from, scored and taken apart; losses by position and kind by hand; the
plan's arithmetic."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from companion.scope import cost, scopestudy
from companion.scope.release import build
from companion.scope.rises import (
    Rises,
    kind_of,
    octaves,
    position_table,
    subset_table,
    token_rises,
    tokenize_kinds,
)
from models import random_ids, tiny_lm, tiny_tokenizer

from jumprelu.corpus import Tokens
from jumprelu.dark.darkmatter import HeldOut
from jumprelu.exchange.gemma_scope import available, path_for, save_gemma_scope
from jumprelu.metrics import evaluate
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE, Origin, Transcoder
from jumprelu.sites import SITES, capture

BASE = TrainConfig(d_sae=1024, steps=6, batch_size=32, sparsity=1e-3)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def held_out():
    return Tokens(random_ids(6, 24, seed=5), torch.arange(6))


def an_sae(lm, site, layer, d_sae=40, threshold=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = capture(lm, [(site, layer)], random_ids(4, 16))[site, layer].flatten(0, 1)
    W = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[-1], generator=g), dim=-1)
    theta = torch.full((d_sae,), float(threshold * x.std()))
    return SAE(W.T, torch.zeros(d_sae), W, x.mean(0), theta, origin=Origin("tiny", site, layer))


@pytest.fixture(scope="module")
def release(lm, held_out, tmp_path_factory):
    """By hand: residual stream of layers 0 and 1; at layer 1 two widths."""
    root = tmp_path_factory.mktemp("release")
    places = [(0, 1024, 0.5), (0, 1024, 2.0), (1, 1024, 0.5), (1, 1024, 2.0), (1, 2048, 0.5)]
    for layer, width, threshold in places:
        sae = an_sae(lm, "resid_post", layer, width, threshold)
        save_gemma_scope(sae, root / path_for(layer, width, evaluate(sae, lm, held_out).l0.value))
    return root


# ---- building and choosing ----


@pytest.mark.slow
def test_a_scope_is_built_in_gemma_scopes_layout_and_returned_at_once_the_second_time(
    lm, tmp_path, monkeypatch
):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    train, test = (
        Tokens(random_ids(12, 24), torch.arange(12)),
        Tokens(random_ids(3, 24, seed=1), torch.arange(3)),
    )
    configs = [
        TrainConfig(d_sae=1024, steps=6, batch_size=32, threshold_init=theta)
        for theta in (0.3, 0.15, 0.01)
    ]
    arguments = (lm, train, test, configs, [0, 2], 1, [1024, 2048], 2)
    found = build(*arguments, workers=1, out=tmp_path / "scope")
    assert list(found) == [*SITES, "transcoder"] and all(
        len(folders) == 2 for folders in found.values()
    )
    for folders in (found[site] for site in SITES):
        first, second = (available(folder) for folder in folders)
        # layer 1: three sparsities at the first width and two at the second, in each seed;
        # elsewhere two, in the first seed
        assert first.groupby(["layer", "width"]).size().to_dict() == {
            (0, "1k"): 2,
            (1, "1k"): 3,
            (1, "2k"): 2,
            (2, "1k"): 2,
        }
        wider = {(1, "2k"): 2} if "resid_post" in folders[1] else {}
        assert second.groupby(["layer", "width"]).size().to_dict() == {(1, "1k"): 3} | wider
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scope").rglob("*")}
    assert build(*arguments, workers=1, out=tmp_path / "scope") == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scope").rglob("*")} == before
    coders = scopestudy.choose({"transcoder": found.pop("transcoder")}, 1, [1024])
    assert coders.groupby("seed").size().tolist() == [3, 3]
    first = scopestudy.load(next(coders.itertuples()))
    assert isinstance(first, Transcoder) and (first.origin.site, first.origin.layer) == (
        "mlp_in_before_gain",
        1,
    )
    scored, _ = scopestudy.score(coders, lm, test)
    assert (
        all(round(l0) == label for l0, label in zip(scored.l0, scored.l0_label, strict=True))
        and (scored.fvu > 0).all()
    )
    chosen = scopestudy.choose(found, 1, [1024, 2048])
    assert len(chosen) == 3 * (9 + 3) + 2 and chosen.groupby("layer").seed.nunique().to_dict() == {
        0: 1,
        1: 2,
        2: 1,
    }
    table, reports = scopestudy.score(chosen[chosen.layer == 1], lm, test)
    # what was measured before it was written is what the loaded file measures
    assert all(round(l0) == label for l0, label in zip(table.l0, table.l0_label, strict=True))
    assert (
        [len(report.frequency) for report in reports]
        == table.d_sae.tolist()
        == table.width.tolist()
    )
    with pytest.raises(ValueError, match="choose sparsities further apart"):
        build(
            lm,
            train,
            test,
            [configs[0], configs[0]],
            [0],
            1,
            [1024],
            1,
            workers=1,
            out=tmp_path / "twice",
        )


def test_chosen_are_all_widths_in_the_middle_and_the_first_elsewhere(release):
    chosen = scopestudy.choose({"resid_post": str(release)}, 1, [1024, 2048])
    assert chosen.groupby(["layer", "width"]).size().to_dict() == {
        (0, 1024): 2,
        (1, 1024): 2,
        (1, 2048): 1,
    }
    assert chosen.seed.tolist() == [0] * 5 and set(chosen.source) == {str(release)}
    two = scopestudy.choose({"resid_post": [str(release), str(release)]}, 1, [1024])
    assert two.seed.tolist() == [0] * 4 + [1] * 4
    assert set(scopestudy.choose({"resid_post": release}, 1, [1024], layers=[1]).layer) == {1}


def test_chosen_are_the_nearest_l0_each_once(release):
    everything = scopestudy.choose({"resid_post": release}, 1, [1024], layers=[1])
    least, most = sorted(everything.l0_label)
    assert scopestudy.choose({"resid_post": release}, 1, [1024], [1], [1.0]).l0_label.tolist() == [
        least
    ]
    assert sorted(
        scopestudy.choose({"resid_post": release}, 1, [1024], [1], [1, 2, 10_000]).l0_label
    ) == [least, most]
    with pytest.raises(FileNotFoundError, match="no SAE in layer_1/width_4k"):
        scopestudy.choose({"resid_post": release}, 1, [4096])


def test_a_score_is_what_evaluate_says_of_the_loaded_sae(
    release, lm, held_out, tmp_path, monkeypatch
):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path))
    chosen = scopestudy.choose({"resid_post": release}, 1, [1024, 2048])
    table, reports = scopestudy.score(chosen, lm, held_out)
    row = next(table[table.width == 2048].itertuples())
    alone = evaluate(scopestudy.load(row), lm, held_out)
    assert (row.l0, row.fvu, row.d_sae) == (alone.l0.value, alone.fvu.value, 2048)
    assert row.delta_loss == pytest.approx(alone.delta_loss.value, abs=1e-6)
    assert row.delta_loss_se == pytest.approx(alone.delta_loss.se, rel=1e-3)
    assert torch.equal(reports[row.Index].frequency, alone.frequency)
    near = scopestudy.nearest(table, table.l0.max())
    assert len(near) == 3 and near.l0.max() == table.l0.max() and near.index.is_monotonic_increasing


# ---- comparisons ----


def runs(seeds=(0, 1), factor=2.0):
    """Two sites whose delta loss is 1/L0 and `factor` times that, FVU alike."""
    rows = [
        (
            site,
            0,
            seed,
            0,
            l0 * (1 + 0.01 * seed),
            scale / (l0 * (1 + 0.01 * seed)),
            0.3,
            0.01 * scale / l0,
            0.01,
        )
        for site, scale in (("resid_post", factor), ("mlp_out", 1.0))
        for seed in seeds
        for l0 in (10.0, 40.0)
    ]
    return pd.DataFrame(
        rows,
        columns=[
            "site",
            "layer",
            "seed",
            "width",
            "l0",
            "delta_loss",
            "fvu",
            "delta_loss_se",
            "fvu_se",
        ],
    )


def test_two_sites_at_equal_l0():
    found = scopestudy.versus(runs(), "site", "resid_post", "mlp_out", "delta_loss", 50)
    assert found == pytest.approx((2.0, 2.0, 2.0))
    one = scopestudy.versus(runs([0]), "site", "resid_post", "mlp_out", "delta_loss", 50)
    # the standard errors are 1 % of each: √2 % of the ratio, by Student's t on 49 degrees of
    # freedom
    assert one.mean == pytest.approx(2.0) and math.log(one.high / 2) == pytest.approx(
        2.0096 * 0.01 * math.sqrt(2), rel=1e-3
    )
    assert scopestudy.versus(
        runs(), "site", "resid_post", "mlp_out", "fvu", 50
    ).mean == pytest.approx(1.0)


def test_layers_at_one_l0_and_the_largest_step():
    table = pd.concat(
        [runs([0], factor).assign(layer=layer) for layer, factor in enumerate((2.0, 2.2, 6.6, 6.0))]
    )
    layers = scopestudy.by_layer(table, 20.0)
    mine = layers[(layers.site == "resid_post") & (layers.metric == "delta_loss")]
    assert mine["mean"].tolist() == pytest.approx([0.1, 0.11, 0.33, 0.3])
    assert (mine.high / mine["mean"]).tolist() == pytest.approx([1.0196] * 4)
    step = scopestudy.largest_step(mine)
    assert step.mean == pytest.approx(3.0) and math.log(step.high / step.mean) == pytest.approx(
        0.0196 * math.sqrt(2)
    )
    assert math.isnan(
        scopestudy.largest_step(scopestudy.by_layer(table, 100.0)).mean
    )  # no run reaches that L0


def test_points_belong_together_over_seeds():
    table = runs().query("site == 'mlp_out'").reset_index(drop=True)
    statistics = [
        lambda w, n=n: torch.full((len(w),), float(n), dtype=torch.float64) for n in range(4)
    ]
    found = scopestudy.by_point(table, statistics, 5, 20)
    assert found["mean"].tolist() == [1.0, 2.0]  # of runs 0 and 2, and of 1 and 3
    assert found.l0.tolist() == pytest.approx([10.05, 40.2])


def test_the_dark_table_has_the_statistics_of_each_sae():
    g = torch.Generator().manual_seed(0)

    def test_of(share):  # of the variance, left by the SAE; half of it linear
        n, square = torch.ones(4, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
        norm = 1 + torch.rand(4, 5, generator=g, dtype=torch.float64)
        return HeldOut(
            10 * n,
            0 * square,
            30 * n,
            0 * square,
            10 * share * square,
            5 * share * square,
            norm,
            norm**2,
            0 * norm,
        )

    near = pd.DataFrame({"site": ["resid_post", "mlp_out"], "layer": [0, 1]}, index=[4, 7])
    ladder = pd.DataFrame(
        {"site": "resid_post", "width": [8, 8, 16], "seed": 0, "l0": [10.0, 40.0, 20.0]},
        index=[4, 5, 6],
    )
    tests = {number: test_of(share) for number, share in ((4, 0.4), (5, 0.2), (6, 0.1), (7, 0.8))}
    found = scopestudy.dark_table(near, ladder, tests, 20.0, 20).set_index(
        ["panel", "site", "x", "quantity"]
    )["mean"]
    assert found["layer", "mlp_out", 1, "vector_r2"] == pytest.approx(0.5)
    assert found["layer", "mlp_out", 1, "fvu_nonlinear"] == pytest.approx(0.4)
    assert found["width", "resid_post", 8, "fvu_nonlinear"] == pytest.approx(
        (0.2 + 0.1) / 2
    )  # L0 20 is half-way, in logarithms
    assert found["width", "resid_post", 16, "fvu_nonlinear"] == pytest.approx(0.05)


# ---- losses by token ----


@pytest.mark.parametrize("site", SITES)
def test_rises_add_up_to_the_delta_loss_of_evaluate(lm, held_out, site):
    sae = an_sae(lm, site, 1)
    found = token_rises(lm, held_out, {"one": sae, "again": sae}, batch_rows=4)
    once = torch.ones(1, 6, dtype=torch.float64)
    assert (
        found.rise.shape == (2, 6, 23) and found.rise[:, :, 0].isnan().all()
    )  # BOS predicts, but is not counted
    assert found.mean(once, "one").item() == pytest.approx(
        evaluate(sae, lm, held_out).delta_loss.value, abs=1e-5
    )
    assert torch.equal(found.rise[0].nan_to_num(), found.rise[1].nan_to_num())
    assert found.mean(once, "one").abs().item() > 1e-3


def test_the_type_of_the_sae_is_the_precision_it_runs_in(lm, held_out):
    sae = an_sae(lm, "resid_post", 1)
    found = token_rises(
        lm, held_out, {"float32": sae, "bfloat16": an_sae(lm, "resid_post", 1).to(torch.bfloat16)}
    )
    difference = (found.rise[1] - found.rise[0])[:, 1:].abs()
    assert 0 < difference.max() < 0.3


def by_hand():
    """Two rows of five positions: rise 1 on row 0, and on row 1 its position; one token is
    special."""
    rise = torch.tensor([[[math.nan, 1.0, 1.0, 1.0, 1.0], [math.nan, 1.0, 2.0, math.nan, 4.0]]])
    return Rises(["a"], rise)


def test_means_over_parts_by_hand():
    found, both = by_hand(), torch.ones(1, 2, dtype=torch.float64)
    second = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    assert found.mean(both, "a").item() == pytest.approx(11 / 7)
    assert found.mean(second, "a").item() == pytest.approx(7 / 3)
    assert found.mean(both, "a", found.at(2, 4)).item() == pytest.approx(4 / 3)
    assert found.ratio(
        both, "a", found.at(4), torch.tensor([[True], [False]])
    ).item() == pytest.approx(2.5)
    assert (
        octaves(5) == [(1, 2), (2, 4), (4, 5)]
        and octaves(255)[-1] == (128, 255)
        and octaves(256)[-1] == (128, 256)
    )


def test_the_table_of_positions_by_hand():
    table = position_table(by_hand(), ["a"], 50).set_index(["quantity", "start"])
    assert table.loc["delta_loss", "mean"].tolist() == pytest.approx([1.0, 4 / 3, 2.5])
    assert table.loc["relative", "mean"].tolist() == pytest.approx([7 / 11, 28 / 33, 17.5 / 11])
    assert table.loc["delta_loss", "end"].tolist() == [1, 3, 4]
    assert (table.low <= table["mean"]).all() and (table["mean"] <= table.high).all()


def test_the_table_of_kinds_compares_with_all_other_rows():
    rise = torch.tensor([[[1.0, 1.0], [3.0, 3.0], [2.0, 2.0], [8.0, 8.0]]])
    table = subset_table(
        Rises(["a"], rise), ["a"], ["code", "code", "prose", "rare"], 1, 50
    ).set_index(["subset", "quantity"])
    assert table.loc[("code", "delta_loss"), "mean"] == 2 and table.loc[
        ("code", "ratio"), "mean"
    ] == pytest.approx(2 / 5)
    assert table.loc[("code", "delta_loss"), "documents"] == 2
    assert set(
        subset_table(Rises(["a"], rise), ["a"], ["code", "code", "prose", "rare"], 2, 50).subset
    ) == {"code"}


def test_kinds_of_documents():
    document = {"path": "sympy/core/add.py", "text": "", "meta": {"set": "EuroParl"}}
    assert kind_of(document, "") == "sympy" and kind_of(document, "meta.set") == "EuroParl"
    for column in ("meta.source", "kind", "text.set"):
        with pytest.raises(ValueError, match=f"have no {column}"):
            kind_of(document, column)


def test_kinds_follow_the_rows():
    texts = [
        {"path": f"{'a' if n % 3 else 'b'}/{n}", "text": f"word{n} " * (60 if n % 2 else 1)}
        for n in range(9)
    ]
    tokens, kinds = tokenize_kinds(texts, tiny_tokenizer(), 32, 10)
    assert kinds == ["a" if n % 3 else "b" for n in (1, 3, 5, 7)]  # the even ones are too short
    assert len(tokens) == len(kinds) == len(tokens.document.unique())


# ---- the plan ----


def test_the_plan_by_hand():
    table = cost.plan(
        gpus=(1, 2),
        d_in=10,
        d_sae=100,
        batch=5,
        tokens=1000,
        l0=3,
        window=2,
        matmul_rate=1000.0,
        memory_rate=100.0,
        node=1,
        link_rate=1.0,
        network_rate=50.0,
        lm_parameters=20,
        lm_share=0.5,
        lm_efficiency=0.25,
        reported_ms=2.0,
        reported_chips=4,
    )
    of = {
        (row.quantity, row.gpus, row.kind): row.value
        for row in table.itertuples()
        if row.gpus == row.gpus
    }
    parameters = 2 * 10 * 100 + 2 * 100 + 10
    parts = {
        "encode": 10.0,
        "weights": 26 * parameters / 100,
        "entries": 4 * 5 * 10 * 5 / 100,
        "exchange": 0.0,
    }
    for name, seconds in parts.items():
        assert of[f"step: {name}", 1, "derived"] == pytest.approx(1e3 * seconds)
    exchange = 8 * 0.5 * 10 * 5 / 50
    assert of["step: exchange", 2, "derived"] == pytest.approx(1e3 * exchange)
    assert of["step", 2, "derived"] == pytest.approx(1e3 * (sum(parts.values()) / 2 + exchange))
    step = sum(parts.values())
    assert of["time for all tokens", 1, "derived"] == pytest.approx(200 * step / 3600)
    assert of["rate", 1, "derived"] == pytest.approx(5 / step / 1e3)
    assert of["harvest of all tokens", 2, "derived"] == pytest.approx(
        2 * 20 * 0.5 * 1000 / (2 * 250) / 3600
    )
    assert of["memory of a GPU", 2, "derived"] == pytest.approx(
        (14 * parameters + 2 * 5 * 100) / 2 / 1e9
    )
    assert of["step", 4, "reported"] == 2.0 and of[
        "time for all tokens", 4, "derived"
    ] == pytest.approx(200 * 0.002 / 3600)


def test_the_plan_says_where_each_number_is_from():
    table = cost.plan()
    assert set(table.kind) == {"assumed", "derived", "reported"}  # nothing was measured
    first = table[table.gpus == 1].set_index("quantity").value
    assert 10 < first["step: encode"] + first["step: weights"] < 11
    assert table[table.kind == "reported"].value.tolist() == [45]
