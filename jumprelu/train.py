"""Train one SAE on harvested activations: `train(acts, TrainConfig(...)) -> (sae, log)`.

Notable here:
- a run is a function of (activations, config) alone. Killed at any step and started again with the same `out`,
  it ends with the very bits of an uninterrupted run: weights, both Adam moments, dead-latent counters, random
  state and the place in the data are one file, replaced by rename.
- the log holds what the loss hides: how many samples reach the thresholds, how far θ has travelled, which of
  reconstruction and sparsity pushes it, and whether more λ would still do anything.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .activations import Activations
from .architectures import Trainee
from .files import digest, read_json, write_json, write_tensors, write_text
from .recipe import TrainConfig, bandwidth_at, lr_factor, sparsity_at
from .sae import SAE, load_sae

SATURATED = 30.0
"""λ counts as saturated when sparsity pushes θ this many times harder than reconstruction resists."""


class TrainResult(NamedTuple):
    """The SAE, for raw activations, and the log: one row per logged step."""

    sae: SAE
    log: pd.DataFrame


def make_optimizer(trainee: Trainee, config: TrainConfig) -> torch.optim.Adam:
    """Adam; the thresholds in a group of their own. Each group remembers its base learning rate."""
    named = dict(trainee.named_parameters())
    threshold = [named.pop("threshold_parameter")] if "threshold_parameter" in named else []
    groups = [{"params": list(named.values()), "base_lr": config.lr}]
    if threshold:
        groups.append({"params": threshold, "base_lr": config.lr * config.threshold_lr})
    return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, eps=config.adam_eps, fused=True)


class _State:
    """Everything that the next step depends on."""

    def __init__(self, acts: Activations, config: TrainConfig, device: torch.device):
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.trainee = Trainee(acts.d_in, config, self.generator).to(device)
        sample = acts.rows(min(len(acts), 65_536), seed=0).to(device)
        self.input_scale = float(sample.square().sum(-1).mean().sqrt())
        if not self.input_scale > 0:
            raise ValueError(f"the activations of {acts.folder} are all zero: nothing to train on")
        if config.mean_b_dec:
            self.trainee.b_dec.data = sample.mean(0) / self.input_scale
        self.optimizer = make_optimizer(self.trainee, config)
        self.silent = torch.zeros(config.d_sae, device=device)  # tokens since each latent last fired
        self.step = 0
        self.log: list[dict[str, float]] = []

    def named_moments(self) -> dict[str, tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
        return {name: (p, self.optimizer.state[p]) for name, p in self.trainee.named_parameters()}

    def save(self, path: Path, identity: str) -> None:
        tensors = {f"trainee.{name}": tensor for name, tensor in self.trainee.state_dict().items()}
        for name, (_, moments) in self.named_moments().items():
            tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
        tensors |= {"silent": self.silent, "generator": self.generator.get_state()}
        metadata = {"step": self.step, "input_scale": self.input_scale.hex(), "identity": identity, "log": self.log}
        write_tensors(path, tensors, {"state": json.dumps(metadata)})

    def load(self, path: Path, identity: str) -> None:
        try:
            with safe_open(path, "pt", device=str(self.silent.device)) as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
                metadata = json.loads(f.metadata()["state"])
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint {path} is damaged ({error}): delete it to start this run again") from error
        if metadata["identity"] != identity:
            raise ValueError(f"{path} belongs to a run with other activations or another configuration: give this run "
                             "another folder, or delete that one. Nothing was overwritten")
        self.trainee.load_state_dict({name[8:]: t for name, t in tensors.items() if name.startswith("trainee.")})
        for name, (parameter, _) in self.named_moments().items():
            moments = {key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = moments
        self.silent = tensors["silent"]
        self.generator.set_state(tensors["generator"].cpu())
        self.step, self.log = metadata["step"], metadata["log"]
        self.input_scale = float.fromhex(metadata["input_scale"])


def _advance(state: _State, x: torch.Tensor, log_this: bool) -> dict[str, float] | None:
    """One optimiser step on a normalised batch x: [batch, d_in]; returns a log row when asked to."""
    config, trainee = state.config, state.trainee
    sparsity, bandwidth = sparsity_at(config, state.step), bandwidth_at(config, state.step)
    out = trainee(x, bandwidth)
    terms = trainee.loss(x, out, sparsity, bandwidth, dead=state.silent >= config.dead_after)
    state.optimizer.zero_grad()
    row = None
    diagnostics = trainee.diagnose(out, terms, bandwidth) if log_this and config.architecture == "jumprelu" else None
    sum(terms.values()).backward()
    with torch.no_grad():
        fired = (out.acts > 0).any(0)
        state.silent = (state.silent + len(x)) * ~fired
        if log_this:
            row = {
                "step": state.step, "tokens": state.step * config.batch_size, "sparsity": sparsity, "bandwidth": bandwidth,
                **{f"loss_{name}": term.item() for name, term in terms.items()},
                "l0": (out.acts > 0).float().sum(-1).mean().item(),
                "fvu": ((x - out.x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(),
                "dead": (state.silent >= config.dead_after).float().mean().item(),
            }  # fmt: skip
            if diagnostics:
                row |= diagnostics._asdict()
                quantiles = torch.quantile(trainee.threshold, torch.tensor([0.05, 0.5, 0.95], device=x.device))
                row |= dict(zip(("threshold_p05", "threshold_p50", "threshold_p95"), quantiles.tolist(), strict=True))
    if config.unit_norm_atoms:
        trainee.project_gradient()
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor(config, state.step)
    state.optimizer.step()
    trainee.constrain()
    state.step += 1
    if state.step in {round(share * config.steps) for share in config.resample}:
        _resample(state, x, bandwidth)
    return row


def _resample(state: _State, x: torch.Tensor, bandwidth: float) -> None:
    replaced = state.trainee.resample(x, state.silent >= state.config.dead_after, bandwidth, state.generator)
    for name, (_, moments) in state.named_moments().items():
        for key in ("exp_avg", "exp_avg_sq"):  # a new latent starts with Adam's memory empty
            if name == "W_enc":
                moments[key][:, replaced] = 0
            elif name != "b_dec":
                moments[key][replaced] = 0
    state.silent[replaced] = 0


def _check_finite(state: _State, row: dict[str, float] | None = None) -> None:
    """Raise FloatingPointError if a parameter or a logged number is not finite: such a state is never saved."""
    values = [torch.tensor(list(row.values()))] if row else list(state.trainee.parameters())
    if not all(torch.isfinite(value).all() for value in values):
        raise FloatingPointError(f"training diverged before step {state.step}: {row or 'a weight is not finite'}. Lower lr (now "
                                 f"{state.config.lr}); a checkpoint from before it, if there is one, is kept")


def _saturated(log: list[dict[str, float]], config: TrainConfig) -> bool:
    """Has λ been driving θ alone, on the last ten logged steps at full λ?"""
    rows = [row for row in log if row["sparsity"] >= config.sparsity and row.get("sparsity_push", 0) > 0][-10:]
    return len(rows) == 10 and all(row["sparsity_push"] > SATURATED * row["reconstruction_push"] for row in rows)


def train(acts: Activations, config: TrainConfig, out: str | Path | None = None, device: str | torch.device | None = None,
          checkpoint_seconds: float = 60, log_rows: int = 100) -> TrainResult:
    """Train an SAE on the activations `acts` (from :func:`jumprelu.harvest`); returns (sae, log).

    out: folder for the SAE, its log and, while it runs, a checkpoint every `checkpoint_seconds`. Given again, a
    finished run is read back and an interrupted one goes on, bit for bit. Without it nothing is written.
    device: default is a GPU where there is one. log_rows: about this many rows in the log.

    The log's columns: step, tokens, sparsity (λ), bandwidth (ε), loss_*, l0, fvu, dead (share), and for JumpReLU
    those of :class:`jumprelu.architectures.StepDiagnostics` and quantiles of θ; all in normalised units.

    Raises ValueError if `out` holds another run, the checkpoint is damaged, or the activations are not finite
    (the reader names shard and row); FloatingPointError if loss or weights are not finite (the last checkpoint stays).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    identity = digest(acts.fingerprint, dataclasses.asdict(config), log_rows)
    folder = Path(out) if out is not None else None
    if folder and (folder / "run.json").exists():
        if read_json(folder / "run.json")["identity"] != identity:
            raise ValueError(f"{folder} holds a finished run with other activations or another configuration: choose another "
                             "folder, or delete that one. Nothing was overwritten")
        return TrainResult(load_sae(folder, device), pd.read_csv(folder / "log.csv"))
    state = _State(acts, config, device)
    checkpoint = folder / "checkpoint.safetensors" if folder else None
    if checkpoint and checkpoint.exists():
        state.load(checkpoint, identity)
    every = max(1, config.steps // log_rows)
    batches = acts.batches(config.batch_size, seed=config.seed, start=state.step)
    progress = tqdm(total=config.steps, initial=state.step, desc=f"training {config.architecture}", unit="step", mininterval=1)
    saved_at = time.monotonic()
    warned = False
    while state.step < config.steps:
        x = next(batches).to(device) / state.input_scale
        row = _advance(state, x, log_this=state.step % every == 0 or state.step == config.steps - 1)
        progress.update()
        if row:
            _check_finite(state, row)
            state.log.append(row)
            rate = progress.format_dict["rate"] or 0
            progress.set_postfix(loss=f"{sum(v for k, v in row.items() if k.startswith('loss_')):.4f}", L0=f"{row['l0']:.1f}",
                                 FVU=f"{row['fvu']:.3f}", dead=f"{row['dead']:.1%}", tokens_s=f"{rate * config.batch_size:.3g}")
            if not warned and _saturated(state.log, config):
                warned = True
                warnings.warn(f"sparsity = {config.sparsity} is saturated: it pushes θ over {SATURATED:.0f} times as hard as "
                              "reconstruction resists, so θ moves at its learning rate and a larger sparsity will hardly lower "
                              "L0. Raise threshold_lr, threshold_init, bandwidth or steps instead", stacklevel=2)
        if checkpoint and time.monotonic() - saved_at > checkpoint_seconds:
            _check_finite(state)
            state.save(checkpoint, identity)
            saved_at = time.monotonic()
    progress.close()
    _check_finite(state)
    sae = state.trainee.eval().fold(state.input_scale, acts.model_name, acts.site, acts.layer)
    # a round trip through CSV, so that a finished run read back has the very same log
    text = pd.DataFrame(state.log).to_csv(index=False)
    if folder:
        sae.save(folder)
        write_text(folder / "log.csv", text)
        write_json(folder / "run.json", {"identity": identity, "config": dataclasses.asdict(config)})
        checkpoint.unlink(missing_ok=True)
    return TrainResult(sae, pd.read_csv(io.StringIO(text)))
