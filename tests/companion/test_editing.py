"""Edits at copies of positions against plain passes, attributions against small edits, rules and
interpolation by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from companion.reading import concepts as rules
from companion.reading import editing
from companion.reading import positions as found_at
from companion.reading.concepts import RULES, Concept
from companion.reading.positions import Row
from models import FAMILIES, random_ids, tiny_lm, tiny_tokenizer

from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE, Origin
from jumprelu.sites import capture
from jumprelu.splicing import record_blocks, splice

PLACES = [("resid_post", 1), ("mlp_out", 0), ("attn_out", 2)]
CONCEPTS = [
    Concept("low", lambda text: True, torch.arange(3, 150)),
    Concept("high", lambda text: True, torch.arange(150, 300)),
]


def an_lm(family="gemma2") -> LM:
    return LM(tiny_lm(family).model, tiny_tokenizer(), "tiny")


def an_sae(lm, site, layer, d_sae=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    d_in = capture(lm, [(site, layer)], random_ids(1, 2))[site, layer].shape[-1]
    W = F.normalize(torch.randn(d_sae, d_in, generator=g), dim=-1)
    return SAE(
        W.T,
        torch.zeros(d_sae),
        W,
        torch.zeros(d_in),
        torch.full((d_sae,), 0.02),
        origin=Origin("tiny", site, layer),
    )


def a_row(lm, at, seed=0, layers=()):
    ids = random_ids(1, 12, seed)[0]
    with torch.no_grad(), record_blocks(lm, layers) as blocks:
        lm.model(ids[None], use_cache=False)
    at = torch.tensor(at)
    return Row(ids, 0, at, at % 2, torch.zeros(len(at)), torch.zeros(len(at)), dict(blocks))


@torch.no_grad()
def by_hand(lm, ids, t, fn, site, layer):
    """Logits at position t of a row that ends there, with fn at that position alone."""

    def replace(value):
        new = value.clone()
        new[0, t] = fn(value[0, t])
        return new

    with splice(lm, site, layer, replace):
        return lm.model(ids[None, : t + 1], use_cache=False).logits[0, t].float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("site", "layer"), PLACES)
@pytest.mark.parametrize("resume", [True, False])
def test_a_copy_is_edited_as_if_it_were_the_end_of_its_row_alone(family, site, layer, resume):
    lm = an_lm(family)
    row = a_row(lm, [2, 7, 10], layers=[n for n in (0, 1) if resume])
    factor = torch.tensor([1.0, 0.3, -2.0, 0.5])
    with torch.no_grad():
        found = found_at.copied_logits(
            lm, row, row.at[[0, 1, 2, 1]], lambda x: factor[:, None] * x + 1, (site, layer)
        )
    for logits, t, a in zip(found, (2, 7, 10, 7), factor, strict=True):
        torch.testing.assert_close(
            logits,
            by_hand(lm, row.ids, t, lambda x, a=a: a * x + 1, site, layer),
            rtol=1e-4,
            atol=1e-4,
        )
    assert not torch.allclose(found[1], found[3], atol=1e-3)


@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_an_attribution_is_what_the_log_odds_lose_by_a_small_part_of_the_latent(site, layer):
    lm = an_lm()
    lm.model.double()
    sae, row, answer = (
        an_sae(lm, site, layer).double(),
        a_row(lm, [4, 9]),
        found_at.answer_table(lm, CONCEPTS),
    )
    x, gradient = editing.gradients(lm, [row], answer, (site, layer))
    y = (sae.encode(x) * (gradient @ sae.W_dec.T)).detach()
    checked = 0
    for number, t in enumerate(row.at.tolist()):
        for latent in y[number].abs().topk(3).indices.tolist():

            def odds(part, t=t, latent=latent, number=number):
                def fn(x):
                    return x - part * sae.encode(x)[latent] * sae.W_dec[latent]

                return found_at.log_odds(
                    by_hand(lm, row.ids, t, fn, site, layer).double(), answer[row.concept[number]]
                )

            slope = ((odds(-0.01) - odds(0.01)) / 0.02).item()  # Gemma norms in float32
            assert slope == pytest.approx(y[number, latent].item(), rel=2e-3, abs=1e-5)
            checked += abs(y[number, latent].item()) > 1e-3
    assert checked >= 4


@pytest.mark.parametrize("to", [0.0, 0.1])
@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_an_edit_is_a_splice_that_takes_the_latents_away_and_nothing_else(site, layer, to):
    lm, answer = an_lm(), found_at.answer_table(an_lm(), CONCEPTS)
    sae = an_sae(lm, site, layer)
    tokens = Tokens(random_ids(6, 12, seed=3), torch.tensor([0, 0, 1, 1, 5, 5]))
    rows = found_at.find_positions(lm, tokens, CONCEPTS, [0, 1], most=9)
    sets = (
        torch.rand(2, 1, 3, sae.d_sae, generator=torch.Generator().manual_seed(0))
        < torch.tensor([0.0, 0.3, 1.0])[:, None]
    )
    found = editing.edit(lm, sae, rows, sets, answer, (site, layer), to)
    expected = {
        "changed": torch.zeros(2, 1, 3),
        "fall": torch.zeros(2, 1, 3),
        "rise": torch.zeros(2, 1, 3),
    }
    positions = torch.zeros(2)
    for row in rows:
        for t, c in zip(row.at.tolist(), row.concept.tolist(), strict=True):
            positions[c] += 1
            clean = by_hand(lm, row.ids, t, lambda x: x, site, layer)
            for k in range(3):

                def fn(x, chosen=None):
                    f = sae.encode(x)
                    return x - sum(
                        (f[i] - to) * sae.W_dec[i] for i in chosen.nonzero().flatten().tolist()
                    )

                own = by_hand(lm, row.ids, t, lambda x, c=c, k=k: fn(x, sets[c, 0, k]), site, layer)
                other = by_hand(
                    lm, row.ids, t, lambda x, c=c, k=k: fn(x, sets[1 - c, 0, k]), site, layer
                )
                expected["changed"][c, 0, k] += not answer[c, own.argmax()]
                expected["fall"][c, 0, k] += found_at.log_odds(
                    clean, answer[c]
                ) - found_at.log_odds(own, answer[c])
                target = row.ids[t + 1]
                expected["rise"][1 - c, 0, k] += F.cross_entropy(other, target) - F.cross_entropy(
                    clean, target
                )
    assert found.positions.sum(0).tolist() == positions.tolist() and positions.min() >= 2
    assert found.others.sum(0).tolist() == positions.flip(0).tolist()
    assert len(found.positions) == len({row.document for row in rows})
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name).sum(0).float(), value, rtol=1e-3, atol=1e-3)
    assert expected["fall"].abs().max() > 0.01 and found.changed[..., 0].sum() == 0


def test_positions_are_those_where_text_and_model_give_an_answer():
    lm, answer = an_lm(), found_at.answer_table(an_lm(), CONCEPTS)
    tokens = Tokens(random_ids(8, 12, seed=5), torch.arange(8))
    ruled = [CONCEPTS[0], CONCEPTS[1]._replace(rule=lambda text: len(text) % 2 == 0)]
    rows = found_at.find_positions(lm, tokens, ruled, most=4)
    with torch.no_grad():
        top = lm.model(tokens.ids, use_cache=False).logits.argmax(-1)
    expected = {}
    for r, ids in enumerate(tokens.ids.tolist()):
        for t in range(1, 11):
            for c in range(2):
                text = "".join(lm.tokenizer.decode([token]) for token in ids[1 : t + 1])
                if answer[c, ids[t + 1]] and answer[c, top[r, t]] and ruled[c].rule(text):
                    expected.setdefault(c, []).append((r, t))
    for c in range(2):
        found = [(row.document, t) for row in rows for t in row.at[row.concept == c].tolist()]
        assert found == expected[c][:4] and len(found) == 4
    never = Concept("never", lambda text: False, torch.tensor([3]))
    with pytest.raises(
        ValueError, match="no position of never at which the model is right in 8 rows"
    ):
        found_at.find_positions(lm, tokens, [*ruled, never])


@pytest.mark.parametrize(
    ("text", "bracket"),
    [("f(a[1], {", "{"), ("f(a[1], ", "("), ("f(a)", ""), (") x[", "["), ("f(]", "(")],
)
def test_the_innermost_open_bracket(text, bracket):
    assert rules.open_bracket(text) == bracket


@pytest.mark.parametrize(
    ("name", "holds", "fails"),
    [
        ("closing )", ["f(a", "x = [1, (2"], ["f[a", "f(a)", "f([1"]),
        ("closing ]", ["a[1", "f([1"], ["f(a", "[1]"]),
        ('closing "', ['x = "abc', 'x = "a" + "b'], ['"""abc', 'x = "a"', '"a\nb']),
        (
            "colon of a header",
            ["    if x", "\nelse", "def f(a)", "for i in range(3)"],
            ["f(x)", "if f(x", "if x:\n  y", "iffy"],
        ),
        ("self", ["\n    def f", "\n    def f("], ["\ndef f(", "\n    def f(a", "\n    f("]),
        (
            "import",
            ["from a.b", "x\n    from os.path"],
            ["import os", "from ", "far from x, from y, z"],
        ),
    ],
)
def test_rules_by_hand(name, holds, fails):
    rule, _ = RULES[name]
    assert all(rule(text) for text in holds) and not any(rule(text) for text in fails)


