"""Contexts of latents against a brute-force reference on dense activations, and the guarantees one
by one."""

import dataclasses

import numpy as np
import pytest
import torch

from jumprelu.corpus import Tokens
from jumprelu.latents import choosing, contexts
from jumprelu.latents.choosing import EMPTY, NEGATIVE, OVERSAMPLE, TOP, Choice, uniform
from jumprelu.latents.contexts import BINS, collect, collect_many, frequencies
from jumprelu.sae import SAE, Origin
from jumprelu.sites import capture
from tests.models import random_ids, tiny_lm

PLACE = ("resid_post", 1)
CHOICE = Choice(top=4, quantiles=3, per_quantile=2, negatives=5, window=7, seed=3)
SMALL = dataclasses.asdict(CHOICE)


def random_sae(d_in, d_sae=12, k=None, seed=1, threshold=6.0):
    g = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae, generator=g)
    sae = SAE(
        W_enc,
        torch.zeros(d_sae),
        W_enc.T,
        torch.zeros(d_in),
        (0 if k else threshold) * torch.rand(d_sae, generator=g),
        k,
        Origin(site=PLACE[0], layer=PLACE[1]),
    )
    sae.b_enc.data[3] = -1e9  # dead
    sae.b_enc.data[-1] -= 12  # rare
    return sae


