"""A training run as data: its configuration, and its schedules as pure functions of the step.

Lengths of warm-ups and annealing are shares of the run, so a configuration keeps its meaning when
`steps` changes. All of θ, ε, λ are in the unit of inputs scaled to E‖x‖² = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .estimators import check_kernel

SPARSITY_LOSSES = {
    "relu": ("l1", "l0"),
    "gated": ("l1",),
    "topk": ("none",),
    "batchtopk": ("none",),
    "jumprelu": ("l0", "l0_target", "l0_target_batch", "frequency", "l1"),
}
"""Architectures and the sparsity losses each can be trained with; the first is its own."""

POSITIVE = (
    *("d_sae", "steps", "batch_size", "k", "k_aux", "bandwidth", "threshold_init", "lr"),
    *("threshold_lr", "l0_target", "frequency_reference", "dead_after", "stop_after"),
)
"""Fields of :class:`TrainConfig` that must be above 0."""

SHARES = ("stop_after", "bandwidth_anneal", "lr_warmup", "lr_decay", "sparsity_warmup")
"""Fields that are shares of the run, from 0 to 1."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how. Defaults are for short runs (10³ to 10⁵ steps); :func:`paper_recipe`
    gives the paper's.

    A few thousand steps move log θ by only steps × learning rate. So these defaults depart from the
    paper in a larger `lr`, `threshold_init` and `bandwidth`, a λ that rises over most of the run, a
    learning rate that decays at the end, and `b_dec` starting at the mean activation.
    """

    architecture: str = "jumprelu"
    """"jumprelu", "relu", "gated", "topk" or "batchtopk"."""
    d_sae: int = 4096
    """Number of latents."""
    steps: int = 4000
    stop_after: float = 1.0
    """Share of the run after which it ends, with the schedules of the whole run: the SAE has the
    very bits that the whole run has at that step."""
    batch_size: int = 512
    """Activations a step."""

    sparsity: float = 1e-3
    """λ, the price of one active latent (L0 losses), or of one unit of L1."""
    sparsity_loss: str | None = None
    """None: the architecture's own. Otherwise one of SPARSITY_LOSSES[architecture]."""
    l0_target: float = 32.0
    """For the "l0_target…" losses."""
    frequency_reference: float = 0.1
    """ω₀ of the "frequency" loss."""
    k: int = 32
    """Active latents a token, for "topk" and "batchtopk"."""
    topk_buckets: int | None = None
    """For "topk", an approximation, from k to d_sae: of each of so many buckets the largest
    pre-activation, and of those the k largest (:func:`jumprelu.sparse.top`). None: exact. The
    finished SAE keeps the exact k largest in any case."""
    k_aux: int = 256
    aux_coefficient: float = 1 / 32
    """Weight of AuxK, for "topk" and "batchtopk"."""

    threshold_init: float = 0.1
    bandwidth: float = 0.1
    """ε of the straight-through estimators; with `bandwidth_end`, its value at the start."""
    bandwidth_end: float | None = None
    """If given, ε falls geometrically to this over `bandwidth_anneal` of the run."""
    bandwidth_anneal: float = 0.8
    kernel: str = "rectangle"
    ste_to_z: bool = False
    """Let the pseudo-gradient reach the pre-activations too: an ablation, off in the paper."""
    log_threshold: bool = True
    """Train log θ, as the paper does, which keeps θ positive; otherwise θ itself, clamped at 0."""

    lr: float = 3e-3
    threshold_lr: float = 1.0
    """Learning rate of the thresholds as a multiple of `lr`."""
    betas: tuple[float, float] = (0.0, 0.999)
    adam_eps: float = 1e-8
    lr_warmup: float = 0.05
    """Share of the run over which lr rises along a cosine from a tenth."""
    lr_decay: float = 0.2
    """Share of the run, its last, over which lr falls linearly to zero."""
    sparsity_warmup: float = 0.8
    """Share of the run over which λ rises linearly from zero."""

    unit_norm: bool | None = None
    """Keep atoms at norm 1 with projected gradients. None: yes, except for RI-L1, which needs free
    norms."""
    mean_b_dec: bool = True
    """Start b_dec at the mean activation rather than at zero."""
    resample: tuple[float, ...] = ()
    """Shares of the run at which dead latents are resampled (Bricken et al. 2023)."""
    dead_after: int = 200_000
    """A latent is dead when it has not fired for this many tokens."""
    encoder_dtype: str | None = None
    """Type in which S is searched for, "float32" or "bfloat16"; None: the faster one. What is found
    is computed in float32, so results agree to rounding. TopK and dense steps use float32 only."""
    seed: int = 0
    """Fixes initial weights, resampling and, without `data_seed`, the order of the data."""
    data_seed: int | None = None
    """Fixes the order of the data; None: `seed`. Runs with the same `data_seed` and `batch_size`
    see the same batches."""

    def __post_init__(self) -> None:
        if self.architecture not in SPARSITY_LOSSES:
            raise ValueError(
                f"unknown architecture {self.architecture!r}: expected one of "
                f"{', '.join(SPARSITY_LOSSES)}"
            )
        if self.loss not in SPARSITY_LOSSES[self.architecture]:
            raise ValueError(
                f"{self.architecture} cannot be trained with sparsity_loss={self.sparsity_loss!r}: "
                f"expected one of {', '.join(SPARSITY_LOSSES[self.architecture])}"
            )
        check_kernel(self.kernel)
        if self.encoder_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(
                f"encoder_dtype must be None, 'float32' or 'bfloat16', got {self.encoder_dtype!r}"
            )
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is a share of the run between 0 and 1, got {getattr(self, name)}"
                )
        if self.sparsity < 0 or (self.bandwidth_end is not None and self.bandwidth_end <= 0):
            raise ValueError(
                "sparsity must be 0 or more and bandwidth_end above 0, got "
                f"{self.sparsity} and {self.bandwidth_end}"
            )
        buckets = self.topk_buckets
        if buckets is not None and self.architecture != "topk":
            raise ValueError(
                f"topk_buckets = {buckets} is for 'topk', not {self.architecture!r}: leave it None"
            )
        if buckets is not None and not self.k <= buckets <= self.d_sae:
            raise ValueError(
                f"topk_buckets must be from k = {self.k} to d_sae = {self.d_sae}, got {buckets}"
            )
        if self.architecture in ("topk", "batchtopk") and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} latents cannot be active of d_sae = {self.d_sae}")

    @property
    def loss(self) -> str:
        """The sparsity loss in use."""
        return self.sparsity_loss or SPARSITY_LOSSES[self.architecture][0]

    @property
    def length(self) -> int:
        """Steps that are taken: `steps`, or fewer with `stop_after`, but at least one."""
        return max(1, round(self.stop_after * self.steps))

    @property
    def data_order(self) -> int:
        """The seed of the order of the data in use."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def unit_norm_atoms(self) -> bool:
        return self.loss != "l1" if self.unit_norm is None else self.unit_norm


def paper_recipe(steps: int, **changes: Any) -> TrainConfig:
    """The recipe of Rajamanoharan et al. 2024 and Gemma Scope (arXiv 2408.05147, its training
    section).

    Adam(0, 0.999), lr 7e-5 after a cosine warm-up over 1,000 steps, λ rising over 10,000 steps,
    batches of 4,096, θ_init = ε = 0.001, biases at zero. Meant for 10⁵ steps or more: log θ travels
    about 7e-5 a step.
    """
    recipe = {"batch_size": 4096, "lr": 7e-5, "threshold_init": 1e-3, "bandwidth": 1e-3}
    recipe |= {"lr_warmup": min(1.0, 1_000 / steps), "lr_decay": 0.0, "mean_b_dec": False}
    recipe |= {"sparsity_warmup": min(1.0, 10_000 / steps)}
    return TrainConfig(steps=steps, **(recipe | changes))


def lr_factor(config: TrainConfig, step: int) -> float:
    """Multiple of `lr` at a step, from 0: cosine warm-up from 0.1, flat, linear decay to 0."""
    progress = step / config.steps
    rise = 1.0
    if progress < config.lr_warmup:
        rise = 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * progress / config.lr_warmup))
    fall = (1 - progress) / config.lr_decay if config.lr_decay else 1.0
    return min(rise, fall)


def sparsity_at(config: TrainConfig, step: int) -> float:
    """λ at a step: linear from 0 over `sparsity_warmup` of the run."""
    return config.sparsity * min(1.0, step / max(1.0, config.sparsity_warmup * config.steps))


def bandwidth_at(config: TrainConfig, step: int) -> float:
    """ε at a step: constant, or geometric from `bandwidth` to `bandwidth_end`."""
    if config.bandwidth_end is None:
        return config.bandwidth
    progress = min(1.0, step / max(1.0, config.bandwidth_anneal * config.steps))
    return config.bandwidth * (config.bandwidth_end / config.bandwidth) ** progress
