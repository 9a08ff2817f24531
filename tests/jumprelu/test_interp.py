"""Scores of explanations by hand, and the study on a small model."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from jumprelu.corpus import Tokens
from jumprelu.latents.choosing import Choice
from jumprelu.latents.contexts import collect
from jumprelu.latents.explain import Explanation, Windows
from jumprelu.latents.interp import (
    SCORES,
    balanced_accuracy,
    binned,
    detection,
    explain_all,
    fresh,
    fuzzing,
    pearson,
    sample_latents,
    score,
    split_documents,
    study,
    windows,
)
from jumprelu.lm import LM
from jumprelu.sae import SAE, Origin
from jumprelu.sites import capture
from tests.models import random_ids, tiny_model, tiny_tokenizer

PLACE = ("resid_post", 0)


def test_bins_and_correlation_by_hand():
    np.testing.assert_array_equal(binned(np.array([0, 0.1, 1.9, 4, 3.8]), 4.0), [0, 0, 5, 10, 10])
    np.testing.assert_array_equal(binned(np.array([0.0, 0.0]), 0.0), [0, 0])
    assert pearson([0, 1, 2, 3], [0, 2, 4, 6]) == pytest.approx(1)
    assert pearson([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0)
    assert pearson([1, 2, 3], [3, 1, 2]) == pytest.approx(
        -0.5
    )  # deviations (−1, 0, 1) and (1, −1, 0): −1/2
    assert (
        pearson([0, 1, 5], [2, 2, 2]) == 0
        and np.isnan(pearson([3, 3], [0, 1]))
        and np.isnan(pearson([], []))
    )


def test_balanced_accuracy_by_hand():
    true = np.array([True, True, True, True, False, False])
    said = np.array([True, True, True, False, True, False])
    assert balanced_accuracy(true, said) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert balanced_accuracy(true[3:5], np.zeros(2, bool)) == 0.5
    assert np.isnan(balanced_accuracy(true[:2], said[2:4]))


ACTS = np.array([[0, 2.0, 0, 0], [0, 0, 0, 0], [3.0, 3.0, 0, 0], [0, 0, 0, 0]])


def test_detection_by_hand():
    predicted = np.array(
        [[0, 0, 5, 0], [0, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0]]
    )  # where in the window does not matter
    assert detection(ACTS, predicted, 1.0) == pytest.approx((1 + 1 / 2) / 2)
    assert detection(ACTS, predicted, 2.0) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert detection(ACTS, predicted, 3.0) == pytest.approx((1 / 2 + 1) / 2)


def test_fuzzing_by_hand():
    real = np.ones_like(ACTS, bool)
    perfect = ACTS.copy()
    assert fuzzing(ACTS, perfect, real) == 1
    # the right windows and the wrong tokens: detection is perfect, and no marks are called right
    shifted = np.array([[0, 0, 2.0, 0], [0, 0, 0, 0], [0, 0, 3.0, 3.0], [0, 0, 0, 0]])
    assert detection(ACTS, shifted, 1.0) == 1 and fuzzing(ACTS, shifted, real) == 0.5
    # the whole window alike: equal at marks and elsewhere, so marks are never right
    assert fuzzing(ACTS, np.full(ACTS.shape, 4.0), real) == 0.5
    # two tokens are marked in each silent window (1.5 on average), where only two are real and
    # predicted
    real = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]], bool)
    trap = ACTS + np.array([[0, 0, 0, 0], [9, 9, 0, 0], [0, 0, 0, 0], [0, 0, 9, 9]])
    assert fuzzing(ACTS, trap, real) == 0.5


def test_fuzzing_of_what_knows_windows_and_not_tokens_and_of_what_knows_neither():
    rng = np.random.default_rng(0)
    acts = np.where(rng.random((400, 20)) < 0.1, rng.exponential(size=(400, 20)), 0)
    acts[::2] = 0
    real = np.ones_like(acts, bool)
    windows_only = np.where((acts > 0).any(1)[:, None], rng.random(acts.shape), 0)
    assert fuzzing(acts, windows_only, real) == pytest.approx(0.75, abs=0.06)
    early = np.tile(np.arange(20.0)[::-1], (400, 1))  # wrong marks are as likely late as early
    assert fuzzing(acts, early, real) == pytest.approx(0.5, abs=0.08)


def test_a_score_leaves_out_padding_and_windows_without_a_prediction():
    tokens = np.array([[5, 6, 7, -1], [5, 6, 7, 8], [5, 6, 7, 8]])
    acts = np.array([[0, 4.0, 0, 0], [0, 0, 0, 0], [8.0, 0, 0, 0]])
    predicted = np.array([[0, 5, 0, 99], [0, 0, 0, 0], [np.nan, 1, 1, 1]])
    found = score(Windows(tokens, acts), predicted, 8.0)
    assert (
        found.correlation == pytest.approx(1)
        and found.detection == 1
        and found.missing == pytest.approx(1 / 11)
    )
    nothing = score(Windows(tokens, acts), np.full(tokens.shape, np.nan), 8.0)
    assert nothing.missing == 1 and all(np.isnan(value) for value in nothing[:3])


def test_documents_are_split_in_halves_once_and_for_all():
    document = torch.arange(41).repeat_interleave(3) * 7
    training, held_out = split_documents(document)
    assert (
        len(training) == 20
        and len(held_out) == 21
        and sorted([*training, *held_out]) == list(range(0, 287, 7))
    )
    for a, b in zip(split_documents(document.flip(0)), (training, held_out), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(split_documents(document, seed=1)[0]) != set(training)
    with pytest.raises(ValueError, match="give two"):
        split_documents(torch.zeros(5))


def test_held_out_windows_that_repeat_what_was_seen_are_left_out():
    training = Windows(np.array([[1, 2, 3, 4, 5, 6], [7, 7, 7, 7, -1, -1]]), np.ones((2, 6)))
    held = np.array(
        [
            [9, 9, 2, 3, 4, 5],  # four in a row
            [2, 3, 4, 9, 5, 6],  # three
            [5, 4, 3, 2, 1, 0],  # another order
            [3, 4, 5, 6, -1, -1],
            [-1, -1, -1, -1, 1, 2],  # padding does not count
            [4, 5, 6, 7, 7, 7],  # not across two windows
        ]
    )
    acts = np.arange(36.0).reshape(6, 6)
    found = fresh(Windows(held, acts), training, run=4)
    np.testing.assert_array_equal(found.tokens, held[[1, 2, 4, 5]])
    np.testing.assert_array_equal(found.acts, acts[[1, 2, 4, 5]])
    assert (
        len(fresh(Windows(held, acts), training).tokens) == 6
        and len(fresh(training, training).tokens) == 1
    )


def test_latents_are_drawn_from_each_band_in_turn():
    frequency = torch.cat(
        [torch.full((50,), 0.001), torch.full((3,), 0.02), torch.full((40,), 0.05), torch.zeros(7)]
    )
    found = sample_latents(frequency.double(), 20)
    assert (
        found.band.value_counts().to_dict() == {0: 9, 1: 3, 2: 8}
        and found.latent.is_monotonic_increasing
    )
    assert found.groupby("band").weight.sum().to_dict() == pytest.approx({0: 50, 1: 3, 2: 40})
    assert found.latent.max() < 93 and found.latent.is_unique  # none of the dead
    everything = sample_latents(frequency.double(), 1000)
    assert len(everything) == 93 and (everything.weight == 1).all()


# ---- the study


def random_sae(lm, seed):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(30, lm.d_model, generator=g)
    threshold = 8 * torch.rand(30, generator=g)
    origin = Origin("tiny", *PLACE)
    zero = torch.zeros(30), torch.zeros(lm.d_model)
    return SAE(W.T, zero[0], W, zero[1], threshold, origin=origin)


@pytest.fixture(scope="module")
def setting():
    lm = LM(tiny_model("gemma2"), tiny_tokenizer(), "tiny")
    ids = random_ids(120, 20, seed=3) % 40 + 60
    ids[:, 0] = 2
    sae = random_sae(lm, seed=1)
    sae.b_enc.data[7] = -1e9
    return lm, sae, Tokens(ids, torch.arange(120) // 3)


class ByToken:
    """Explains a latent by its mean activation at each token, of 10."""

    def explain(self, training):
        ids = training.tokens[training.tokens >= 0]
        acts = training.acts[training.tokens >= 0] / training.acts.max() * 10
        means = {int(id): round(float(acts[ids == id].mean()), 2) for id in np.unique(ids)}
        return Explanation(json.dumps(means))

    def simulate(self, explanation, tokens):
        means = json.loads(explanation.text)
        return np.array([[means.get(str(id), 0.0) for id in row] for row in tokens])


SMALL = Choice(top=6, quantiles=3, per_quantile=4, negatives=10, window=9)


@pytest.fixture(scope="module")
def table(setting):
    lm, sae, tokens = setting
    return study(
        {"one": sae, "two": random_sae(lm, seed=2)},
        lm,
        tokens,
        ByToken(),
        count=12,
        choice=SMALL,
    )


def test_a_study_has_a_row_for_each_latent(setting, table):
    lm, sae, tokens = setting
    assert table.groupby("sae", sort=False).size().to_dict() == {"one": 12, "two": 12}
    assert (
        list(table)[:6] == ["sae", "latent", "frequency", "band", "weight", "l0"]
        and list(table)[-1] == "explanation"
    )
    x = capture(lm, [PLACE], tokens.ids)[PLACE][:, 1:].flatten(0, 1)  # without BOS
    fires = (sae.encode(x) > 0).double().mean(0)
    own = table[table.sae == "one"]
    np.testing.assert_allclose(own.frequency, fires[own.latent.to_numpy().copy()])
    assert own.l0.nunique() == 1 and own.l0.iloc[0] == pytest.approx(float(fires.sum()), rel=0.2)
    assert 7 not in own.latent.tolist()  # it is dead
    assert (
        (table.active > 0).all()
        and table.missing.eq(0).all()
        and table.explanation.str.len().min() > 0
    )


def test_explanations_beat_those_of_other_latents_on_documents_not_seen(table):
    for _, own in table.groupby("sae"):
        gain = own.correlation - own.shuffled_correlation
        assert gain.mean() - 2 * gain.sem() > 0.2
        assert abs(own.shuffled_correlation.mean()) < 0.15
    assert table.fuzzing.mean() > 0.6 > table.shuffled_fuzzing.mean()


def test_a_study_gives_the_same_again_and_does_not_depend_on_the_other_saes(setting, table):
    lm, sae, tokens = setting
    alone = study({"one": sae}, lm, tokens, ByToken(), count=12, choice=SMALL)
    pd.testing.assert_frame_equal(alone, table[table.sae == "one"].reset_index(drop=True))


def test_an_sae_of_another_model_is_studied_on_that(setting):
    lm, sae, tokens = setting
    other = LM(tiny_model("gemma2", seed=3), lm.tokenizer, "other")
    both = study(
        {"there": sae, "here": sae},
        lm,
        tokens,
        ByToken(),
        {"there": other},
        count=5,
        choice=SMALL,
    )
    here = study({"here": sae}, lm, tokens, ByToken(), count=5, choice=SMALL)
    there = study({"there": sae}, other, tokens, ByToken(), count=5, choice=SMALL)
    pd.testing.assert_frame_equal(both, pd.concat([there, here], ignore_index=True))
    assert not np.allclose(here.frequency, there.frequency)


class Recorder:
    """Remembers what it was shown; predicts the number of the token."""

    def __init__(self):
        self.trained, self.tested = [], []

    def explain(self, training):
        self.trained.append(training)
        return Explanation(str(len(self.trained)))

    def simulate(self, explanation, tokens):
        self.tested.append((explanation.text, tokens))
        return np.where(tokens >= 0, tokens, 0) % 11.0


def test_explanations_come_from_one_half_of_the_documents_and_are_tried_on_the_other(setting):
    lm, sae, tokens = setting
    own = collect(
        lm,
        sae,
        tokens,
        latents=torch.arange(4),
        top=6,
        quantiles=2,
        per_quantile=3,
        negatives=5,
        window=7,
    )
    training, held_out = split_documents(tokens.document)
    recorder = Recorder()
    table = explain_all(own, recorder, training, held_out, lm.special_ids)
    for place, shown in enumerate(recorder.trained):
        kept = np.isin(own.document[place], training)
        assert (
            len(shown.tokens) == kept.sum()
            and (shown.tokens != 2).all()
            and (shown.acts.shape == shown.tokens.shape)
        )
        np.testing.assert_array_equal(shown.acts, own.acts[place][torch.from_numpy(kept)])
        tried = [(text, some) for text, some in recorder.tested[2 * place : 2 * place + 2]]
        assert tried[0][0] == str(place + 1) != tried[1][0]  # its own, then another's
        held = windows(own, place, held_out, lm.special_ids)
        expected = fresh(held, shown).tokens
        assert table.repeated[place] == len(held.tokens) - len(expected)
        assert all(np.array_equal(some, expected) for _, some in tried)
        assert table.active[place] + table.silent[place] == len(expected)
    assert sorted(text for text, _ in recorder.tested[1::2]) == [
        "1",
        "2",
        "3",
        "4",
    ]  # each other one is used once
    assert table.explanation.tolist() == ["1", "2", "3", "4"]
    single = explain_all(
        collect(lm, sae, tokens, latents=torch.tensor([0])), Recorder(), training, held_out
    )
    assert single[[f"shuffled_{name}" for name in SCORES]].isna().all(axis=None)


def test_study_errors(setting):
    lm, sae, tokens = setting
    silent = SAE(*sae.parameters(), origin=sae.origin)
    silent.b_enc.data[:] = -1e9
    with pytest.raises(ValueError, match="no latent of quiet ever fires"):
        study({"quiet": silent}, lm, tokens, ByToken())
    with pytest.raises(ValueError, match="give two"):
        one = Tokens(tokens.ids, torch.zeros(len(tokens), dtype=torch.int64))
        study({"one": sae}, lm, one, ByToken())
