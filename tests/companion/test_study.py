"""Studies over variants: grids as data, learning rates chosen by the frontier, places and scales as
tables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from companion.rails import frontier, study
from models import random_ids, save_tiny

import jumprelu as jr

BASE = jr.TrainConfig(d_sae=24, steps=12, batch_size=32)


def test_a_list_gives_a_configuration_for_each_of_its_values():
    found = study.configurations(BASE, {"architecture": "topk", "k": [2, 4], "lr": 0.5})
    assert [(c.architecture, c.k, c.lr, c.d_sae) for c in found] == [
        ("topk", 2, 0.5, 24),
        ("topk", 4, 0.5, 24),
    ]
    lists = {
        "sparsity": [1, 2],
        "threshold_init": [3, 4],
        "resample": [0.25, 0.5],
        "betas": [0.5, 0.9],
    }
    paired = study.configurations(BASE, lists)
    assert [(c.sparsity, c.threshold_init, c.resample, c.betas) for c in paired] == [
        (1, 3, (0.25, 0.5), (0.5, 0.9)),
        (2, 4, (0.25, 0.5), (0.5, 0.9)),
    ]
    assert study.configurations(BASE, {"lr": 0.1}) == [
        jr.TrainConfig(d_sae=24, steps=12, batch_size=32, lr=0.1)
    ]
    with pytest.raises(ValueError, match="lists of values must be of one length"):
        study.configurations(BASE, {"k": [1, 2], "lr": [1, 2, 3]})


def test_runs_beside_a_frontier_of_their_own_seed():
    reference = pd.DataFrame(
        {"seed": [0, 0, 1, 1], "l0": [1.0, 100, 1, 100], "fvu": [0.4, 0.1, 0.8, 0.2]}
    )
    runs = pd.DataFrame({"seed": [0, 1, 1], "l0": [10.0, 10.0, 200.0], "fvu": [0.2, 0.2, 0.3]})
    found = study.beside_frontier(runs, reference).ratio
    assert found[:2].tolist() == pytest.approx([1.0, 0.5]) and math.isnan(
        found[2]
    )  # L0 200 was not reached


def test_a_place_with_few_seeds_borrows_the_spread():
    places, levels = (("resid_post", 0, 3), ("mlp_out", 1, 1)), ((1.0, 0.8), (10.0, 0.4))
    rows = [
        (site, layer, name, seed, l0, factor * level, factor * level)
        for site, layer, seeds in places
        for seed in range(seeds)
        for name, factor in (("a", 0.5 * (1 + 0.1 * seed)), ("b", 1.0))
        for l0, level in levels
    ]
    table = pd.DataFrame(
        rows, columns=["site", "layer", "architecture", "seed", "l0", "fvu", "delta_loss"]
    )
    main = table[table.site == "resid_post"]
    found = study.ratios_by_place(table, main, "a", ["b"]).set_index(["place", "metric"])
    whole, single = found.loc["resid_post, layer 0", "fvu"], found.loc["mlp_out, layer 1", "fvu"]
    assert whole["mean"] == pytest.approx(0.5 * (1.0 * 1.1 * 1.2) ** (1 / 3)) and single[
        "mean"
    ] == pytest.approx(0.5)
    assert frontier.compare(main, "a", "b") == pytest.approx(tuple(whole[["mean", "low", "high"]]))
    # one seed instead of three: the same spread, √3 times the width in logarithms
    assert np.log(single.high / single.low) == pytest.approx(
        3**0.5 * np.log(whole.high / whole.low)
    )


@pytest.mark.slow
def test_sweeps_tuning_and_scaling(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    lm = jr.load_lm(save_tiny("llama", tmp_path / "model"))
    tokens = jr.Tokens(random_ids(30, 16), torch.arange(30) // 2)
    acts = jr.harvest(lm, tokens, site="resid_post", layer=1, out=tmp_path / "acts")
    variants = {
        "TopK": study.configurations(BASE, {"architecture": "topk", "k": [2, 6]}),
        "copy": study.configurations(BASE, {"architecture": "topk", "k": [2, 6], "adam_eps": 1e-7}),
    }
    table, best = study.tune_lr(
        acts, variants, [1e-4, 3e-3, 1e-2], [0, 1], {"copy": "TopK"}, lm, tokens, workers=1
    )
    assert (
        len(table) == 6
        and set(table.architecture) == {"TopK"}
        and table.l0.round().tolist() == [2, 6] * 3
    )
    least = table.groupby("lr").fvu.apply(lambda fvu: np.log(fvu).mean()).idxmin()
    assert set(table[table.best].lr) == {least} and {
        c.lr for configs in best.values() for c in configs
    } == {least}
    assert [c.k for c in best["copy"]] == [2, 6]
    found = study.sweep_variants(acts, best, [0, 1], lm, tokens, workers=1)
    assert len(found.runs) == len(found.table) == 8
    assert [(run.config.seed, run.config.k) for run in found.runs] == list(
        zip(found.table.seed, [2, 6] * 4, strict=True)
    )
    chosen = table[table.best].fvu.tolist()
    assert (
        found.table[(found.table.architecture == "TopK") & (found.table.seed == 0)].fvu.tolist()
        == chosen
    )
    grown = study.scaling_table(
        acts,
        lm,
        tokens,
        {"TopK": best["TopK"][:1], "both": best["TopK"]},
        3,
        [12, 24],
        [6, 12],
        [0],
        workers=1,
    )
    between = grown[
        (grown.architecture == "both") & (grown.metric == "fvu") & (grown.x == 24)
    ].value.item()
    assert between == pytest.approx(frontier.at_l0(table[table.best], 3.0))
    grown = grown[grown.architecture == "TopK"]
    assert len(grown) == 8 and sorted(set(grown[grown.quantity == "tokens"].x)) == [6 * 32, 12 * 32]
    whole = grown[(grown.metric == "fvu") & grown.x.isin([24, 12 * 32])].value
    assert whole.nunique() == 1 and whole.iloc[0] == chosen[0]  # the same run, met from both sides
