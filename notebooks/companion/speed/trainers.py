"""What is timed beside other libraries: their trainers and ours at a stated L0, and the floor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from jumprelu.architectures import Trainee
from jumprelu.recipe import TrainConfig
from jumprelu.state import Inputs, TrainState, measure_inputs, train_step
from jumprelu.support import DENSE

from ..rails.cache import remember
from .peers import Finished, Trainer, peer_trainer
from .quality import OURS, Plan, real_activations, synthetic_activations

FLOOR = "floor"


class Size(NamedTuple):
    """What is timed."""

    d_in: int
    d_sae: int
    batch: int
    """Tokens a step."""
    l0: int
    """Active latents a token, of ours and of every TopK; how many are active does not change what a
    dense step costs."""
    data: str
    """"real" or "synthetic"."""
    bandwidth: float = 0.02
    """ε of our JumpReLU: what lies within it of a threshold is looked at. This is the end of a run
    in which it falls from 0.1."""


SIZES = (Size(256, 4096, 2048, 40, "real"), Size(768, 8192, 1024, 50, "synthetic"))

QUICK_SIZES = (Size(16, 64, 32, 5, "synthetic"),)

POOL_BATCHES = 16
"""Different batches that the timed steps go through."""

RUN_STEPS = 10_000
"""Length of the run that the timed steps are said to be part of; only schedules depend on it."""

WARM = {"steps": 100, "batch_size": 256}
"""The training that ours have behind them when they are timed; it is not timed."""


class System(NamedTuple):
    """A row of the table. dtype: for ours, the type in which the entries that matter are searched
    for (`TrainConfig`)."""

    system: str
    architecture: str
    dtype: str = "float32"


BASELINE = System(OURS, "jumprelu")
"""What the column `ours_over_this` compares with."""


def systems() -> list[System]:
    """All rows that are timed, in the order of their turns."""
    ours = [
        System(OURS, architecture)
        for architecture in ("jumprelu", "relu", "gated", "topk", "batchtopk")
    ]
    ours += [each._replace(dtype="bfloat16") for each in ours if each.architecture != "topk"]
    dense = ("SAELens", "dictionary_learning")
    peers = [
        System(peer, architecture)
        for peer in dense
        for architecture in ("jumprelu", "relu", "topk")
    ]
    return [*ours, *peers, System("sparsify", "topk")]


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Raw activations in memory, [n, d_in], in random order; what a training state asks of
    :class:`Activations`."""

    x: torch.Tensor
    folder: str = "memory"

    d_in = property(lambda self: self.x.shape[1])

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, n: int, seed: int = 0) -> torch.Tensor:
        return self.x[:n]

    @functools.cached_property
    def inputs(self) -> Inputs:
        return measure_inputs(self, torch.device("cpu"))

    def state(self, config: TrainConfig) -> TrainState:
        return TrainState(self, config, torch.device("cpu"), self.inputs)


def pool_for(size: Size) -> Pool:
    n = POOL_BATCHES * size.batch
    if size.data == "real":
        return Pool(real_activations("train", Plan.train_rows).rows(n))
    return Pool(synthetic_activations(n, size.d_in))


@torch.no_grad()
def set_l0(trainee: Trainee, x: torch.Tensor, l0: float) -> None:
    """Make `l0` latents active on an average token of x, [n, d_in], by a shift of the encoder bias
    that all latents share.

    BatchTopK has its L0 in training; there it is the threshold for later that is set. TopK needs
    nothing.
    """
    margin = (x - trainee.b_dec) @ trainee.W_enc + trainee.b_enc - trainee.threshold
    smallest = margin.flatten().topk(round(l0 * len(x))).values[-1]
    if trainee.config.architecture == "batchtopk":
        trainee.batch_threshold.copy_(smallest)
    elif trainee.config.architecture != "topk":
        trainee.b_enc -= smallest


def warm_weights(pool: Pool, config: TrainConfig, l0: float) -> dict[str, torch.Tensor]:
    """Parameters after a short training that begins and ends at this L0."""
    state = pool.state(config)
    sample = pool.x[:1024] / state.input_scale
    set_l0(state.trainee, sample, l0)
    batches = pool.x.split(config.batch_size)
    for step in range(config.steps):
        train_step(state, batches[step % len(batches)] / state.input_scale)
    set_l0(state.trainee, sample, l0)
    return {name: tensor.contiguous() for name, tensor in state.trainee.state_dict().items()}


def warmed(pool: Pool, size: Size, architecture: str) -> dict[str, torch.Tensor]:
    """:func:`warm_weights` of an architecture; kept."""
    config = TrainConfig(
        architecture, size.d_sae, k=size.l0, bandwidth=size.bandwidth, lr_decay=0.0, **WARM
    )
    return remember(warm_weights, pool, config, size.l0)


def our_trainer(pool: Pool, size: Size, architecture: str, dtype: str) -> Trainer:
    """Ours at about `size.l0`: warmed up, then timed with a learning rate so small that the state
    stays what it is."""
    config = TrainConfig(
        architecture,
        size.d_sae,
        RUN_STEPS,
        batch_size=size.batch,
        k=size.l0,
        bandwidth=size.bandwidth,
        lr=1e-9,
        encoder_dtype=dtype,
    )
    state = pool.state(config)
    state.trainee.load_state_dict(warmed(pool, size, architecture))

    def step(x: torch.Tensor) -> None:
        train_step(state, x / state.input_scale)

    def finish() -> Finished:
        sae = state.trainee.eval().fold(state.input_scale)
        state.trainee.train()
        return Finished(sae, sae)

    def entries(x: torch.Tensor) -> float:
        layout = state.trainee.layout(x / state.input_scale, config.bandwidth)
        return float(config.d_sae) if layout is DENSE else len(layout) / len(x)

    return Trainer(step, finish, entries)


def make_trainer(row: System, size: Size, pool: Pool) -> Trainer:
    """The trainer of one row, in its library's recommended configuration."""
    if row.system == OURS:
        return our_trainer(pool, size, row.architecture, row.dtype)
    options = {"k": size.l0} if row.architecture == "topk" else {}
    return peer_trainer(
        row.system, row.architecture, size.d_sae, RUN_STEPS, size.batch, pool.x[:4096], **options
    )


def encoder_product(size: Size, dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The floor: the product of a batch with W_enc, in memory that is there already. It takes a
    batch and looks at its own."""
    kind = getattr(torch, dtype)
    x, W_enc = (
        torch.randn(size.batch, size.d_in).to(kind),
        torch.randn(size.d_in, size.d_sae).to(kind),
    )
    out = torch.empty(size.batch, size.d_sae, dtype=kind)
    return lambda _: torch.mm(x, W_enc, out=out)
