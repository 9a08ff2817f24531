"""Stores of several places are those of single ones."""

from __future__ import annotations

import torch
from companion.rails.stores import harvest_places
from models import random_ids, save_tiny

import jumprelu as jr


def test_each_place_has_the_store_that_it_has_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    lm = jr.load_lm(save_tiny("llama", tmp_path / "model"))
    tokens = jr.Tokens(random_ids(12, 16), torch.arange(12))
    places = [("resid_post", 1), ("mlp_out", 0), ("resid_post", 0), ("attn_out", 0)]
    stores = harvest_places(lm, tokens, places, "float32")
    assert [(store.site, store.layer) for store in stores] == places
    folders = [path.name for path in (tmp_path / "cache/results").glob("harvest-*")]
    assert len(folders) == 2  # one pass for both layers of the residual stream, one for the others
    for (site, layer), store in zip(places, stores, strict=True):
        alone = jr.harvest(lm, tokens, site=site, layer=layer, out=tmp_path / f"{site}-{layer}")
        assert store.fingerprint == alone.fingerprint
