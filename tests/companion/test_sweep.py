"""Sweeps: what a worker process computes is what `train` and `evaluate` compute, once, and nothing
is lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from companion.rails.jobs import LOG_ROWS, TOGETHER, Job, deal
from companion.rails.sweep import in_processes, in_turn, sweep
from models import random_ids, save_tiny
from tqdm import tqdm

import jumprelu as jr


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    lm = jr.load_lm(save_tiny("gemma2", folder / "model"))
    tokens = jr.Tokens(random_ids(30, 16), torch.arange(30) // 2)
    stores = jr.harvest(lm, tokens, site=["resid_post", "mlp_out"], layer=1, out=folder / "acts")
    return lm, tokens, list(stores.values())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "results"


CONFIGS = [
    jr.TrainConfig(d_sae=24, steps=20, batch_size=32, seed=seed, sparsity=price)
    for seed in (0, 1)
    for price in (1e-3, 1e-2)
]


def test_workers_compute_what_train_and_evaluate_do(setting, cache):
    lm, tokens, stores = setting
    runs = [(store, config) for store in stores for config in CONFIGS]
    found = sweep([*runs, runs[0]], lm, tokens, workers=2)
    assert [(one.site, one.config) for one in found] == [
        (store.site, config) for store, config in [*runs, runs[0]]
    ]
    assert (
        len(list(cache.glob("train_and_score-*"))) == len(list(cache.glob("train-*"))) == len(runs)
    )
    for (store, config), one in zip(runs, found, strict=False):
        sae, log = jr.train(store, config, log_rows=LOG_ROWS)
        assert torch.equal(one.sae().W_enc, sae.W_enc) and one.load().log.equals(log)
        alone = jr.evaluate(sae, lm, tokens)
        assert torch.equal(one.report.frequency, alone.frequency)
        assert one.report.fvu == pytest.approx(
            alone.fvu
        ) and one.report.delta_loss == pytest.approx(alone.delta_loss, abs=1e-6)


def test_a_finished_run_is_not_computed_again(setting, cache):
    lm, tokens, (store, _) = setting
    sweep([(store, config) for config in CONFIGS[:2]], lm, tokens, workers=1)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    sweep([(store, config) for config in CONFIGS[:3]], lm, tokens, workers=1)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(list(cache.glob("train_and_score-*"))) == 3
    sweep(
        [(store, config) for config in CONFIGS[:3]],
        lm,
        tokens,
        run=lambda *_: pytest.fail("nothing is left to do"),
    )


def test_a_run_that_fails_says_so_and_others_are_kept(setting, cache):
    lm, tokens, (store, _) = setting
    bad = dataclasses.replace(CONFIGS[0], lr=1e30)
    with pytest.raises(FloatingPointError, match="diverged"):
        sweep([(store, CONFIGS[1]), (store, CONFIGS[2]), (store, bad)], lm, tokens, workers=1)
    found = sweep([(store, CONFIGS[2])], lm, tokens, workers=1)
    assert found[0].report.n_tokens > 0


def test_tasks_share_batches_and_no_run_is_left_out():
    jobs = [
        Job(
            f"store{s}",
            dataclasses.replace(CONFIGS[0], seed=seed, sparsity=price / 1e3),
            f"{s}-{seed}-{price}",
            None,
        )
        for s in range(2)
        for seed in range(3)
        for price in range(20)
    ]
    tasks = deal([*jobs, jobs[0]], workers=2)
    assert sorted(one.folder for task in tasks for one in task) == sorted(
        one.folder for one in jobs
    )
    assert all(len({(one.store, one.config.data_order) for one in task}) == 1 for task in tasks)
    assert max(map(len, tasks)) <= TOGETHER


def test_workers_with_the_same_runs_wait_for_each_other(setting, cache):
    """As when two notebooks have the same sweep at the same time; the second takes the runs in
    another order."""
    lm, tokens, (store, _) = setting
    runs, twice = [(store, config) for config in CONFIGS[:2]], []

    def both(tasks, lm, tokens, progress):
        twice.extend([*tasks, *(task[::-1] for task in tasks)])
        in_processes(twice, lm, tokens, progress, workers=2)

    sweep(runs, lm, tokens, workers=1, run=both)
    assert sum(map(len, twice)) == 2 * len(runs)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    with tqdm(disable=True) as progress:
        in_turn(twice, lm, tokens, progress)
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_the_number_of_threads_is_as_it_was(setting):
    lm, tokens, (store, _) = setting
    before = torch.get_num_threads()
    sweep([(store, CONFIGS[0])], lm, tokens, workers=1)
    assert torch.get_num_threads() == before
