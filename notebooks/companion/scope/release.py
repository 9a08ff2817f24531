"""Train a small release of SAEs and write it in Gemma Scope's layout.

SAEs that differ in their seed alone are releases of their own, because a path has no place for a
seed. A site has then several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jumprelu.activations import Activations
from jumprelu.corpus import Tokens
from jumprelu.exchange.gemma_scope import path_for, save_gemma_scope
from jumprelu.files import read_json, write_json
from jumprelu.harvest import harvest
from jumprelu.lm import LM
from jumprelu.metrics import evaluate_many
from jumprelu.recipe import TrainConfig
from jumprelu.sites import SITES, Key
from jumprelu.train import train_many

from ..rails.cache import remember
from ..rails.jobs import LOG_ROWS
from ..rails.sweep import sweep

HARVESTED = 2**25
"""Activations, as single numbers, that a harvest of many places holds before they are written; but
16 rows at least."""


def harvest_all(
    lm: LM, tokens: Tokens, sites: Sequence[str], layers: Sequence[int], storage: str
) -> dict[Key, Activations]:
    """A store for each site and layer, of one pass; remembered. One shard of each is in memory:
    shards are small if many."""
    rows = max(16, HARVESTED // (len(sites) * len(layers) * tokens.ids.shape[1] * lm.d_model))
    return remember(
        harvest, lm, tokens, site=list(sites), layer=list(layers), dtype=storage, shard_rows=rows
    )


def build(
    lm: LM,
    train_tokens: Tokens,
    test_tokens: Tokens,
    configs: Sequence[TrainConfig],
    ends: Sequence[int],
    layer: int,
    widths: Sequence[int],
    seeds: int,
    layers: Sequence[int] = (),
    storage: str = "float32",
    workers: int = 0,
    transcoders: bool = True,
    *,
    out: str | Path,
) -> dict[str, list[str]]:
    """Train a small scope and write it in Gemma Scope's layout below `out`: site → its folders, one
    a seed.

    configs: one for each sparsity. At `layer`: all of them at the first of `widths`, those whose
    places are in `ends` at the others, each with `seeds` seeds; wider ones at other sites than the
    residual stream with one. At other `layers` (by default all): those of `ends` at the first
    width, with one seed. transcoders: also transcoders of the MLP at `layer`, with all of `configs`
    and `seeds`, under "transcoder". The L0 in a path is measured on `test_tokens`. A finished scope
    is returned at once; of an unfinished one, the runs are kept.

    Raises ValueError if two sparsities come out at one L0: the layout has one path for both.
    """
    out, index = Path(out), Path(out) / "releases.json"
    if not index.exists():
        stores = harvest_all(
            lm, train_tokens, SITES, sorted({layer, *(layers or range(lm.n_layers))}), storage
        )
        jobs = []
        for (site, n), acts in stores.items():
            for width in widths if n == layer else widths[:1]:
                first = n == layer and width == widths[0]
                for seed in range(seeds if first or (n == layer and site == "resid_post") else 1):
                    changed = {"d_sae": width, "seed": seed}
                    jobs += [
                        (f"{site}/seed_{seed}", acts, dataclasses.replace(configs[i], **changed))
                        for i in (range(len(configs)) if first else ends)
                    ]
        scored = sweep(
            [(acts, config) for _, acts, config in jobs], lm, test_tokens, workers or None
        )
        paths = [
            f"{name}/{path_for(one.layer, one.config.d_sae, one.report.l0.value)}"
            for (name, _, _), one in zip(jobs, scored, strict=True)
        ]
        _check_apart(paths)
        for path, one in zip(
            tqdm(paths, desc="writing the scope", unit="SAE", leave=False), scored, strict=True
        ):
            save_gemma_scope(one.sae(), out / path)
        names = list(dict.fromkeys(name for name, _, _ in jobs))
        if transcoders:
            changed = [
                [dataclasses.replace(config, d_sae=widths[0], seed=seed) for config in configs]
                for seed in range(seeds)
            ]
            names += _write_transcoders(lm, train_tokens, test_tokens, changed, layer, storage, out)
        write_json(index, names)  # last: without it the scope is unfinished
    names = read_json(index)
    return {
        site: [str(out / name) for name in names if name.startswith(f"{site}/")]
        for site in (*SITES, "transcoder")
    }


build.version = 1  # of its key, see rails/cache.py


def _check_apart(paths: Sequence[str]) -> None:
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"two SAEs would be {twice[0]}: choose sparsities further apart")


def _write_transcoders(
    lm: LM,
    train_tokens: Tokens,
    test_tokens: Tokens,
    configs: Sequence[Sequence[TrainConfig]],
    layer: int,
    storage: str,
    out: Path,
) -> list[str]:
    """Transcoders with the configurations of each seed, at the place of Gemma Scope's; returns
    their folders."""
    read, predicted = harvest_all(
        lm, train_tokens, ("mlp_in_before_gain", "mlp_out"), [layer], storage
    ).values()
    for seed, some in enumerate(configs):
        found = [
            result.sae
            for result in remember(train_many, read, some, targets=predicted, log_rows=LOG_ROWS)
        ]
        paths = [
            f"transcoder/seed_{seed}/{path_for(layer, sae.d_sae, report.l0.value)}"
            for sae, report in zip(found, evaluate_many(found, lm, test_tokens), strict=True)
        ]
        _check_apart(paths)
        for path, sae in zip(paths, found, strict=True):
            save_gemma_scope(sae, out / path)
    return [f"transcoder/seed_{seed}" for seed in range(len(configs))]
