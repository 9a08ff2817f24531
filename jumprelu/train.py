"""Train SAEs on harvested activations: `train(acts, TrainConfig(...)) -> (sae, log)`, and
`train_many` for a sweep.

Given targets besides, what is trained is a transcoder: it predicts them from the activations.

Notable here:
- a run is a function of (activations, config) alone: on a CPU to the bit, and on a GPU, too, where
  its libraries are. Killed at any step and started again with the same `out`, it ends with the very
  bits of an uninterrupted run: weights, both Adam moments, dead-latent counters, random state and
  the place in the data are one file, replaced by rename.
- a sweep reads its data once for all runs that see the same batches. These take turns of a block of
  batches, small enough that it, and the weights of the run at work, stay in a cache; each run ends
  with the bits that it has when trained alone.
- a team of processes takes the same steps as one (`distributed.py`); alone, its means and sums
  leave everything as it is.
- the log holds what the loss hides: how many samples reach the thresholds, how far θ has travelled,
  which of reconstruction and sparsity pushes it, and whether more λ would still do anything.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .activations import Activations
from .architectures import Forward, Trainee
from .distributed import ALONE, Team
from .estimators import heaviside
from .files import digest, read_json, write_json, write_tensors, write_text
from .optim import Adam
from .recipe import TrainConfig, bandwidth_at, lr_factor, sparsity_at
from .sae import SAE
from .sites import INPUTS

SATURATED = 30.0
"""λ counts as saturated when sparsity pushes θ this many times harder than reconstruction
resists."""

BLOCK = 32
BLOCK_BYTES = 2**25
"""A run's turn in a sweep: at most so many batches, and so many bytes of them, but at least one
batch."""


class TrainResult(NamedTuple):
    """The SAE, for raw activations, and the log: one row per logged step."""

    sae: SAE
    log: pd.DataFrame


class Inputs(NamedTuple):
    """What training needs to know of the activations beforehand: √E‖x‖², and E x [d_in]."""

    scale: float
    mean: torch.Tensor


def measure_inputs(acts: Activations, device: torch.device) -> Inputs:
    """Estimates on a fixed sample of 65,536 activations. Raises ValueError if these are all
    zero."""
    sample = acts.rows(min(len(acts), 65_536), seed=0).to(device)
    scale = float(sample.square().sum(-1).mean().sqrt())
    if not scale > 0:
        raise ValueError(f"the activations of {acts.folder} are all zero: nothing to train on")
    return Inputs(scale, sample.mean(0))


class _State:
    """Everything that the next step depends on. inputs, outputs: default is to measure them;
    outputs: of a transcoder."""

    def __init__(
        self,
        acts: Activations,
        config: TrainConfig,
        device: torch.device,
        inputs: Inputs | None = None,
        outputs: Inputs | None = None,
        team: Team = ALONE,
    ):
        self.config, self.team = config, team
        self.generator = torch.Generator().manual_seed(config.seed)
        self.trainee = Trainee(acts.d_in, config, self.generator, outputs is not None, team).to(
            device
        )
        inputs = inputs or measure_inputs(acts, device)
        outputs = outputs or inputs
        self.input_scale, self.target_scale = inputs.scale, outputs.scale
        if config.mean_b_dec:
            self.trainee.b_dec.data = outputs.mean / outputs.scale
            if self.trainee.transcoder:
                self.trainee.b_in.copy_(inputs.mean / inputs.scale)
        unit_norm = ("W_dec",) if config.unit_norm_atoms else ()
        self.optimizer = Adam(
            dict(self.trainee.named_parameters()), config.betas, config.adam_eps, unit_norm
        )
        self.silent = torch.zeros(
            len(self.trainee.b_enc), device=device
        )  # tokens since each latent last fired
        self.step = 0
        self.log: list[dict[str, float]] = []

    def save(self, path: Path, identity: str) -> None:
        tensors = {f"trainee.{name}": tensor for name, tensor in self.trainee.state_dict().items()}
        for name, moments in self.optimizer.moments.items():
            tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
        tensors |= {"silent": self.silent, "generator": self.generator.get_state()}
        tensors = {name: self.team.collect(name, tensor) for name, tensor in tensors.items()}
        metadata = {
            "step": self.step,
            "input_scale": self.input_scale.hex(),
            "target_scale": self.target_scale.hex(),
            "identity": identity,
            "log": self.log,
        }
        if self.team.first:
            write_tensors(path, tensors, {"state": json.dumps(metadata)})

    def load(self, path: Path, identity: str) -> None:
        try:
            with safe_open(path, "pt") as f:
                tensors = {name: self.team.read(f, name) for name in f.keys()}  # noqa: SIM118 (not a dict)
                metadata = json.loads(f.metadata()["state"])
                scales = (
                    metadata["input_scale"],
                    metadata.get("target_scale", metadata["input_scale"]),
                )
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint {path} is damaged ({error}): delete it to start this run again"
            ) from error
        if metadata["identity"] != identity:
            raise ValueError(
                f"{path} belongs to a run with other activations or another configuration: give this run "
                "another folder, or delete that one. Nothing was overwritten"
            )
        self.trainee.load_state_dict(
            {name[8:]: t for name, t in tensors.items() if name.startswith("trainee.")}
        )
        for name, moments in self.optimizer.moments.items():
            for key, value in moments.items():
                value.copy_(tensors[f"adam.{key}.{name}"])
        self.silent.copy_(tensors["silent"])
        self.generator.set_state(tensors["generator"])
        self.step, self.log = metadata["step"], metadata["log"]
        self.optimizer.steps = self.step
        self.input_scale, self.target_scale = map(float.fromhex, scales)

    def fold(self, acts: Activations) -> SAE | None:
        """The SAE of all latents, in the first process; None in others."""
        trainee, team = self.trainee, self.team
        if team.latents > 1:
            whole = {
                name: team.collect(name, tensor) for name, tensor in trainee.state_dict().items()
            }
            if team.first:
                with torch.device("meta"):
                    trainee = Trainee(acts.d_in, self.config, None, trainee.transcoder)
                trainee.load_state_dict(whole, assign=True)
        if not team.first:
            return None
        return trainee.eval().fold(
            self.input_scale,
            acts.model_name,
            acts.site,
            acts.layer,
            self.target_scale if trainee.transcoder else None,
        )


def _advance(
    state: _State, x: torch.Tensor, log_this: bool, target: torch.Tensor | None = None
) -> dict[str, float] | None:
    """One optimiser step on a normalised batch x: [batch, d_in], this process's part of it; returns
    a log row when asked to.

    target: of a transcoder, [batch, d_in], normalised too.
    """
    config, trainee, team = state.config, state.trainee, state.team
    sparsity, base = sparsity_at(config, state.step), bandwidth_at(config, state.step)
    bandwidth = trainee.bandwidths(base)
    target = x if target is None else target
    out = trainee(x, bandwidth)
    terms = trainee.loss(x, out, sparsity, bandwidth, state.silent >= config.dead_after, target)
    row = None
    diagnostics = (
        trainee.diagnose(out, terms, bandwidth)
        if log_this and config.architecture == "jumprelu"
        else None
    )
    sum(terms.values()).backward()
    team.average_gradients(trainee.parameters())
    team.agree_on(trainee.b_dec)
    with torch.no_grad():
        active = heaviside(out.acts, 0)
        fired = out.layout.per_latent(active) > 0
        state.silent = (state.silent + len(x) * team.data) * ~fired
        trainee.update_density(out, bandwidth)
        if log_this:
            row = {
                "step": state.step,
                "tokens": state.step * config.batch_size,
                "sparsity": sparsity,
                "bandwidth": base,
            }
            row |= {
                f"loss_{name}": team.mean(term.detach().clone()).item()
                for name, term in terms.items()
            }
            row |= _measured(state, target, out, active)
            if diagnostics:
                row |= diagnostics._asdict()
                theta = team.gather("threshold", trainee.threshold)
                quantiles = torch.quantile(theta, torch.tensor([0.05, 0.5, 0.95], device=x.device))
                row |= dict(
                    zip(
                        ("threshold_p05", "threshold_p50", "threshold_p95"),
                        quantiles.tolist(),
                        strict=True,
                    )
                )
    lr = config.lr * lr_factor(config, state.step)
    multiples = {"threshold_parameter": config.threshold_lr}
    state.optimizer.step(
        {name: lr * multiples.get(name, 1.0) for name in state.optimizer.parameters}
    )
    trainee.constrain()
    state.step += 1
    if state.step in {round(share * config.steps) for share in config.resample}:
        _resample(state, x, bandwidth)
    return row


def _measured(
    state: _State, target: torch.Tensor, out: Forward, active: torch.Tensor
) -> dict[str, float]:
    """What a log row has of a batch as a whole."""
    config, team = state.config, state.team
    dead = (state.silent >= config.dead_after).double().sum()
    sums = torch.stack(
        [active.sum().double() / len(target), dead, dead.new_tensor(out.acts.numel() / len(target))]
    )
    l0, dead, computed = team.sum_latents(team.mean(sums)).tolist()
    mean = team.mean(target.mean(0))
    missed, variance = team.mean(
        torch.stack([(target - out.x_hat).square().sum(), (target - mean).square().sum()])
    )
    return {
        "l0": l0,
        "fvu": (missed / variance).item(),
        "dead": dead / config.d_sae,
        "computed": computed / config.d_sae,
    }


def _resample(state: _State, x: torch.Tensor, bandwidth: float | torch.Tensor) -> None:
    replaced = state.trainee.resample(
        x, state.silent >= state.config.dead_after, bandwidth, state.generator
    )
    for name, moments in state.optimizer.moments.items():
        for moment in moments.values():  # a new latent starts with Adam's memory empty
            if name == "W_enc":
                moment[:, replaced] = 0
            elif name != "b_dec":
                moment[replaced] = 0
    state.silent[replaced] = 0


def _check_finite(state: _State, title: str, row: dict[str, float] | None = None) -> None:
    """Raise FloatingPointError if a parameter or a logged number is not finite: such a state is
    never saved."""
    values = [torch.tensor(list(row.values()))] if row else list(state.trainee.parameters())
    if not all(torch.isfinite(value).all() for value in values):
        raise FloatingPointError(
            f"{title} diverged before step {state.step}: {row or 'a weight is not finite'}. Lower lr (now "
            f"{state.config.lr}); a checkpoint from before it, if there is one, is kept"
        )


def _saturated(log: list[dict[str, float]], config: TrainConfig) -> bool:
    """Has λ been driving θ alone, on the last ten logged steps at full λ?"""
    rows = [
        row for row in log if row["sparsity"] >= config.sparsity and row.get("sparsity_push", 0) > 0
    ][-10:]
    return len(rows) == 10 and all(
        row["sparsity_push"] > SATURATED * row["reconstruction_push"] for row in rows
    )


@dataclasses.dataclass
class _Run:
    """A run of a sweep: it has a state until it is finished, and then a result."""

    config: TrainConfig
    title: str
    folder: Path | None
    identity: str
    log_every: int
    team: Team = ALONE
    state: _State | None = None
    result: TrainResult | None = None
    saved_at: float = 0.0
    warned: bool = False

    @property
    def step(self) -> int:
        return self.state.step if self.state else self.config.length

    @property
    def checkpoint(self) -> Path | None:
        return self.folder / "checkpoint.safetensors" if self.folder else None

    def open(
        self,
        acts: Activations,
        device: torch.device,
        measured: Callable[[], tuple[Inputs, Inputs | None]],
        transcoder: bool,
    ) -> None:
        """Read back a finished run, go on with an interrupted one, or begin."""
        there = self.team.tell(self._there)
        if there == "finished":
            self.team.see(self.folder / "run.json")
            if read_json(self.folder / "run.json")["identity"] != self.identity:
                raise ValueError(
                    f"{self.folder} holds a finished run with other activations or another configuration: choose "
                    "another folder, or delete that one. Nothing was overwritten"
                )
            self.result = TrainResult(
                SAE.load(self.folder, device), pd.read_csv(self.folder / "log.csv")
            )
        elif there == "interrupted":
            self.team.see(self.checkpoint)
            unknown = Inputs(
                float("nan"), torch.zeros(acts.d_in, device=device)
            )  # the checkpoint has the numbers
            self.state = _State(
                acts, self.config, device, unknown, unknown if transcoder else None, self.team
            )
            self.state.load(self.checkpoint, self.identity)
        else:
            self.state = _State(acts, self.config, device, *measured(), self.team)
        if (step := self.team.tell(lambda: str(self.step))) != str(self.step):
            raise RuntimeError(
                f"the first process goes on from step {step}, this one has read step {self.step} from "
                f"{self.folder}: the file system shows an old checkpoint; start again in a while"
            )
        self.saved_at = time.monotonic()

    def _there(self) -> str:
        if self.folder and (self.folder / "run.json").exists():
            return "finished"
        return "interrupted" if self.checkpoint and self.checkpoint.exists() else "new"

    def advance(
        self, x: torch.Tensor, target: torch.Tensor | None = None
    ) -> dict[str, float] | None:
        """One step on a raw batch; returns a log row at the steps that have one."""
        state, last = self.state, self.config.length - 1
        row = _advance(
            state,
            x / state.input_scale,
            self.step % self.log_every == 0 or self.step == last,
            None if target is None else target / state.target_scale,
        )
        if row:
            _check_finite(self.state, self.title, row)
            self.state.log.append(row)
            if not self.warned and self.team.first and _saturated(self.state.log, self.config):
                self.warned = True
                warnings.warn(
                    f"sparsity = {self.config.sparsity} is saturated: it pushes θ over {SATURATED:.0f} times as hard "
                    "as reconstruction resists, so θ moves at its learning rate and a larger sparsity will hardly "
                    "lower L0. Raise threshold_lr, threshold_init, bandwidth or steps instead",
                    stacklevel=5,
                )
        return row

    def save(self) -> None:
        _check_finite(self.state, self.title)
        self.state.save(self.checkpoint, self.identity)
        self.saved_at = time.monotonic()

    def finish(self, acts: Activations) -> None:
        _check_finite(self.state, self.title)
        sae = self.state.fold(acts)
        # a round trip through CSV, so that a finished run read back has the very same log
        text = pd.DataFrame(self.state.log).to_csv(index=False)
        if self.folder and self.team.first:
            sae.save(self.folder)
            write_text(self.folder / "log.csv", text)
            write_json(
                self.folder / "run.json",
                {"identity": self.identity, "config": dataclasses.asdict(self.config)},
            )
            self.checkpoint.unlink(missing_ok=True)
        self.team.wait()
        if not self.team.first:
            self.team.see(self.folder / "run.json")
            sae = SAE.load(self.folder)
        self.state, self.result = None, TrainResult(sae, pd.read_csv(io.StringIO(text)))


def _show(progress: tqdm, row: dict[str, float], batch_size: int, waiting: float) -> None:
    loss, rate = (
        sum(value for name, value in row.items() if name.startswith("loss_")),
        progress.format_dict["rate"] or 0,
    )
    progress.set_postfix(
        loss=f"{loss:.4f}",
        L0=f"{row['l0']:.1f}",
        FVU=f"{row['fvu']:.3f}",
        dead=f"{row['dead']:.1%}",
        tokens_s=f"{rate * batch_size:.3g}",
        waiting=f"{waiting:.1%}",
    )


def _train_together(
    stores: Sequence[Activations],
    runs: list[_Run],
    device: torch.device,
    checkpoint_seconds: float,
    progress: tqdm,
) -> None:
    """Train runs that see the same batches, in one pass over them. stores: activations, and what is
    predicted from them."""
    config, first, began = runs[0].config, min(run.step for run in runs), time.monotonic()
    acts, team = stores[0], runs[0].team
    most = max(1, min(BLOCK, BLOCK_BYTES // (4 * config.batch_size * acts.d_in * len(stores))))
    with ExitStack() as stack:
        pinned = device.type == "cuda"
        streams = [
            stack.enter_context(
                closing(store.batches(config.batch_size, config.data_order, first, pinned=pinned))
            )
            for store in stores
        ]
        while active := [run for run in runs if run.state]:
            wanted = min(most, max(run.config.length for run in active) - first)
            block = [
                [team.share(next(stream)).to(device, non_blocking=pinned) for stream in streams]
                for _ in range(wanted)
            ]
            for run in active:
                progress.set_description(run.title, refresh=False)
                try:
                    for batch in block[
                        run.step - first : run.config.length - first
                    ]:  # of which a run that is ahead saw some
                        row = run.advance(*batch)
                        progress.update()
                        if row:
                            waited = sum(stream.waited for stream in streams)
                            _show(
                                progress,
                                row,
                                config.batch_size,
                                waited / (time.monotonic() - began),
                            )
                        if run.folder and team.agree(
                            time.monotonic() - run.saved_at > checkpoint_seconds, device
                        ):
                            run.save()
                    if run.step == run.config.length:
                        run.finish(acts)
                except FloatingPointError:
                    for other in active:
                        if other is not run and other.folder and other.state and other.step:
                            with suppress(FloatingPointError):  # of a second one that diverged
                                other.save()
                    raise
            first += len(block)


def _train_all(
    acts: Activations,
    configs: Sequence[TrainConfig],
    folders: Sequence[Path | None],
    device: str | torch.device | None,
    checkpoint_seconds: float,
    log_rows: int,
    targets: Activations | None,
    team: Team = ALONE,
) -> list[TrainResult]:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stores = (acts,) if targets is None else (acts, targets)
    if targets is not None:
        _check_pair(acts, targets, configs)

    @functools.cache  # once for all, and only if a run begins
    def measured() -> tuple[Inputs, Inputs | None]:
        return measure_inputs(acts, device), None if targets is None else measure_inputs(
            targets, device
        )

    runs = []
    for number, (config, folder) in enumerate(zip(configs, folders, strict=True), 1):
        team.check(config)
        title = f"run {number} of {len(configs)}, " if len(configs) > 1 else "training "
        identity = digest(
            *(store.fingerprint for store in stores), dataclasses.asdict(config), log_rows
        )
        runs.append(
            _Run(
                config,
                title + config.architecture,
                folder,
                identity,
                max(1, config.steps // log_rows),
                team,
            )
        )
        runs[-1].open(acts, device, measured, targets is not None)
    groups: dict[tuple[int, int], list[_Run]] = {}
    for run in runs:
        if run.state:
            groups.setdefault((run.config.batch_size, run.config.data_order), []).append(run)
    if groups:
        total, done = sum(config.length for config in configs), sum(run.step for run in runs)
        quiet = {} if team.first else {"disable": True}
        with tqdm(total=total, initial=done, unit="step", mininterval=1, **quiet) as progress:
            for group in groups.values():
                _train_together(stores, group, device, checkpoint_seconds, progress)
    return [run.result for run in runs]


def _check_pair(acts: Activations, targets: Activations, configs: Sequence[TrainConfig]) -> None:
    """Raise ValueError unless row for row both stores are of the same tokens, and dealt into shards
    alike."""
    names = ["model", "dropped_ids", "shard_rows"] + (
        ["tokens"] if acts.model_name else []
    )  # a tensor's rows have none
    asked = [store.index["request"] for store in (acts, targets)]
    differ = [name for name in names if asked[0].get(name) != asked[1].get(name)]
    if differ or acts.n_rows != targets.n_rows:
        raise ValueError(
            f"{acts} and {targets} do not belong together: they differ in {', '.join(differ) or 'rows'}. Harvest "
            "both in one call, such as site=['mlp_in', 'mlp_out']"
        )
    places = [(store.site, store.layer) for store in (acts, targets)]
    if acts.model_name and (places[0][0] not in INPUTS or places[1] != ("mlp_out", acts.layer)):
        raise ValueError(
            f"a transcoder predicts mlp_out from {' or '.join(INPUTS)} of the same layer, not "
            f"{places[1][0]} of layer {places[1][1]} from {places[0][0]} of layer {places[0][1]}"
        )
    if acts.d_in != targets.d_in:
        raise ValueError(
            f"a transcoder's input and output have one width: the activations have {acts.d_in}, the targets "
            f"{targets.d_in}"
        )
    if any(config.resample for config in configs):
        raise ValueError(
            "resample points dead latents at inputs, which are not what a transcoder predicts: leave it empty"
        )


def train(
    acts: Activations,
    config: TrainConfig,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 60,
    log_rows: int = 100,
    targets: Activations | None = None,
    team: Team = ALONE,
) -> TrainResult:
    """Train an SAE on the activations `acts` (from :func:`jumprelu.harvest`); returns (sae, log).

    out: folder for the SAE, its log and, while it runs, a checkpoint every `checkpoint_seconds`.
    Given again, a finished run is read back and an interrupted one goes on, bit for bit. Without it
    nothing is written. device: default is a GPU where there is one. log_rows: about this many rows
    in the log of a whole run; one ended by `stop_after` logs the steps that the whole run would,
    and its own last. targets: activations of the same tokens that are to be predicted from `acts`,
    such as mlp_out from mlp_in: the result is a :class:`jumprelu.sae.Transcoder`. team: the
    processes that train together (:func:`jumprelu.distributed.start`); all of them call this alike,
    with one `out`, and all get the result.

    The log's columns: step, tokens, sparsity (λ), bandwidth (ε), loss_*, l0, fvu, dead (share),
    computed (share of pre-activations that the step went on with after the encoder), and for
    JumpReLU those of :class:`jumprelu.architectures.StepDiagnostics` and quantiles of θ; all in
    normalised units. The progress bar also shows the share of the time that was spent waiting for
    data.

    Raises ValueError if `out` holds another run, the checkpoint is damaged, `targets` are of other
    tokens, the configuration does not suit the team, or the activations are not finite (the reader
    names shard and row); FloatingPointError if loss or weights are not finite (the last checkpoint
    stays).
    """
    if out is None and not team.alone:
        raise ValueError(
            "processes that train together need a folder where all find the result: give train(..., out=...)"
        )
    folder = Path(out) if out is not None else None
    return _train_all(
        acts, [config], [folder], device, checkpoint_seconds, log_rows, targets, team
    )[0]


def train_many(
    acts: Activations,
    configs: Sequence[TrainConfig],
    out: str | Path | Sequence[str | Path] | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 60,
    log_rows: int = 100,
    targets: Activations | None = None,
) -> list[TrainResult]:
    """Train an SAE for each of `configs`, in their order in the result; each is, bit for bit, that
    of :func:`train`.

    Runs with the same `batch_size` and the same order of data (give all the same `data_seed`) are
    trained in one pass over the data: each batch is read, and brought to the device, once. They may
    differ in everything else, `steps` included. The weights, gradients and Adam's moments of all
    unfinished runs are in memory at once.

    out: folder in which every run has a folder of its own, "architecture-digest of its
    configuration", as :func:`train` would write it; or one folder for each run. Given again,
    finished runs are read back and interrupted ones go on, bit for bit, also when configurations
    were added, left out or put into another order. Other arguments as for :func:`train`.

    Raises what :func:`train` does, and ValueError if a configuration is there twice. If one run
    diverges, the error names it and with `out` nothing is lost of the others: mend or leave out its
    configuration and call again.
    """
    names = [
        f"{config.architecture}-{digest(dataclasses.asdict(config))[:8]}" for config in configs
    ]
    for number, name in enumerate(names):
        if names.index(name) < number:
            raise ValueError(
                f"configs[{names.index(name)}] and configs[{number}] are the same: leave one out or change a seed"
            )
    if out is None or isinstance(out, str | Path):
        folders = [Path(out) / name if out is not None else None for name in names]
    elif len(out) == len(names):
        folders = [Path(folder) for folder in out]
    else:
        raise ValueError(
            f"{len(out)} folders for {len(names)} configurations: give one for each, or one for all"
        )
    return _train_all(acts, configs, folders, device, checkpoint_seconds, log_rows, targets)


# Part of the key under which a run is kept: raise it with every change of what is computed.
train.version = train_many.version = 1


if __name__ == "__main__":  # `python -m companion.rails.launch` does the same
    from companion.rails.launch import main

    main()
