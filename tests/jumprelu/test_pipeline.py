"""The public names from end to end, on models that the package has never seen: no tokenizer, other
widths and vocabularies."""

import pytest
import torch
from companion.rails import study
from companion.rails.cache import remember

import jumprelu as jr
from tests.models import random_ids, save_tiny


@pytest.mark.parametrize(
    "family, overrides",
    [
        (
            "llama",
            {
                "hidden_size": 36,
                "vocab_size": 517,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
            },
        ),
        ("gemma2", {}),
        ("gpt_neox", {}),
        ("gpt2", {}),
    ],
)
def test_harvest_train_evaluate(tmp_path, family, overrides):
    lm = jr.load_lm(save_tiny(family, tmp_path / "model", **overrides))
    assert lm.tokenizer is None
    tokens = random_ids(60, 24)
    for site in ("resid_post", "mlp_out", "attn_out"):
        acts = jr.harvest(lm, tokens, site=site, layer=1, out=tmp_path / site)
        assert len(acts) == 60 * 23 and (acts.site, acts.layer, acts.model_name) == (
            site,
            1,
            "model",
        )
        config = jr.TrainConfig(d_sae=2 * acts.d_in, steps=120, batch_size=64, sparsity=3e-3)
        sae, log = jr.train(acts, config, out=tmp_path / f"sae-{site}")
        report = jr.evaluate(jr.load_sae(tmp_path / f"sae-{site}"), lm, tokens[:20])
        assert 0 < report.fvu.value < 0.9 and 0 < report.l0.value < 2 * acts.d_in
        assert report.n_tokens == 20 * 23 and report.n_documents == 20 and report.l0.se > 0
        assert sae.origin.site == site and log.fvu.iloc[-1] < log.fvu.iloc[0]


def test_another_models_sae_is_refused(tmp_path):
    lm = jr.load_lm(save_tiny("llama", tmp_path / "a"))
    other = jr.load_lm(save_tiny("llama", tmp_path / "b", hidden_size=32))
    acts = jr.harvest(lm, random_ids(20, 12), site="resid_post", layer=0, out=tmp_path / "acts")
    sae, _ = jr.train(acts, jr.TrainConfig(d_sae=20, steps=5, batch_size=32))
    with pytest.raises(ValueError, match="has width 32, the SAE expects d_in = 16"):
        jr.evaluate(sae, other, random_ids(4, 12))


def test_studies(tmp_path, monkeypatch):
    """Seeds are trained and scored once, and remembered; tables have a row where they say so."""
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    lm = jr.load_lm(save_tiny("llama", tmp_path / "model"))
    tokens = jr.Tokens(random_ids(40, 24), torch.arange(40) // 2)
    acts = remember(jr.harvest, lm, tokens, site="resid_post", layer=1)
    config = jr.TrainConfig(d_sae=24, steps=30, batch_size=64, log_threshold=True)
    runs = study.train_seeds(acts, config, 2)
    scores = study.score_runs(runs, lm, tokens)
    again = study.score_runs(study.train_seeds(acts, config, 2), lm, tokens)
    assert scores[0].l0 == again[0].l0 and torch.equal(scores[1].frequency, again[1].frequency)
    assert len(list((tmp_path / "cache" / "results").glob("evaluate-*"))) == 2
    log = study.joined_logs(runs)
    assert log.seed.nunique() == 2 and len(log) == len(runs[0].log) * 2
    latents = study.latent_table(runs[0], scores[0], config.threshold_init)
    assert len(latents) == 24 and latents.threshold.median() == pytest.approx(
        runs[0].log.threshold_p50.iloc[-1], rel=0.05
    )
    shares = (
        study.l0_histogram({"a": scores[0], "b": scores[1]}).groupby("architecture").share.sum()
    )
    assert shares.tolist() == pytest.approx([1, 1])
    mean = sum(
        (rows.l0 * rows.share).sum()
        for _, rows in study.l0_histogram({"a": scores[0]}).groupby("architecture")
    )
    assert mean == pytest.approx(scores[0].l0.value, abs=0.5)
    assert study.score_table("x", scores).l0.tolist() == [score.l0.value for score in scores]
