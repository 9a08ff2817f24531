"""Metrics against two tokens done by hand, and against plain computations on a small model."""

import pytest
import torch
import torch.nn.functional as F

from jumprelu.corpus import Tokens
from jumprelu.metrics import evaluate
from jumprelu.sae import SAE, Origin, Transcoder
from jumprelu.sites import capture
from jumprelu.splicing import splice
from tests.models import tiny_lm


def fvu(x, x_hat):
    x, x_hat = x.double(), x_hat.double()
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.fixture(scope="module")
def setting():
    lm = tiny_lm("gemma2")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, lm.model.config.vocab_size, (6, 12), generator=g)
    ids[:, 0] = lm.model.config.bos_token_id
    return lm, Tokens(ids, torch.tensor([0, 0, 1, 2, 2, 5]))


def identity_sae(d, **origin):
    eye, zero = torch.eye(d), torch.zeros
    return SAE(
        torch.cat([eye, -eye], 1),
        zero(2 * d),
        torch.cat([eye, -eye]),
        zero(d),
        zero(2 * d),
        origin=Origin(site="resid_post", layer=1, **origin),
    )


def test_identity_and_dead_saes(setting):
    lm, tokens = setting
    report = evaluate(identity_sae(lm.d_model), lm, tokens)
    assert report.fvu.value == pytest.approx(
        0, abs=1e-10
    ) and report.delta_loss.value == pytest.approx(0, abs=1e-6)
    assert report.l0.value == lm.d_model and report.kl.value == pytest.approx(0, abs=1e-6)
    assert report.norm_ratio.value == pytest.approx(1)
    assert (report.n_tokens, report.n_documents) == (6 * 11, 4)
    x = capture(lm, [("resid_post", 1)], tokens.ids)["resid_post", 1][:, 1:].flatten(0, 1)
    dead = identity_sae(lm.d_model)
    dead.threshold.data += 1e9
    dead.b_dec.data = x.mean(0)
    report = evaluate(dead, lm, tokens)
    assert (
        report.fvu.value == pytest.approx(1, abs=1e-5)
        and report.dead.value == 1.0
        and report.l0.value == 0.0
    )


def test_report_equals_plain_computation(setting):
    lm, tokens = setting
    g = torch.Generator().manual_seed(1)
    d, ids = lm.d_model, tokens.ids
    sae = SAE(
        torch.randn(d, 20, generator=g),
        torch.zeros(20),
        torch.randn(20, d, generator=g),
        torch.zeros(d),
        torch.rand(20, generator=g),
        origin=Origin(site="resid_post", layer=1),
    )
    report = evaluate(sae, lm, tokens, batch_rows=4)
    again = evaluate(sae, lm, tokens, batch_rows=1)
    assert again.kl.value == pytest.approx(
        report.kl.value, rel=1e-4
    ) and again.fvu.se == pytest.approx(report.fvu.se, rel=1e-6)
    x = capture(lm, [("resid_post", 1)], ids)["resid_post", 1]
    inner = x[:, 1:].flatten(0, 1)  # without BOS
    assert report.fvu.value == pytest.approx(fvu(inner, sae(inner)), rel=1e-6)
    assert report.l0.value == pytest.approx((sae.encode(inner) > 0).sum(-1).double().mean().item())
    torch.testing.assert_close(report.frequency, (sae.encode(inner) > 0).float().mean(0))
    assert torch.equal(report.l0_per_token, (sae.encode(inner) > 0).sum(-1))

    def replace(value):  # the plain way: everything but position 0
        return torch.cat([value[:, :1], sae(value[:, 1:])], 1)

    with torch.no_grad():
        clean = lm.model(ids).logits
        with splice(lm, "resid_post", 1, replace):
            spliced = lm.model(ids).logits
    p, q = clean[:, 1:-1].flatten(0, 1), spliced[:, 1:-1].flatten(0, 1)
    target = ids[:, 2:].flatten()
    assert report.loss.value == pytest.approx(F.cross_entropy(p, target).item(), rel=1e-5)
    assert report.delta_loss.value == pytest.approx(
        (F.cross_entropy(q, target) - F.cross_entropy(p, target)).item(), rel=1e-4
    )
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert report.kl.value == pytest.approx(kl.item(), rel=1e-4)


def test_shrinkage_shows_in_the_norm_ratio(setting):
    lm, tokens = setting
    shrunk = identity_sae(lm.d_model)
    shrunk.W_dec.data *= 0.8
    assert evaluate(shrunk, lm, tokens).norm_ratio.value == pytest.approx(1 / 0.8, rel=1e-5)


def random_transcoder(d, site, skip):
    g = torch.Generator().manual_seed(2)
    return Transcoder(
        torch.randn(d, 20, generator=g),
        torch.zeros(20),
        torch.randn(20, d, generator=g),
        torch.zeros(d),
        torch.rand(20, generator=g),
        W_skip=torch.randn(d, d, generator=g) if skip else None,
        origin=Origin(site=site, layer=1),
    )


@pytest.mark.parametrize("site, skip", [("mlp_in", False), ("mlp_in_before_gain", True)])
def test_a_transcoder_reads_before_the_mlp_and_is_spliced_in_after_it(setting, site, skip):
    lm, tokens = setting
    sae, ids = random_transcoder(lm.d_model, site, skip), tokens.ids
    report = evaluate(sae, lm, tokens, batch_rows=4)
    found = capture(lm, [(site, 1), ("mlp_out", 1)], ids)
    predicted, inner = sae(found[site, 1]), found[site, 1][:, 1:].flatten(0, 1)  # without BOS
    assert report.fvu.value == pytest.approx(
        fvu(found["mlp_out", 1][:, 1:].flatten(0, 1), sae(inner)), rel=1e-6
    )
    torch.testing.assert_close(report.frequency, (sae.encode(inner) > 0).float().mean(0))
    with torch.no_grad():
        clean = lm.model(ids).logits
        with splice(lm, "mlp_out", 1, lambda value: torch.cat([value[:, :1], predicted[:, 1:]], 1)):
            spliced = lm.model(ids).logits
    p, q, target = (
        clean[:, 1:-1].flatten(0, 1),
        spliced[:, 1:-1].flatten(0, 1),
        ids[:, 2:].flatten(),
    )
    assert report.delta_loss.value == pytest.approx(
        (F.cross_entropy(q, target) - F.cross_entropy(p, target)).item(), rel=1e-4
    )


def test_errors(setting):
    lm, tokens = setting
    with pytest.raises(ValueError, match="does not remember"):
        evaluate(SAE(*[torch.zeros(s) for s in ((4, 6), (6,), (6, 4), (4,), (6,))]), lm, tokens)
    with pytest.raises(ValueError, match="has width"):
        evaluate(
            SAE(*[torch.zeros(s) for s in ((4, 6), (6,), (6, 4), (4,), (6,))]),
            lm,
            tokens,
            "resid_post",
            1,
        )
    with pytest.raises(ValueError, match="vocabulary"):
        evaluate(identity_sae(lm.d_model), lm, torch.full((2, 4), 10_000))
    with pytest.raises(ValueError, match="no loss to compare"):
        alternating = torch.full((2, 4), lm.model.config.bos_token_id)
        alternating[:, ::2] = torch.tensor([[5, 6], [7, 8]])
        evaluate(identity_sae(lm.d_model), lm, alternating)
    special = torch.full((2, 4), lm.model.config.bos_token_id)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(identity_sae(lm.d_model), lm, special)
