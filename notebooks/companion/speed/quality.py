"""How good the SAEs of each library are, trained on the same activations for as many tokens: the
other half of `benchmark.py`.

Notable here:
- every SAE is brought into the form of :class:`jumprelu.SAE` and scored on held-out documents by
  the same code.
- libraries are compared at their recommended settings, at the paper's, and at settings adapted to
  so short a run, as ours are. `--only scan` trains what lies around the adapted ones (GRID), to see
  whether something else would serve them better.
- each run is kept when it ends: the command, given again, goes on with the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch

from jumprelu.activations import Activations, activations_from_tensor
from jumprelu.corpus import load_texts, tokenize
from jumprelu.harvest import harvest
from jumprelu.lm import load_lm
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE
from jumprelu.train import train

from ..rails.cache import remember
from .peers import peer_trainer, version


class Setting(NamedTuple):
    """One way to train with one library. Options whose name ends in "_steps" or "_start" are shares
    of the run."""

    system: str
    name: str
    batch_size: int
    sparsities: tuple[float, ...]
    """Values of `knob`, from dense to sparse."""
    knob: str
    """The option that sets the sparsity."""
    options: dict[str, Any]
    seeds: int = 1


OURS = "jumprelu"
_SHORT_LENS = {
    "normalize_activations": "none",
    "b_dec_init": "mean",
    "decoder_init_norm": 1.0,
    "adam_beta1": 0.0,
    "lr": 3e-3,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_bandwidth": 0.1,
    "l0_warm_up_steps": 0.8,
    "lr_warm_up_steps": 0.05,
    "lr_decay_steps": 0.2,
}
_SHORT_DICTIONARY = {
    "b_dec_init": "mean",
    "lr": 3e-3,
    "threshold_init": 0.1,
    "bandwidth": 0.1,
    "warmup_steps": 0.05,
    "sparsity_warmup_steps": 0.5,
    "decay_start": 0.8,
}
SETTINGS = (
    Setting(OURS, "default", 512, (3e-4, 1e-3, 3e-3, 1e-2), "sparsity", {}, seeds=3),
    Setting(
        OURS, "ε falls", 512, (3e-4, 1e-3, 3e-3, 1e-2), "sparsity", {"bandwidth_end": 0.02}, seeds=3
    ),
    # its documentation's: https://decoderesearch.github.io/SAELens/latest/training_saes/
    Setting(
        "SAELens",
        "recommended",
        4096,
        (0.3, 3.0),
        "l0_coefficient",
        {
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "pre_act_loss_coefficient": 3e-6,
            "l0_warm_up_steps": 1.0,
            "lr_decay_steps": 0.2,
        },
    ),
    Setting(
        "SAELens",
        "paper",
        4096,
        (1e-3, 1e-2),
        "l0_coefficient",
        {
            "normalize_activations": "none",
            "decoder_init_norm": 1.0,
            "adam_beta1": 0.0,
            "lr": 7e-5,
            "jumprelu_init_threshold": 1e-3,
            "jumprelu_bandwidth": 1e-3,
            "l0_warm_up_steps": 1.0,
            "lr_warm_up_steps": 0.2,
        },
    ),
    Setting(
        "SAELens", "adapted", 512, (3e-4, 1e-3, 3e-3, 1e-2), "l0_coefficient", _SHORT_LENS, seeds=3
    ),
    # its defaults, which are the paper's; warm-ups of 1,000 and 2,000 steps would outlast the run
    Setting(
        "dictionary_learning",
        "recommended",
        512,
        (40.0, 10.0),
        "target_l0",
        {"warmup_steps": 0.25, "sparsity_warmup_steps": 0.5},
    ),
    Setting(
        "dictionary_learning",
        "adapted",
        512,
        (40.0, 20.0, 10.0, 5.0),
        "target_l0",
        _SHORT_DICTIONARY,
        seeds=3,
    ),
)

GRID = {
    "SAELens": [
        {},
        {"lr": 1e-3},
        {"lr": 1e-2},
        {"jumprelu_bandwidth": 0.03},
        {"jumprelu_init_threshold": 0.03},
        {"jumprelu_bandwidth": 0.03, "jumprelu_init_threshold": 0.03},
        {"decoder_init_norm": 0.1},
        {"adam_beta1": 0.9},
        {"batch_size": 2048},
    ],
    "dictionary_learning": [
        {},
        {"lr": 1e-3},
        {"lr": 1e-2},
        {"bandwidth": 0.03},
        {"threshold_init": 0.03},
        {"bandwidth": 0.03, "threshold_init": 0.03},
        {"sparsity_penalty": 0.1},
        {"batch_size": 2048},
    ],
}
"""Changes to the adapted settings that `--only scan` tries, with seed 0, at two sparsities each: an
L0 can then be compared."""


def scan_settings() -> tuple[Setting, ...]:
    """The adapted settings of other libraries, and ours, with each of the changes in GRID; named
    after the change."""
    adapted = {
        each.system: each._replace(sparsities=each.sparsities[1:3], seeds=1)
        for each in SETTINGS
        if each.name in ("default", "adapted")
    }
    found = [adapted[OURS]]
    for system, changes in GRID.items():
        for change in changes:
            name = ", ".join(f"{option} {value:g}" for option, value in change.items()) or "adapted"
            options = adapted[system].options | {
                option: value for option, value in change.items() if option != "batch_size"
            }
            batch_size = change.get("batch_size", adapted[system].batch_size)
            found.append(
                adapted[system]._replace(name=name, options=options, batch_size=batch_size)
            )
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    """What is trained on and how long."""

    settings: tuple[Setting, ...]
    data: str = "real"
    d_sae: int = 1024
    tokens: int = 524_288
    """Of every run."""
    train_rows: int = 1600
    """Rows of 256 tokens that are harvested for training."""
    test_rows: int = 100


def make_plan(settings: tuple[Setting, ...], quick: bool = False) -> Plan:
    """A plan of these settings; quick: in seconds, with one run of each."""
    if not quick:
        return Plan(settings)
    settings = tuple(
        each._replace(batch_size=64, sparsities=each.sparsities[:1], seeds=1) for each in settings
    )
    return Plan(settings, data="synthetic", d_sae=64, tokens=2048, train_rows=8, test_rows=1)


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Pooled Σ‖x − x̂‖² / Σ‖x − x̄‖²; x, x_hat: [n, d_in]."""
    x, x_hat = x.double(), x_hat.double()
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def scored(sae: SAE, test: Activations, seconds: float) -> dict[str, float]:
    """Seconds, L0 and FVU on all rows of `test`."""
    with torch.no_grad():
        x = torch.cat([shard.activations for shard in test.shards()])
        acts = [sae.encode(part) for part in x.split(4096)]
        active = sum(int((part > 0).sum()) for part in acts)
        return {
            "seconds": seconds,
            "l0": active / len(x),
            "fvu": fvu(x, torch.cat([sae.decode(part) for part in acts])),
        }


