"""Where a step's time goes: the arithmetic by hand, the profile accounts for all of the time, every
way is timed."""

import time

import pytest
import torch
from companion.speed.steptime import arithmetic, density_table, profile_step

from jumprelu.activations import activations_from_tensor
from jumprelu.recipe import TrainConfig
from jumprelu.state import TrainState


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    return activations_from_tensor(x, tmp_path_factory.mktemp("acts"))


def test_arithmetic():
    parts = arithmetic(d_in=2, d_sae=10, l0=3, entries=4)
    assert parts.dense.sum() == 10 * 2 * 10  # 10·d_in·d_sae
    assert parts.on_s.tolist() == [40, 12, 16, 12, 12]


def test_the_profile_accounts_for_the_time(acts):
    config = TrainConfig(d_sae=256, steps=1000, batch_size=200, threshold_init=0.3, bandwidth=0.02)
    state = TrainState(acts, config, torch.device("cpu"))
    batches = (acts.rows(600) / state.input_scale).split(200)
    began = time.perf_counter()
    profile = profile_step(state, batches)  # every batch twice, of which one half is measured
    assert state.step == 6
    assert profile.share.sum() == pytest.approx(1) and profile.ms.is_monotonic_decreasing
    assert 0.2 * profile.ms.sum() < 1e3 * (time.perf_counter() - began) / 6 < 5 * profile.ms.sum()
    found = set(zip(profile.function, profile.call, strict=True))
    assert {
        ("sparse.screen", "mm"),
        ("support._bag", "embedding_bag"),
        ("optim._update", "_fused_adam_"),
    } <= found
    assert (
        profile.ms > -0.01 * profile.ms.sum()
    ).all()  # time that callbacks took is not counted twice


def test_every_way_is_timed_at_every_density(acts):
    table = density_table(acts, 64, 100, thresholds=(0.5, 0.1), repeats=1)
    assert (
        sorted(table.way.unique()) == ["as chosen", "dense", "sparse", "sparse, bfloat16 search"]
        and len(table) == 8
    )
    assert 0 <= table.density[0] < table.density[7] < 1 and (table.ms > 0).all()
