"""Train SAEs on harvested activations: `train(acts, TrainConfig(...)) -> (sae, log)`, and
`train_many` for a sweep. With targets, what is trained is a transcoder, which predicts them.

Notable here:
- a run is a function of (activations, config), to the bit on one CPU with one number of threads and
  one policy. Killed at any step and started again, it ends with the bits of an uninterrupted run.
- a sweep reads its data once for all runs that see the same batches. They take turns: each trains
  on a block of batches small enough to stay, with the run's weights, in the CPU's cache.
"""

from __future__ import annotations

import dataclasses
import io
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .activations import Activations
from .distributed import ALONE, Team
from .files import digest, locked, read_json, write_json, write_text
from .recipe import TrainConfig
from .sae import SAE
from .sites import INPUTS
from .sparse import POLICY, SparsePolicy
from .state import Row, TrainState, measure_inputs, train_step

if TYPE_CHECKING:
    import pandas as pd

TRAINER_VERSION = 1
"""Part of the identity of every run, and of the keys of SAEs that are kept: raise it when the
numbers that a run gives change."""

SATURATED = 30
"""λ cannot be felt any more when sparsity pushes θ so many times as hard as reconstruction."""

BLOCK = 32
BLOCK_BYTES = 2**25
"""A run's turn in a sweep: at most so many batches and bytes of them, at least one batch."""


class TrainResult(NamedTuple):
    """The SAE, for raw activations, and the log, a row per logged step."""

    sae: SAE
    log: pd.DataFrame


def run_identity(stores: Sequence[Activations], config: TrainConfig, log_rows: int) -> str:
    """Digest of all that a run depends on; its files are refused to any other run."""
    fingerprints = [store.fingerprint for store in stores]
    return digest(TRAINER_VERSION, fingerprints, dataclasses.asdict(config), log_rows)


@dataclasses.dataclass
class _Run:
    """A run of a sweep: it has a state while it is trained, and then a result."""

    config: TrainConfig
    title: str
    folder: Path | None
    identity: str
    log_every: int
    checkpoint_seconds: float
    team: Team
    state: TrainState | None = None
    result: TrainResult | None = None
    saved_at: float = 0.0

    @property
    def step(self) -> int:
        return self.state.step if self.state else self.config.length

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def read_result(self, device: torch.device) -> None:
        """Read back the result, if the run is finished."""
        import pandas as pd

        if not self.team.from_first(bool(self.folder) and (self.folder / "run.json").exists()):
            return
        self.team.wait_for_file(self.folder / "run.json")
        if read_json(self.folder / "run.json")["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} holds a finished run with other activations, another configuration "
                "or trainer: choose another folder, or delete it. Nothing was overwritten"
            )
        log = pd.read_csv(self.folder / "log.csv")
        self.result = TrainResult(SAE.load(self.folder, device), log)

    def begin(self, state: TrainState) -> None:
        """Begin with a new state, or go on from the checkpoint, if there is one."""
        self.state, self.saved_at = state, time.monotonic()
        if self.team.from_first(bool(self.folder) and self.checkpoint.exists()):
            self.team.wait_for_file(self.checkpoint)
            state.load(self.checkpoint, self.identity)
            if (step := self.team.from_first(self.step)) != self.step:
                raise RuntimeError(
                    f"the first process goes on from step {step}, this one from {self.step}: "
                    f"{self.checkpoint} is seen in an old version; start again in a while"
                )

    def advance(self, x: Tensor, target: Tensor | None = None) -> Row | None:
        """One step on a raw batch; returns a log row at the steps that have one."""
        state = self.state
        log = state.step % self.log_every == 0 or state.step == self.config.length - 1
        target = None if target is None else target / state.target_scale
        row = train_step(state, x / state.input_scale, log, target)
        if row:
            self._check_finite(row)
            state.log.append(row)
            if self.team.first and saturated(state.log, self.config.sparsity):
                warnings.warn(  # Python shows a warning of the same text once
                    f"sparsity = {self.config.sparsity} is saturated: it pushes θ over {SATURATED} "
                    "times as hard as reconstruction does, so more of it will hardly lower L0. "
                    "Raise threshold_lr, threshold_init, bandwidth or steps instead",
                    stacklevel=1,
                )
        late = time.monotonic() - self.saved_at > self.checkpoint_seconds
        if self.folder and self.team.broadcast_flag(late, state.silent.device):
            self.save()
        return row

    def _check_finite(self, row: Row | None = None) -> None:
        """Raise FloatingPointError if a parameter, or a number of `row`, is not finite: such a
        state is never saved."""
        numbers = [torch.tensor(list(row.values()))] if row else self.state.trainee.parameters()
        if not all(torch.isfinite(tensor).all() for tensor in numbers):
            raise FloatingPointError(
                f"{self.title} diverged before step {self.step}: {row or 'a weight is not finite'}."
                f" Lower lr (now {self.config.lr}); an earlier checkpoint, if any, is kept"
            )

    def save(self) -> None:
        self._check_finite()
        self.state.save(self.checkpoint, self.identity)
        self.saved_at = time.monotonic()

    def finish(self, acts: Activations) -> None:
        import pandas as pd

        self._check_finite()
        sae, device = self.state.fold(acts), self.state.silent.device
        text = pd.DataFrame(self.state.log).to_csv(index=False)
        self.state = None
        if not self.folder:  # the log as it would be read back
            self.result = TrainResult(sae, pd.read_csv(io.StringIO(text)))
            return
        if self.team.first:
            sae.save(self.folder)
            write_text(self.folder / "log.csv", text)
            config = dataclasses.asdict(self.config)
            write_json(self.folder / "run.json", {"identity": self.identity, "config": config})
            self.checkpoint.unlink(missing_ok=True)
        self.team.barrier()
        self.read_result(device)


