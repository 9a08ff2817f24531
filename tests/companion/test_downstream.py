"""Splices from a position on: against plain passes of the model, document by document."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from companion.dark.downstream import splice_variants
from models import random_ids, tiny_lm

from jumprelu.corpus import Tokens
from jumprelu.metrics import evaluate
from jumprelu.sae import SAE, Origin
from jumprelu.sites import capture
from jumprelu.splicing import splice


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


TOKENS = Tokens(random_ids(5, 14), torch.tensor([3, 3, 7, 7, 9]))


def worse(x):
    return 0.5 * x - 0.2


def plain(lm, fn, site, layer, start):
    """(positions, loss with fn from `start` on) of each document, a row at a time."""
    sums = {document: [0, 0.0] for document in TOKENS.document.tolist()}
    for ids, document in zip(TOKENS.ids, TOKENS.document.tolist(), strict=True):

        def replace(value, ids=ids):
            new = value.clone()
            for position in range(start, len(ids)):
                if ids[position] not in lm.special_ids:
                    new[0, position] = fn(value[0, position])
            return new

        with torch.no_grad(), splice(lm, site, layer, replace):
            logits = lm.model(ids[None]).logits[0]
        for position in range(start, len(ids) - 1):
            if ids[position] not in lm.special_ids and ids[position + 1] not in lm.special_ids:
                sums[document][0] += 1
                sums[document][1] += F.cross_entropy(logits[position], ids[position + 1]).item()
    return torch.tensor(list(sums.values()), dtype=torch.float64).T


@pytest.mark.parametrize("site, layer", [("resid_post", 0), ("mlp_out", 1), ("attn_out", 0)])
@pytest.mark.parametrize("start", [0, 5])
def test_losses_are_those_of_plain_passes(lm, site, layer, start):
    found = splice_variants(
        lm, TOKENS, {"same": lambda x: x, "worse": worse}, site, layer, start, batch_rows=2
    )
    count, own = plain(lm, lambda x: x, site, layer, start)
    assert torch.equal(found.tokens, count) and torch.allclose(found.loss, own, rtol=1e-5)
    assert torch.allclose(found.spliced[0], own, rtol=1e-5)
    assert torch.allclose(found.spliced[1], plain(lm, worse, site, layer, start)[1], rtol=1e-5)
    assert not torch.allclose(found.spliced[1], own, rtol=1e-3)
    x = torch.cat(list(capture(lm, [(site, layer)], TOKENS.ids).values()))
    replaced = ~torch.isin(TOKENS.ids, torch.tensor(lm.special_ids))
    replaced[:, :start] = False
    square = (x - worse(x)).double().square().sum(-1) * replaced
    once = torch.ones(1, 3, dtype=torch.float64)
    assert found.missing[0].tolist() == [0, 0, 0]
    assert found.missing[1].tolist() == pytest.approx(
        [square[TOKENS.document == n].sum().item() for n in (3, 7, 9)], rel=1e-5
    )
    assert found.size(once, "worse", "worse").item() == 1


def test_an_sae_spliced_in_everywhere_rises_as_evaluate_says(lm):
    g = torch.Generator().manual_seed(1)
    d_in = lm.d_model
    atoms = F.normalize(torch.randn(40, d_in, generator=g), dim=-1)
    origin = Origin(site="resid_post", layer=1)
    sae = SAE(
        atoms.T, torch.zeros(40), atoms, torch.zeros(d_in), torch.full((40,), 0.1), origin=origin
    )
    found = splice_variants(lm, TOKENS, {"sae": sae, "twice": lambda x: sae(x)}, "resid_post", 1)
    once = torch.ones(1, 3, dtype=torch.float64)
    assert found.rise(once, "sae").item() == pytest.approx(
        evaluate(sae, lm, TOKENS).delta_loss.value, rel=1e-4
    )
    assert found.share(once, "twice", "sae").item() == pytest.approx(1)
    drawn = torch.tensor(
        [[2.0, 0.0, 1.0]], dtype=torch.float64
    )  # of three documents the first twice, the second not at all
    rise, tokens = found.spliced[0] - found.loss, found.tokens
    assert found.rise(drawn, "sae").item() == pytest.approx(
        ((2 * rise[0] + rise[2]) / (2 * tokens[0] + tokens[2])).item()
    )


def test_nothing_to_count_is_an_error(lm):
    with pytest.raises(ValueError, match="no position from 13 on .* rows have 14 positions"):
        splice_variants(lm, TOKENS, {"same": lambda x: x}, "resid_post", 0, start=13)