def test_answers_are_the_tokens_that_match():
    some = {name: RULES[name] for name in ("closing )", 'closing "')}
    concepts = rules.python_concepts(tiny_tokenizer(), some)
    assert [tiny_tokenizer().decode(concept.answers.tolist()) for concept in concepts] == [")", '"']
    with pytest.raises(ValueError, match="no token of this tokenizer matches .*self"):
        rules.python_concepts(tiny_tokenizer())


def test_log_odds_by_hand():
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    answer = torch.tensor([True, False, True, False])
    assert found_at.log_odds(p.log() + 3, answer).item() == pytest.approx(
        math.log(0.7 / 0.3), rel=1e-5
    )


def test_latents_needed_by_hand():
    counts = (1, 2, 4, 8)
    share = torch.tensor(
        [
            [0.0, 0.25, 0.75, 1.0],
            [0.6, 0.2, 1.0, 1.0],
            [0.0, 0.1, 0.2, 0.4],
            [0.1, 0.5, 0.4, 0.9],
            [0.0, 0.0, 0.0, math.nan],
        ],
        dtype=torch.float64,
    )
    found = editing.needed(share, counts)
    assert found[:4].tolist() == pytest.approx([2**1.5, 1.0, 16.0, 2.0]) and found[4].isnan()
    assert editing.needed(share[:1], counts, level=0.25).item() == 2.0