@pytest.fixture(scope="module")
def setting():
    lm = tiny_lm("gemma2")
    ids = random_ids(30, 16, seed=3)
    ids[4, 7] = 1  # an EOS in the middle of a row
    return (
        lm,
        random_sae(lm.d_model),
        Tokens(ids, torch.arange(30) // 3 * 5),
    )  # 10 documents of 3 rows, with gaps in the numbers


def dense(lm, sae, tokens):
    """Activations [rows, positions, d_sae], 0 at special tokens."""
    f = sae.encode(capture(lm, [PLACE], tokens.ids)[PLACE]).detach()
    return f * (tokens.ids > 2)[:, :, None]


def reference(f, tokens, latent, choice):
    """(quantile, row, position) of each slot of a latent, None where it is empty, in plain
    Python."""
    values = {(int(r), int(p)): float(f[r, p, latent]) for r, p in (tokens.ids > 2).nonzero()}
    positive = {at: value for at, value in values.items() if value > 0}

    def first_of_each_document(places, most):
        found, seen = [], set()
        for at in places:
            document = int(tokens.document[at[0]])
            if document not in seen and len(found) < most:
                seen.add(document), found.append(at)
        return found + [None] * (most - len(found))

    def key(*parts):
        return float(uniform(choice.seed, *parts))

    top = first_of_each_document(sorted(positive, key=lambda at: (-positive[at], at)), choice.top)
    size = OVERSAMPLE * choice.quantiles * choice.per_quantile
    sample = sorted(positive, key=lambda at: key(0, latent, *at))[:size]
    sample = sorted(sample, key=lambda at: (-positive[at], at))
    slots = [(TOP, at) for at in top]
    for number in range(choice.quantiles):
        mine = [
            at
            for i, at in enumerate(sample)
            if i * choice.quantiles // len(sample) == number and at not in top
        ]
        drawn = first_of_each_document(
            sorted(mine, key=lambda at: key(0, latent, *at)), choice.per_quantile
        )
        slots += [(number + 1, at) for at in drawn]
    silent = []
    for row in range(len(tokens)):
        ordinary = [p for r, p in values if r == row]
        for attempt in range(choosing.ATTEMPTS):
            position = ordinary[int(key(2 + attempt, latent, row) * len(ordinary))]
            if f[row, max(0, position - 3) : position + 4, latent].max() == 0:
                silent.append((row, position))
                break
    silent = first_of_each_document(
        sorted(silent, key=lambda at: key(1, latent, at[0])), choice.negatives
    )
    slots += [(NEGATIVE, at) for at in silent]
    return [(EMPTY, -1, -1) if at is None else (quantile, *at) for quantile, at in slots]


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("batch_rows, waiting", [(1, 0), (4, 100), (30, choosing.WAITING)])
def test_contexts_equal_a_brute_force_reference(setting, k, batch_rows, waiting, monkeypatch):
    monkeypatch.setattr(choosing, "WAITING", waiting)
    lm, _, tokens = setting
    sae = random_sae(lm.d_model, k=k)
    found = collect(lm, sae, tokens, batch_rows=batch_rows, **SMALL)
    f = dense(lm, sae, tokens)
    assert [t.dtype for t in found[:3]] == [torch.int64, torch.int64, torch.float32]
    for latent in range(sae.d_sae):
        slots = torch.stack([found.quantile, found.row, found.position], -1)[latent]
        assert [tuple(slot) for slot in slots.tolist()] == reference(f, tokens, latent, CHOICE)
        for slot, (quantile, row, position) in enumerate(slots.tolist()):
            for offset in range(-3, 4):
                at = position + offset
                inside = quantile != EMPTY and 0 <= at < 16
                assert found.tokens[latent, slot, offset + 3] == (
                    tokens.ids[row, at] if inside else -1
                )
                expected = f[row, at, latent].item() if inside else 0.0
                assert found.acts[latent, slot, offset + 3].item() == pytest.approx(
                    expected, rel=1e-4, abs=1e-4
                )
            assert found.document[latent, slot] == (
                tokens.document[row] if quantile != EMPTY else -1
            )
    flat = f[tokens.ids > 2]
    assert torch.equal(found.frequency, (flat > 0).double().mean(0))
    torch.testing.assert_close(found.maximum, flat.max(0).values)
    for latent in range(sae.d_sae):
        positive = flat[:, latent][flat[:, latent] > 0].numpy()
        counts = np.histogram(positive, BINS, (0, positive.max() if len(positive) else 1))[0]
        np.testing.assert_array_equal(found.histogram[latent], counts)


@pytest.mark.parametrize("k", [None, 3])
def test_some_latents_have_the_same_windows_as_among_all(setting, k):
    lm, _, tokens = setting
    sae = random_sae(lm.d_model, k=k)
    few = {**SMALL, "quantiles": 0, "negatives": 0}
    whole, some = (
        collect(lm, sae, tokens, latents=latents, **few)
        for latents in (None, torch.tensor([11, 0, 5]))
    )
    for name in ("tokens", "row", "position", "quantile", "frequency", "histogram"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[[11, 0, 5]]), name
    assert some.latents.tolist() == [11, 0, 5]


def test_the_model_may_be_read_twice_or_its_activations_kept(setting, monkeypatch):
    lm, sae, tokens = setting
    kept = collect(lm, sae, tokens, batch_rows=7, **SMALL)
    monkeypatch.setattr(contexts, "KEPT", 0)
    again = collect(lm, sae, tokens, batch_rows=7, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_top_contexts_are_of_different_documents_and_the_best_of_each(setting):
    lm, sae, tokens = setting
    found = collect(lm, sae, tokens, top=10, quantiles=0, negatives=0, window=1)
    f = dense(lm, sae, tokens)
    documents = tokens.document.unique()
    best = (
        torch.stack([f[tokens.document == d].flatten(0, 1).max(0).values for d in documents])
        .sort(0, descending=True)
        .values
    )
    torch.testing.assert_close(found.acts[:, :, 0], best.T)
    for some in found.document:
        some = some[some >= 0]
        assert len(some.unique()) == len(some)
    assert (found.quantile[3] == EMPTY).all() and (found.quantile[0] == TOP).all()


def test_negatives_are_silent_in_the_whole_window_and_positives_fire_at_their_centre(setting):
    lm, sae, tokens = setting
    found = collect(lm, sae, tokens, **SMALL)
    negative, positive = found.quantile == NEGATIVE, found.quantile >= 0
    assert negative.sum() > 20 and positive.sum() > 50
    assert (found.acts[negative] == 0).all() and (found.acts[positive][:, 3] > 0).all()
    assert (found.tokens[negative][:, 3] > 2).all()  # no special token is a centre
    f = dense(lm, sae, tokens)
    for m, n in negative.nonzero().tolist():
        row, position = int(found.row[m, n]), int(found.position[m, n])
        assert f[row, max(0, position - 3) : position + 4, m].max() == 0


def test_quantile_contexts_come_from_their_share_of_the_activations(setting):
    lm, sae, tokens = setting
    choice = {
        **SMALL,
        "top": 0,
        "quantiles": 4,
        "per_quantile": 40,
        "negatives": 0,
    }  # a reservoir that holds everything
    found = collect(lm, sae, tokens, **choice)
    f = dense(lm, sae, tokens)[tokens.ids > 2]
    for latent in (0, 1, 2):
        positive = f[:, latent][f[:, latent] > 0].sort(descending=True).values
        for number in range(1, 5):
            acts = found.acts[latent, found.quantile[latent] == number, 3]
            bounds = [int(np.ceil(len(positive) * share / 4)) for share in (number - 1, number)]
            held = positive[bounds[0] : bounds[1]]
            assert len(acts) and acts.max() <= held[0] + 1e-5 and acts.min() >= held[-1] - 1e-5


def test_another_seed_draws_others_and_keeps_the_top(setting):
    lm, sae, tokens = setting
    one, two = (collect(lm, sae, tokens, **{**SMALL, "seed": seed}) for seed in (0, 1))
    top = one.quantile == TOP
    assert torch.equal(one.row[top], two.row[top])
    assert not torch.equal(one.row, two.row)


def test_many_equals_one_by_one(setting):
    lm, sae, tokens = setting
    other = random_sae(lm.d_model, d_sae=5, k=2, seed=4)
    latents = [torch.tensor([1, 2, 8]), None]
    many = collect_many(lm, [sae, other], tokens, latents=latents, choice=CHOICE, batch_rows=8)
    for each, some, found in zip((sae, other), latents, many, strict=True):
        alone = collect(lm, each, tokens, latents=some, batch_rows=8, **SMALL)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_frequencies_of_all_latents(setting):
    lm, sae, tokens = setting
    other = random_sae(lm.d_model, k=2, seed=4)
    for each, found in zip((sae, other), frequencies(lm, [sae, other], tokens), strict=True):
        assert torch.equal(found, (dense(lm, each, tokens)[tokens.ids > 2] > 0).double().mean(0))
    assert found.sum() <= 2  # L0 of TopK with k = 2


def test_hashed_numbers_are_uniform_and_depend_on_every_part():
    places = np.arange(20_000)
    numbers = uniform(5, 0, places)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.bincount((numbers * 20).astype(int), minlength=20)
    assert (
        np.square(counts - 1000).sum() / 1000 < 44
    )  # chi-squared, 19 degrees of freedom: 0.1 % are above
    for other in (
        uniform(6, 0, places),
        uniform(5, 1, places),
        uniform(5, 0, places + 1),
        uniform(5, places, 0),
    ):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.03
    assert uniform(5, 0, 7) == numbers[7]


def test_errors_say_what_was_expected(setting):
    lm, sae, tokens = setting
    with pytest.raises(ValueError, match="does not remember"):
        collect(lm, SAE(*sae.parameters()), tokens)
    with pytest.raises(ValueError, match="numbers from 0 to 11"):
        collect(lm, sae, tokens, latents=torch.tensor([12]))
    with pytest.raises(ValueError, match="twice"):
        collect(lm, sae, tokens, latents=torch.tensor([4, 4]))
    with pytest.raises(ValueError, match="special"):
        collect(lm, sae, torch.full((2, 4), 2))
    with pytest.raises(ValueError, match="counts of at least 0"):
        collect(lm, sae, tokens, top=-1)
    with pytest.raises(ValueError, match="expects d_in = 16"):
        collect(lm, SAE(*sae.parameters(), origin=Origin(site="attn_out", layer=1)), tokens)
