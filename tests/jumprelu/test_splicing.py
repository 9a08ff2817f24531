"""Splicer: what is replaced, what is counted; a pass that resumes gives what a whole one gives."""

from __future__ import annotations

import pytest
import torch

from jumprelu.corpus import Tokens
from jumprelu.sae import SAE, Origin
from jumprelu.sites import SITES, capture
from jumprelu.splicing import Splicer, known_before, on_device, place_of, splice
from tests.models import FAMILIES, random_ids, tiny_lm

IDS = random_ids(5, 10)
IDS[1, 4], IDS[2, 7:] = 1, 0  # EOS within, padding at the end
TOKENS = Tokens(IDS, torch.tensor([7, 7, 9, 12, 12]))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_batch_predicts_as_a_whole_pass_with_a_splice_does(family, site, layer):
    lm, start = tiny_lm(family), 2
    keep = (IDS > 2) & (torch.arange(10) >= start)
    counted = keep[:, :-1] & (IDS[:, 1:] > 2)

    def flipped(value):
        return torch.where(keep[..., None], value.flip(-1), value)

    with splice(lm, site, layer, flipped):
        whole = lm.model(IDS).logits[:, :-1][counted].log_softmax(-1)
    own = lm.model(IDS).logits[:, :-1][counted].log_softmax(-1)
    batches = list(Splicer(lm, TOKENS, [(site, layer)], start, batch_rows=2))
    assert [len(batch.ids) for batch, _ in batches] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([log_p for _, log_p in batches]), own)
    spliced = torch.cat([batch.spliced(site, layer, lambda x: x.flip(-1)) for batch, _ in batches])
    torch.testing.assert_close(spliced, whole)
    assert not torch.allclose(spliced, own, atol=1e-4)
    target = torch.cat([batch.target for batch, _ in batches])
    assert torch.equal(target, IDS[:, 1:][counted])
    document = torch.cat([batch.counted_document for batch, _ in batches])
    number = torch.tensor([0, 0, 1, 2, 2])[:, None].expand(5, 9)
    assert torch.equal(document, number[counted])
    losses = torch.cat([batch.losses(log_p) for batch, log_p in batches])
    torch.testing.assert_close(losses, -own[torch.arange(len(target)), target])


@torch.no_grad()
def test_what_replaces_sees_the_kept_positions_alone():
    lm, seen = tiny_lm(), []

    def same(value):
        seen.append(value)
        return value

    for batch, log_p in Splicer(lm, TOKENS, [("mlp_out", 1)]):
        assert torch.equal(batch.spliced("mlp_out", 1, same), log_p)
    found = capture(lm, [("mlp_out", 1)], IDS)["mlp_out", 1]
    assert torch.equal(torch.cat(seen), found[IDS > 2])


def test_places_of_saes_and_where_passes_resume():
    sae = SAE(*(torch.ones(n) for n in ((2, 3), (3,), (3, 2), (2,), (3,))))
    with pytest.raises(ValueError, match="does not remember where it was trained"):
        place_of(sae, site="mlp_out")
    assert place_of(sae, "mlp_out", 0) == ("mlp_out", 0)
    sae.origin = Origin(site="resid_post", layer=4)
    assert place_of(sae) == ("resid_post", 4) and place_of(sae, layer=0) == ("resid_post", 0)
    assert known_before("resid_post", 4) == 4 and known_before("attn_out", 0) == -1
    assert on_device(sae, torch.device("cpu")) is sae
    moved = on_device(sae, torch.device("meta"))
    assert moved.W_enc.device.type == "meta" and sae.W_enc.device.type == "cpu"