def our_run(acts: Activations, test: Activations, config: TrainConfig) -> dict[str, float]:
    """Ours trained on `acts`; see :func:`scored`."""
    began = time.perf_counter()
    sae = train(acts, config, device="cpu").sae
    return scored(sae, test, time.perf_counter() - began)


def peer_run(
    acts: Activations,
    test: Activations,
    peer: str,
    installed: str,
    d_sae: int,
    steps: int,
    batch_size: int,
    seed: int,
    options: dict[str, Any],
) -> dict[str, float]:
    """A JumpReLU SAE of another library, of version `installed`, trained on `acts`; see
    :func:`scored`."""
    began = time.perf_counter()
    trainer = peer_trainer(
        peer, "jumprelu", d_sae, steps, batch_size, acts.rows(65_536), seed, **options
    )
    batches = acts.batches(batch_size, seed=seed)
    for _ in range(steps):
        trainer.step(next(batches))
    return scored(trainer.finish().sae, test, time.perf_counter() - began)


def in_steps(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Options with shares of the run turned into steps; see :class:`Setting`."""
    return {
        name: round(value * steps) if name.endswith(("_steps", "_start")) else value
        for name, value in options.items()
    }


def runs(plan: Plan, acts: Activations, test: Activations) -> Iterator[dict[str, Any]]:
    """One row a run; a library that is not installed has a single row with the reason."""
    for setting in plan.settings:
        row = {"system": setting.system, "setting": setting.name, "batch": setting.batch_size}
        steps = plan.tokens // setting.batch_size
        installed = ""
        if setting.system != OURS:
            try:
                installed = version(setting.system)
            except ModuleNotFoundError as error:
                yield row | {"error": str(error)}
                continue
        for seed in range(setting.seeds):
            for sparsity in setting.sparsities:
                options = in_steps(setting.options | {setting.knob: sparsity}, steps)
                if setting.system == OURS:
                    config = TrainConfig(
                        d_sae=plan.d_sae,
                        steps=steps,
                        batch_size=setting.batch_size,
                        seed=seed,
                        **options,
                    )
                    result = remember(our_run, acts, test, config)
                else:
                    result = remember(
                        peer_run,
                        acts,
                        test,
                        setting.system,
                        installed,
                        plan.d_sae,
                        steps,
                        setting.batch_size,
                        seed,
                        options,
                    )
                yield (
                    row
                    | {"seed": seed, "sparsity": sparsity, "tokens": steps * setting.batch_size}
                    | result
                )


COLUMNS = (
    "system",
    "setting",
    "seed",
    "sparsity",
    "batch",
    "tokens",
    "seconds",
    "l0",
    "fvu",
    "error",
)


def quality_table(plan: Plan) -> pd.DataFrame:
    """All runs of a plan: COLUMNS. sparsity: value of the setting's knob; seconds, l0, fvu: see
    :func:`scored`."""
    if plan.data == "real":
        acts, test = (
            real_activations("train", plan.train_rows),
            real_activations("test", plan.test_rows),
        )
    else:
        x = synthetic_activations(256 * (plan.train_rows + plan.test_rows), 16)
        parts = x.split([256 * plan.train_rows, 256 * plan.test_rows])
        acts, test = (remember(activations_from_tensor, part) for part in parts)
    rows = []
    for row in runs(plan, acts, test):
        print(
            ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.items()
            )
        )
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


# ---- activations


def real_activations(split: str, rows: int) -> Activations:
    """The residual stream after layer 3 of the embedded model, on `rows` rows of 256 tokens of the
    default corpus; kept."""
    lm = load_lm()
    tokens = tokenize(
        load_texts("installed", split),
        lm.tokenizer,
        256,
        rows,
        rows_per_document=8 if split == "train" else 2,
    )
    return remember(harvest, lm, tokens, site="resid_post", layer=3)


def synthetic_activations(n: int, d_in: int, seed: int = 0, active: int = 40) -> torch.Tensor:
    """Activations with a planted sparse dictionary, float32 [n, d_in], E‖x‖² = 1.

    A mean, `active` of 16·d_in random unit directions a token (frequent ones are frequent by Zipf's
    law, strengths are exponential), and dense noise with eigenvalues ∝ i^−0.75. The mean has 35 %
    of E‖x‖² and the spectrum falls as it does, which is what the embedded model's layer 3 shows;
    the noise has 20 %.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(16 * d_in, d_in, generator=generator), dim=-1
    )
    frequency = 1 / torch.arange(10.0, 10 + len(directions))
    index = torch.multinomial(frequency, n * active, replacement=True, generator=generator).view(
        n, active
    )
    strength = torch.empty(n, active).exponential_(generator=generator)
    sparse = torch.nn.functional.embedding_bag(
        index, directions, per_sample_weights=strength, mode="sum"
    )
    dense = torch.randn(n, d_in, generator=generator) * torch.arange(1.0, d_in + 1) ** -0.375
    mean = torch.randn(d_in, generator=generator)

    def share(part: torch.Tensor, of_square: float) -> torch.Tensor:
        return part * (of_square / part.square().sum(-1).mean()).sqrt()

    return share(mean, 0.35) + share(sparse - sparse.mean(0), 0.45) + share(dense, 0.2)
