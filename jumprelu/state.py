"""A training run between two steps, and the step: :class:`TrainState`, :func:`train_step`.

A state is a function of (activations, config, number of steps). Saved and loaded again it goes on
to the very bits: weights, Adam's moments, dead-latent counters, random state and the log are one
file; the place in the data is the number of steps.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .activations import Activations
from .architectures import Forward, Trainee
from .distributed import ALONE, Team
from .estimators import heaviside
from .files import write_tensors
from .optim import Adam
from .recipe import TrainConfig, bandwidth_at, lr_factor, sparsity_at
from .sae import SAE
from .sparse import POLICY, SparsePolicy

Row = dict[str, float]
"""Of a log, by column; see :func:`jumprelu.train`."""


class Inputs(NamedTuple):
    """What training needs to know of activations beforehand: √E‖x‖², and E x [d_in]."""

    scale: float
    mean: Tensor


def measure_inputs(acts: Activations, device: torch.device) -> Inputs:
    """Of a fixed sample of 65,536 activations; ValueError if these are all zero."""
    sample = acts.rows(min(len(acts), 65_536), seed=0).to(device)
    scale = float(sample.square().sum(-1).mean().sqrt())
    if not scale > 0:
        raise ValueError(f"the activations of {acts.folder} are all zero: nothing to train on")
    return Inputs(scale, sample.mean(0))


class TrainState:
    """Everything that the next step depends on: `trainee`, `optimizer`, `generator`, `silent`
    (tokens since each latent last fired, [d_sae]), `step` (steps taken) and the `log` so far.

    acts: gives the width, and a sample where `inputs` are not given. inputs, outputs: of
    :func:`measure_inputs`; with outputs, a transcoder. `policy` may be changed between steps.
    """

    def __init__(
        self,
        acts: Activations,
        config: TrainConfig,
        device: torch.device,
        inputs: Inputs | None = None,
        outputs: Inputs | None = None,
        team: Team = ALONE,
        policy: SparsePolicy = POLICY,
    ):
        self.config, self.team, self.policy = config, team, policy
        self.generator = torch.Generator().manual_seed(config.seed)
        trainee = Trainee(acts.d_in, config, self.generator, outputs is not None)
        team.shard(trainee)
        self.trainee = trainee.to(device)
        inputs = inputs or measure_inputs(acts, device)
        outputs = outputs or inputs
        self.input_scale, self.target_scale = inputs.scale, outputs.scale
        if config.mean_b_dec:
            self.trainee.b_dec.data = outputs.mean / outputs.scale
            if self.trainee.transcoder:
                self.trainee.b_in.copy_(inputs.mean / inputs.scale)
        unit_norm = ("W_dec",) if config.unit_norm_atoms else ()
        parameters = dict(self.trainee.named_parameters())
        self.optimizer = Adam(parameters, config.betas, config.adam_eps, unit_norm)
        self.silent = torch.zeros(len(self.trainee.b_enc), device=device)
        self.step = 0
        self.log: list[Row] = []

    @property
    def dead(self) -> Tensor:
        """Latents that have not fired for `config.dead_after` tokens: bool [d_sae]."""
        return self.silent >= self.config.dead_after

    def _tensors(self) -> dict[str, Tensor]:
        """All of the state that is a tensor, by its name in a checkpoint."""
        tensors = {f"trainee.{name}": tensor for name, tensor in self.trainee.state_dict().items()}
        for name, moments in self.optimizer.moments.items():
            tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
        return tensors | {"silent": self.silent, "generator": self.generator.get_state()}

    def save(self, path: Path, identity: str) -> None:
        """Write all of it to one file. identity: of the run, which :meth:`load` asks for."""
        tensors = self._tensors().items()
        gathered = {name: self.team.gather_to_first(name, tensor) for name, tensor in tensors}
        metadata = {"step": self.step, "log": self.log, "identity": identity}
        metadata["scales"] = self.input_scale.hex(), self.target_scale.hex()
        if self.team.first:
            write_tensors(path, gathered, {"state": json.dumps(metadata)})

    def load(self, path: Path, identity: str) -> None:
        """Become the state that :meth:`save` wrote. Raises ValueError for a damaged file, and for
        one of another identity."""
        try:
            with safe_open(path, "pt") as f:
                metadata = json.loads(f.metadata()["state"])
                names = list(f.keys())
                saved = {n: self.team.local_latents(n, f.get_tensor(n)) for n in names}
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint {path} is damaged ({error}): delete it to start this run again"
            ) from error
        if metadata["identity"] != identity:
            raise ValueError(
                f"{path} belongs to a run with other activations, another configuration or "
                "trainer: choose another folder, or delete it. Nothing was overwritten"
            )
        self.generator.set_state(saved.pop("generator"))
        tensors = self._tensors()
        for name, tensor in saved.items():
            tensors[name].copy_(tensor)
        self.step, self.log = metadata["step"], metadata["log"]
        self.optimizer.steps = self.step
        self.input_scale, self.target_scale = map(float.fromhex, metadata["scales"])

    def fold(self, acts: Activations) -> SAE | None:
        """The SAE of all latents, in the first process; None in others. acts: it was trained on."""
        trainee, team = self.trainee, self.team
        if team.latents > 1:
            tensors = trainee.state_dict()
            whole = {name: team.gather_to_first(name, t) for name, t in tensors.items()}
            if team.first:
                with torch.device("meta"):
                    trainee = Trainee(acts.d_in, self.config, None, trainee.transcoder)
                trainee.load_state_dict(whole, assign=True)
        if not team.first:
            return None
        target_scale = self.target_scale if trainee.transcoder else None
        origin = acts.model_name, acts.site, acts.layer
        return trainee.eval().fold(self.input_scale, *origin, target_scale)


def train_step(
    state: TrainState, x: Tensor, log: bool = False, target: Tensor | None = None
) -> Row | None:
    """Take one optimiser step, in place; returns a row of the log if `log`.

    x: this process's part of a batch, [batch, d_in], divided by `state.input_scale`; target: what a
    transcoder predicts, [batch, d_in], divided by `state.target_scale`.
    """
    config, trainee, team = state.config, state.trainee, state.team
    sparsity, bandwidth = sparsity_at(config, state.step), bandwidth_at(config, state.step)
    target = x if target is None else target
    layout = team.layout(trainee.layout(x, bandwidth, state.policy))
    out = trainee(x, bandwidth, layout)
    terms = trainee.loss(x, out, sparsity, bandwidth, state.dead, target)
    found = None
    if log and config.architecture == "jumprelu":
        found = trainee.diagnose(out, terms, bandwidth)
    sum(terms.values()).backward()
    team.reduce_gradients(trainee)
    row = None
    with torch.no_grad():
        active = heaviside(out.acts, 0)
        fired = out.layout.per_latent(active) > 0
        state.silent = (state.silent + len(x) * team.data) * ~fired
        if log:
            row = {"step": state.step, "tokens": state.step * config.batch_size}
            row |= {"sparsity": sparsity, "bandwidth": bandwidth}
            for name, term in terms.items():
                row[f"loss_{name}"] = team.mean(term.detach().clone()).item()
            row |= _batch_columns(state, target, out, active)
            row |= _threshold_columns(state, found) if found else {}
    lr = config.lr * lr_factor(config, state.step)
    rates = dict.fromkeys(state.optimizer.parameters, lr)
    if "threshold_parameter" in rates:
        rates["threshold_parameter"] = lr * config.threshold_lr
    state.optimizer.step(rates, state.policy.triton)
    trainee.constrain()
    state.step += 1
    if state.step in {round(share * config.steps) for share in config.resample}:
        _resample(state, x, bandwidth)
    return row


def _batch_columns(state: TrainState, target: Tensor, out: Forward, active: Tensor) -> Row:
    """What a row has of a batch as a whole."""
    config, team = state.config, state.team
    dead = state.dead.double().sum()
    entries = dead.new_tensor(out.acts.numel() / len(target))
    sums = torch.stack([active.sum().double() / len(target), dead, entries])
    l0, dead, computed = team.sum_latents(team.mean(sums)).tolist()
    mean = team.mean(target.mean(0))
    squares = [(target - out.x_hat).square().sum(), (target - mean).square().sum()]
    missed, variance = team.mean(torch.stack(squares))
    shares = {"dead": dead / config.d_sae, "computed": computed / config.d_sae}
    return {"l0": l0, "fvu": (missed / variance).item(), **shares}


def _threshold_columns(state: TrainState, found: dict[str, Tensor]) -> Row:
    """What a row has of a JumpReLU's thresholds: means over latents, and quantiles."""
    team, theta = state.team, state.trainee.threshold
    pushes = ("reconstruction_push", "sparsity_push")
    means = found | {name: team.mean(found[name]).abs() for name in pushes}
    means["window_latents"] = (found["window_share"] > 0).float()
    values = torch.stack([value.mean() for value in means.values()])
    row = dict(zip(means, (team.sum_latents(values) / team.latents).tolist(), strict=True))
    quantiles = torch.tensor([0.05, 0.5, 0.95], device=theta.device)
    values = torch.quantile(team.gather("threshold", theta), quantiles).tolist()
    names = "threshold_p05", "threshold_p50", "threshold_p95"
    return row | dict(zip(names, values, strict=True))


def _resample(state: TrainState, x: Tensor, bandwidth: float) -> None:
    replaced = state.trainee.resample(x, state.dead, bandwidth, state.generator)
    for name, moments in state.optimizer.moments.items():
        for moment in moments.values():  # a new latent starts with Adam's memory empty
            if name == "W_enc":
                moment[:, replaced] = 0
            elif name != "b_dec":
                moment[replaced] = 0
    state.silent[replaced] = 0
