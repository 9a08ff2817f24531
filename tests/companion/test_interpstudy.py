"""Tables of notebook 09: names, settings and pooling over seeds, by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from companion.rails.attribution import token_uniformity
from companion.reading import interpstudy
from models import random_ids, tiny_lm

from jumprelu.corpus import Tokens
from jumprelu.intervals import Interval
from jumprelu.sae import SAE, Origin


class Run:
    """A finished run as `sweep.Scored` is used here: something that gives its SAE."""

    def __init__(self, seed: int, threshold: float, d_in: int):
        atoms = F.normalize(
            torch.randn(24, d_in, generator=torch.Generator().manual_seed(seed)), dim=-1
        )
        self.own = SAE(
            atoms.T,
            torch.zeros(24),
            atoms,
            torch.zeros(d_in),
            torch.full((24,), threshold),
            origin=Origin(site="resid_post", layer=1),
        )

    def sae(self) -> SAE:
        return self.own


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def runs(lm):
    rows = [
        ("a", 0, 4.0),
        ("a", 0, 9.0),
        ("b", 0, 5.0),
        ("a", 1, 6.0),
        ("a", 1, 11.0),
        ("b", 1, 7.0),
    ]
    table = pd.DataFrame(rows, columns=["architecture", "seed", "l0"])
    return interpstudy.Sweep(
        table, [Run(n, 0.1 + 0.2 * (l0 < 8), lm.d_model) for n, (_, _, l0) in enumerate(rows)]
    )


def test_runs_are_named_by_architecture_setting_and_seed(runs):
    assert interpstudy.names_of(runs) == [
        "a, 0, 0",
        "a, 1, 0",
        "b, 0, 0",
        "a, 0, 1",
        "a, 1, 1",
        "b, 0, 1",
    ]
    assert interpstudy.named(runs)["a, 1, 1"] is runs.runs[4].own


def test_latents_know_their_setting_and_are_pooled_over_seeds(runs):
    names = ["a, 1, 0", "a, 1, 1", "b, 0, 0", "neurons"]
    table = pd.DataFrame(
        {
            "sae": names,
            "l0": [9.0, 11.0, 5.0, 3.0],
            "weight": 1.0,
            "band": 0,
            "correlation": [0.5, 0.7, 0.4, 0.1],
            "shuffled_correlation": [0.1, 0.0, 0.0, 0.0],
        }
    )
    found = interpstudy.with_settings(table, runs)
    assert found.setting.tolist() == ["a", "a", "b", "neurons"] and found.point.tolist() == [
        1,
        1,
        0,
        -1,
    ]
    assert found.l0_mean.tolist() == [10, 10, 6, 3]
    assert interpstudy.pooled(found, 1).sae.tolist() == ["a", "a", "neurons"]
    assert interpstudy.pooled(found).sae.tolist() == ["a", "a", "b", "neurons"]
    gain = interpstudy.over_shuffled(interpstudy.pooled(found), "a", draws=50)
    assert gain.mean == pytest.approx(0.55) and 0.4 <= gain.low <= gain.high <= 0.7 + 1e-9


def test_bands_in_words():
    assert interpstudy.band_names((0.01, 0.1)) == {
        0: "below 1 %",
        1: "1 % to 10 %",
        2: "above 10 %",
    }


def test_uniformity_over_seeds_and_its_fall(runs, lm, tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path))
    tokens = Tokens(random_ids(4, 10), torch.arange(4))
    found = interpstudy.uniformity_table(runs, lm, tokens, draws=20).set_index(
        ["architecture", "point"]
    )
    once = torch.ones(1, 4, dtype=torch.float64)
    mean = [token_uniformity(run.sae(), lm, tokens).mean(once).item() for run in runs.runs]
    assert found.loc[("a", 0), "mean"] == pytest.approx((mean[0] + mean[3]) / 2)
    assert found.loc[("b", 0), "l0"] == 6.0
    fall = interpstudy.uniformity_fall(runs, "a", lm, tokens, draws=20)
    assert fall.mean == pytest.approx((mean[1] + mean[4] - mean[0] - mean[3]) / 2)


def test_the_densest_setting_is_found_by_l0(runs):
    found = interpstudy.densest(runs)
    for architecture, saes in found.items():
        rows = runs.table[runs.table.architecture == architecture]
        l0 = rows.groupby(rows.groupby("seed").cumcount()).l0.mean()
        expected = rows[rows.groupby("seed").cumcount() == l0.idxmax()].index
        assert [sae.fingerprint for sae in saes] == [
            runs.runs[place].sae().fingerprint for place in expected
        ]


def test_two_intervals_apart():
    assert interpstudy.apart(Interval(3.0, 2.0, 5.0), Interval(1.0, 0.5, 1.5)) == Interval(
        2.0, 0.5, 4.5
    )