def test_rankings_by_hand():
    d = torch.eye(4)
    sae = SAE(
        d,
        torch.zeros(4),
        torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0])),
        torch.zeros(4),
        torch.zeros(4),
    )
    x = torch.tensor([[2.0, 1.0, 1.0, 0.0], [2.0, 0.0, 1.0, 0.0]])
    gradient = torch.tensor([[-1.0, 2.0, 0.1, 9.0], [-1.0, 2.0, 0.1, 9.0]])
    order = editing.rank(sae, x, gradient)
    assert order["attribution"].tolist() == [1, 2, 3, 0]  # means 1, 0.3, 0 (silent), -2
    assert order["activation"].tolist() == [2, 0, 1, 3]
    first = torch.stack([editing.rank(sae, x, gradient, seed)["random"][:3] for seed in range(300)])
    assert (first != 3).all()  # what never fires comes last
    shares = first[:, 0].bincount(minlength=3) / 300
    assert shares.tolist() == pytest.approx([0.4, 0.2, 0.4], abs=0.09)


def test_the_table_holds_means_over_seeds_and_concepts():
    lm = an_lm()
    tokens = Tokens(random_ids(12, 12, seed=3), torch.arange(12))
    saes = {
        "one": [an_sae(lm, "resid_post", 1, seed=s) for s in range(2)],
        "two": [an_sae(lm, "mlp_out", 0)],
    }
    table = editing.editing_table(lm, saes, tokens, CONCEPTS, counts=(1, 4, 24), most=8, draws=50)
    assert len(table) == 2 * 3 * 3 * 11
    assert (table.low <= table["mean"] + 1e-9).all() and (table["mean"] <= table.high + 1e-9).all()
    by = table.set_index(["name", "concept", "ranking", "quantity", "n"])["mean"]
    for n in (1, 4, 24):
        low, high, both = (
            by["two", concept, "attribution", "fall", n] for concept in ("low", "high", "all")
        )
        assert both == pytest.approx((low + high) / 2)
    everything = by.xs(24, level="n").xs("fall", level="quantity").unstack("ranking")
    assert everything.std(axis=1).max() < 1e-4  # all latents: the ranking does not matter
    assert by["one", "all", "attribution", "fall", 1] > by["one", "all", "random", "fall", 1]
    again = [
        editing.editing_table(lm, {"one": [sae]}, tokens, CONCEPTS, (1, 4, 24), most=8, draws=50)
        for sae in saes["one"]
    ]
    assert table["mean"][: len(again[0])].tolist() == pytest.approx(
        (0.5 * (again[0]["mean"] + again[1]["mean"])).tolist()
    )
    other = editing.editing_table(
        lm, {"one": saes["one"][:1]}, tokens, CONCEPTS, (1, 4, 24), "mean", most=8, draws=50
    )
    assert not (other["mean"] - again[0]["mean"]).abs().max() < 1e-3


def test_bad_input_is_refused():
    lm, tokens = an_lm(), random_ids(4, 12)
    sae = an_sae(lm, "resid_post", 1)
    with pytest.raises(ValueError, match="'zero' or 'mean', got 'median'"):
        editing.editing_table(lm, {"a": [sae]}, tokens, CONCEPTS, to="median")
    with pytest.raises(ValueError, match="at least two concepts"):
        editing.editing_table(lm, {"a": [sae]}, tokens, CONCEPTS[:1])
    sae.origin = Origin()
    with pytest.raises(ValueError, match="does not remember"):
        editing.editing_table(lm, {"a": [sae]}, tokens, CONCEPTS)