def saturated(log: Sequence[Row], sparsity: float) -> bool:
    """Whether λ = `sparsity`, reached at least ten rows ago, has pushed θ more than `SATURATED`
    times as hard as reconstruction in each of the last ten rows."""
    rows = [row for row in log[-10:] if row["sparsity"] >= sparsity and "sparsity_push" in row]
    return len(rows) == 10 and all(
        row["sparsity_push"] > SATURATED * row["reconstruction_push"] for row in rows
    )


def _show(progress: tqdm, row: Row, batch_size: int, waiting: float) -> None:
    rate = progress.format_dict["rate"] or 0
    progress.set_postfix(
        loss=f"{sum(value for name, value in row.items() if name.startswith('loss_')):.4f}",
        L0=f"{row['l0']:.1f}",
        FVU=f"{row['fvu']:.3f}",
        dead=f"{row['dead']:.1%}",
        tokens_s=f"{rate * batch_size:.3g}",
        waiting=f"{waiting:.1%}",
    )


def _train_together(
    stores: Sequence[Activations], runs: list[_Run], device: torch.device, progress: tqdm
) -> None:
    """Train runs that see the same batches, in one pass over them. stores: activations, targets."""
    config, first, began = runs[0].config, min(run.step for run in runs), time.monotonic()
    team, pinned = runs[0].team, device.type == "cuda"
    batch_bytes = 4 * config.batch_size * stores[0].d_in * len(stores)
    most = max(1, min(BLOCK, BLOCK_BYTES // batch_bytes))
    with ExitStack() as stack:
        streams = []
        for store in stores:
            stream = store.batches(config.batch_size, config.data_order, first, pinned=pinned)
            streams.append(stack.enter_context(closing(stream)))

        def next_batch() -> list[Tensor]:
            rows = [team.local_rows(next(stream)) for stream in streams]
            return [part.to(device, non_blocking=pinned) for part in rows]

        while active := [run for run in runs if run.state]:
            wanted = min(most, max(run.config.length for run in active) - first)
            block = [next_batch() for _ in range(wanted)]
            for run in active:
                progress.set_description(run.title, refresh=False)
                # a run that is ahead has seen some of the block
                turn = block[run.step - first : run.config.length - first]
                try:
                    for batch in turn:
                        row = run.advance(*batch)
                        progress.update()
                        if row:
                            waited = sum(stream.waited for stream in streams)
                            share = waited / (time.monotonic() - began)
                            _show(progress, row, config.batch_size, share)
                    if run.step == run.config.length:
                        run.finish(stores[0])
                except FloatingPointError:
                    for other in active:
                        if other is not run and other.folder and other.state and other.step:
                            with suppress(FloatingPointError):  # of a second one that diverged
                                other.save()
                    raise
            first += len(block)


def _check_pair(acts: Activations, targets: Activations, configs: Sequence[TrainConfig]) -> None:
    """Raise ValueError unless both stores have the same tokens, row for row and shard by shard."""
    names = ["model", "dropped_ids", "shard_rows"]
    names += ["tokens"] if acts.model_name else []  # a tensor's rows have none
    requests = [store.index["request"] for store in (acts, targets)]
    differ = [name for name in names if requests[0].get(name) != requests[1].get(name)]
    if differ or len(acts) != len(targets):
        raise ValueError(
            f"{acts} and {targets} do not belong together: {', '.join(differ) or 'rows'} differ. "
            "Harvest both in one call, such as site=['mlp_in', 'mlp_out']"
        )
    good = acts.site in INPUTS and (targets.site, targets.layer) == ("mlp_out", acts.layer)
    if acts.model_name and not good:
        raise ValueError(
            f"a transcoder predicts mlp_out from {' or '.join(INPUTS)} of the same layer, not "
            f"{targets.site} of layer {targets.layer} from {acts.site} of layer {acts.layer}"
        )
    if acts.d_in != targets.d_in:
        raise ValueError(
            "a transcoder's input and output are of one width: the activations have "
            f"{acts.d_in}, the targets {targets.d_in}"
        )
    if any(config.resample for config in configs):
        raise ValueError(
            "resample points dead latents at inputs, which no transcoder predicts: leave it empty"
        )


def _folders(
    configs: Sequence[TrainConfig], out: str | Path | Sequence[str | Path] | None
) -> Sequence[Path | None]:
    """The folder of each run; see :func:`train_many`."""
    names = [f"{one.architecture}-{digest(dataclasses.asdict(one))[:8]}" for one in configs]
    for number, name in enumerate(names):
        if names.index(name) < number:
            raise ValueError(
                f"configs[{names.index(name)}] and configs[{number}] are the same: leave one out "
                "or change a seed"
            )
    if out is None:
        return [None] * len(names)
    folders = [Path(out) / name for name in names] if isinstance(out, str | Path) else out
    if len(folders) != len(names):
        raise ValueError(
            f"{len(folders)} folders for {len(names)} runs: give one for each, or one for all"
        )
    return [Path(folder) for folder in folders]


def train_many(
    acts: Activations,
    configs: Sequence[TrainConfig],
    out: str | Path | Sequence[str | Path] | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 60,
    log_rows: int = 100,
    targets: Activations | None = None,
    team: Team = ALONE,
    policy: SparsePolicy = POLICY,
) -> list[TrainResult]:
    """Train an SAE for each of `configs`, in their order in the result; each is, bit for bit, that
    of :func:`train`.

    Runs with the same `batch_size` and order of data (give all the same `data_seed`) are trained in
    one pass over the data. They may differ in everything else, `steps` included. The weights and
    Adam's moments of all unfinished runs are in memory at once.

    out: folder in which every run has a folder of its own, "architecture-digest of its
    configuration", as :func:`train` would write it; or one folder for each run. Given again,
    finished runs are read back and interrupted ones go on, also when configurations were added,
    left out or put into another order. Other arguments as for :func:`train`.

    Raises what :func:`train` does, and ValueError if a configuration is there twice. If one run
    diverges, the error names it and with `out` nothing is lost of the others.
    """
    if out is None and not team.alone:
        raise ValueError(
            "processes that train together need a common folder: give train(..., out=...)"
        )
    folders = _folders(configs, out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stores = (acts,) if targets is None else (acts, targets)
    if targets is not None:
        _check_pair(acts, targets, configs)
    runs: list[_Run] = []
    groups: dict[tuple[int, int], list[_Run]] = {}
    with ExitStack() as stack:
        if team.first:  # in one order, so that no two processes wait for each other
            for folder in sorted({folder for folder in folders if folder}):
                if not (folder / "run.json").exists():
                    waiting = f"another process trains in {folder}: waiting until it is done"
                    stack.enter_context(locked(folder, waiting))
        for number, (config, folder) in enumerate(zip(configs, folders, strict=True), 1):
            team.check(config)
            title = f"run {number} of {len(configs)}, " if len(configs) > 1 else "training "
            title += config.architecture
            identity = run_identity(stores, config, log_rows)
            log_every = max(1, config.steps // log_rows)
            run = _Run(config, title, folder, identity, log_every, checkpoint_seconds, team)
            run.read_result(device)
            runs.append(run)
        unfinished = [run for run in runs if not run.result]
        if unfinished:
            inputs = [measure_inputs(store, device) for store in stores]
        for run in unfinished:
            run.begin(TrainState(acts, run.config, device, *inputs, team=team, policy=policy))
            key = run.config.batch_size, run.config.data_order
            groups.setdefault(key, []).append(run)
        total, done = sum(config.length for config in configs), sum(run.step for run in runs)
        options = {"disable": True} if not (groups and team.first) else {}
        with tqdm(total=total, initial=done, unit="step", mininterval=1, **options) as progress:
            for group in groups.values():
                _train_together(stores, group, device, progress)
    return [run.result for run in runs]


def train(
    acts: Activations,
    config: TrainConfig,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 60,
    log_rows: int = 100,
    targets: Activations | None = None,
    team: Team = ALONE,
    policy: SparsePolicy = POLICY,
) -> TrainResult:
    """Train an SAE on the activations `acts` (from :func:`jumprelu.harvest`); returns (sae, log).

    out: folder for the SAE, its log and, while it runs, a checkpoint every `checkpoint_seconds`;
    without it nothing is written. Given again, a finished run is read back and an interrupted one
    goes on; while another process trains there, this one waits. device: default is a GPU where
    there is one. log_rows: about this many rows in the log of a whole run; one ended by
    `stop_after` logs the steps that the whole run would, and its own last. targets: activations of
    the same tokens that are to be predicted from `acts`, such as mlp_out from mlp_in: the result is
    a :class:`jumprelu.sae.Transcoder`. team: the processes that train together
    (:func:`jumprelu.distributed.start`); all of them call this alike, with one `out`, and all get
    the result. policy: when steps are sparse; it changes results to rounding only.

    The log's columns: step, tokens, sparsity (λ), bandwidth (ε), loss_*, l0, fvu, dead (share),
    computed (share of pre-activations kept after the search; 1 in a dense step), and for
    JumpReLU window_share, threshold_travel, reconstruction_push and sparsity_push (means over
    latents of :meth:`jumprelu.architectures.Trainee.diagnose`, of pushes without their sign),
    window_latents (share of latents with a sample in the window) and quantiles of θ; all in
    normalised units. Warns where sparsity pushes θ many times as hard as reconstruction: θ then
    moves at its learning rate, and more λ will hardly lower L0.

    Raises ValueError if `out` holds another run, the checkpoint is damaged, `targets` are of other
    tokens, the configuration does not suit the team, or the activations are not finite (the reader
    names shard and row); FloatingPointError if loss or weights are not finite (the last checkpoint
    stays).
    """
    folders = None if out is None else [out]
    options = device, checkpoint_seconds, log_rows, targets, team, policy
    return train_many(acts, [config], folders, *options)[0]


train.version = train_many.version = TRAINER_VERSION
