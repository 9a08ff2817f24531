"""Configuration and schedules."""

import dataclasses
import math

import pytest

from jumprelu.recipe import (
    SPARSITY_LOSSES,
    TrainConfig,
    bandwidth_at,
    lr_factor,
    paper_recipe,
    sparsity_at,
)


def test_schedules():
    config = TrainConfig(
        steps=1000,
        lr_warmup=0.1,
        lr_decay=0.2,
        sparsity=2.0,
        sparsity_warmup=0.5,
        bandwidth=1.0,
        bandwidth_end=0.01,
        bandwidth_anneal=0.5,
    )
    assert lr_factor(config, 0) == pytest.approx(0.1)
    assert lr_factor(config, 50) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert lr_factor(config, 500) == 1.0
    assert lr_factor(config, 900) == pytest.approx(0.5)
    assert [sparsity_at(config, s) for s in (0, 250, 500, 999)] == [0.0, 1.0, 2.0, 2.0]
    assert bandwidth_at(config, 0) == 1.0
    assert bandwidth_at(config, 250) == pytest.approx(math.sqrt(0.01))
    assert bandwidth_at(config, 999) == pytest.approx(0.01)
    assert bandwidth_at(TrainConfig(bandwidth=0.3), 77) == 0.3


def test_schedules_do_not_notice_an_early_end():
    whole = TrainConfig(steps=1000, bandwidth_end=0.01, sparsity_warmup=0.5)
    half = dataclasses.replace(whole, stop_after=0.5)
    for schedule in (lr_factor, sparsity_at, bandwidth_at):
        assert [schedule(half, s) for s in range(500)] == [schedule(whole, s) for s in range(500)]
    lengths = {
        share: dataclasses.replace(whole, stop_after=share).length
        for share in (1.0, 0.5, 0.3333, 1e-9)
    }
    assert lengths == {1.0: 1000, 0.5: 500, 0.3333: 333, 1e-9: 1}


def test_paper_recipe():
    config = paper_recipe(steps=100_000, d_sae=64)
    assert (config.lr, config.betas, config.batch_size) == (7e-5, (0.0, 0.999), 4096)
    assert (config.bandwidth, config.threshold_init) == (1e-3, 1e-3)
    assert lr_factor(config, 1_000) == 1.0 and lr_factor(config, 99_999) == 1.0
    assert sparsity_at(config, 5_000) == pytest.approx(config.sparsity / 2)
    assert config.unit_norm_atoms and config.d_sae == 64 and not config.mean_b_dec


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "vanilla"}, "unknown architecture 'vanilla'"),
        (
            {"architecture": "topk", "sparsity_loss": "l0"},
            "topk cannot be trained with sparsity_loss='l0'",
        ),
        ({"kernel": "box"}, "unknown kernel 'box'"),
        ({"bandwidth": 0.0}, "bandwidth must be above 0"),
        ({"steps": 0}, "steps must be above 0"),
        ({"lr_warmup": 1000}, "lr_warmup is a share of the run"),
        ({"stop_after": 0.0}, "stop_after must be above 0, got 0.0"),
        ({"stop_after": 1.5}, "stop_after is a share of the run between 0 and 1, got 1.5"),
        ({"stop_after": math.nan}, "stop_after must be above 0, got nan"),
        ({"sparsity": -1.0}, "sparsity must be 0 or more"),
        ({"architecture": "topk", "k": 9, "d_sae": 8}, "k = 9 latents cannot be active"),
        (
            {"architecture": "topk", "k": 9, "topk_buckets": 8},
            "topk_buckets must be from k = 9 to d_sae = 4096, got 8",
        ),
        (
            {"architecture": "topk", "topk_buckets": 5000},
            "topk_buckets must be from k = 32 to d_sae = 4096, got 5000",
        ),
        (
            {"architecture": "batchtopk", "topk_buckets": 512},
            "topk_buckets = 512 is for 'topk', not 'batchtopk'",
        ),
    ],
)
def test_bad_configurations_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_free_norms_go_with_the_invariant_l1():
    free = {a: not TrainConfig(architecture=a).unit_norm_atoms for a in SPARSITY_LOSSES}
    assert free == {
        "relu": True,
        "gated": True,
        "topk": False,
        "batchtopk": False,
        "jumprelu": False,
    }
