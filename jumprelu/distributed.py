"""One training run on several processes (torch.distributed), which share tokens and latents.

    torchrun --nproc-per-node 4 -m jumprelu train ACTS --config config.yaml --latents 2 --out DIR

Notable here:
- processes form a mesh, data × latents. Along `data` they see different tokens of each batch and
  average what they found; along `latents` they see the same tokens, and each holds its share of the
  latents: arrays, gradients, Adam's moments and counters.
- a latent of JumpReLU, ReLU and Gated is active or not by itself. So shards of latents exchange one
  partial reconstruction (Gated: two) and one L0 a token, and what b_dec gets through the encoder.
- sums over latents, and means over tokens, are taken by the layout of a pass. :class:`Sharded` is a
  layout whose sums go on over the mesh; architectures and losses know nothing of this module.
- only the first process writes files, as one process would: checkpoints can be resumed on any mesh.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .recipe import TrainConfig
from .support import Layout

PATIENCE = timedelta(days=1)
"""How long processes wait for one another: one may harvest while the others have nothing to do."""

SEEN_WITHIN = 90.0
"""Seconds that a file system may take to show a file on another node."""

ACROSS_LATENTS = ("l1", "l0", "l0_target", "l0_target_batch")
"""Losses of sums over a token's latents."""


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = part.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class _Total(torch.autograd.Function):
    """Sum over a group, or its mean. What follows is computed by all of them alike, so the gradient
    of each part is that of the sum; of a mean, gradients are averaged in the end."""

    @staticmethod
    def forward(ctx, part, group, mean):
        total = _summed(part, group)
        return total / dist.get_world_size(group) if mean else total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, None, None


class _Spread(torch.autograd.Function):
    """The same tensor for all of a group, each of which uses it for something else: its gradient is
    the sum of theirs."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _summed(gradient, ctx.group), None


class Sharded:
    """A layout of one process's tokens and latents, with sums over all; methods as of
    :class:`jumprelu.support.Dense`."""

    def __init__(self, inner: Layout, team: Team):
        self.inner, self.team = inner, team
        self.dense, self.at = inner.dense, inner.at

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        if self.team.latents > 1:
            b_dec = _Spread.apply(b_dec, self.team.group("latents"))
        return self.inner.encode(x, W_enc, b_enc, b_dec)

    def decode(self, entries: Tensor, W_dec: Tensor) -> Tensor:
        return self._total(self.inner.decode(entries, W_dec))

    def per_token(self, entries: Tensor) -> Tensor:
        return self._total(self.inner.per_token(entries))

    def per_latent(self, entries: Tensor) -> Tensor:
        return self._total(self.inner.per_latent(entries), "data", mean=True)

    def _total(self, part: Tensor, which: str = "latents", mean: bool = False) -> Tensor:
        if self.team.size(which) == 1:
            return part
        return _Total.apply(part, self.team.group(which), mean)


@dataclass(frozen=True)
class Team:
    """The processes of a run, and the place of this one; without a mesh, one process. Methods not
    marked local must be called by all, in the same order."""

    mesh: DeviceMesh | None = None

    def size(self, which: str) -> int:
        """Processes along "data" or "latents". Local."""
        return self.mesh[which].size() if self.mesh else 1

    def rank(self, which: str) -> int:
        """This process's place along "data" or "latents". Local."""
        return self.mesh.get_local_rank(which) if self.mesh else 0

    def group(self, which: str) -> dist.ProcessGroup:
        return self.mesh.get_group(which)

    data = property(lambda self: self.size("data"), doc="Parts that a batch is dealt into.")
    latents = property(lambda self: self.size("latents"), doc="Parts that latents are dealt into.")
    alone = property(lambda self: self.mesh is None, doc="Whether there is one process.")
    first = property(
        lambda self: self.alone or dist.get_rank() == 0,
        doc="Whether this is the process that writes files.",
    )

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError for a configuration that cannot be trained on this team, saying what
        would do. Local."""
        loss, problem = config.loss, None
        if self.latents > 1 and config.architecture in ("topk", "batchtopk"):
            problem = f"{config.architecture} ranks the latents of a token: take 1 along latents"
        elif self.latents > 1 and loss not in ACROSS_LATENTS:
            known = ", ".join(ACROSS_LATENTS)
            problem = f"loss {loss!r}: expected one of {known}, or 1 along latents"
        elif config.d_sae % self.latents:
            problem = f"d_sae = {config.d_sae}: expected a multiple of {self.latents}"
        elif self.data > 1 and (config.architecture == "batchtopk" or loss == "l0_target_batch"):
            problem = "batchtopk and l0_target_batch need a whole batch: take 1 along data"
        elif config.batch_size % self.data:
            problem = f"batch_size = {config.batch_size}: expected a multiple of {self.data}"
        elif not self.alone and config.resample:
            problem = "resample draws from a whole batch: leave it empty"
        if problem:
            mesh = f"{self.data} × {self.latents} (data × latents)"
            raise ValueError(f"this cannot be trained on a mesh of {mesh}: {problem}")

    def layout(self, inner: Layout) -> Layout | Sharded:
        """A layout whose sums are those of the team. Local."""
        return inner if self.alone else Sharded(inner, self)

    # ---- tokens

    def local_rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch, [batch, …]. Local."""
        return batch if self.data == 1 else batch.tensor_split(self.data)[self.rank("data")]

    @torch.no_grad()
    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over `data`, in place where it can be."""
        if self.data > 1:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.group("data"))
            tensor /= self.data
        return tensor

    def reduce_gradients(self, module: torch.nn.Module) -> None:
        """From gradients of means over one process's tokens to those over the batch; and that of
        b_dec, which all shards of latents have, to the same bits in all."""
        for parameter in module.parameters():
            if self.data > 1 and (grad := parameter.grad) is not None:
                by_latent = grad.ndim == 2 and grad.stride(0) < grad.stride(1)
                parameter.grad = self.mean(grad.T).T if by_latent else self.mean(grad)
        if self.latents > 1:
            dist.broadcast(module.b_dec.grad, group=self.group("latents"), group_src=0)

    # ---- latents

    @torch.no_grad()
    def sum_latents(self, tensor: Tensor) -> Tensor:
        """Sum over shards of latents, in place."""
        if self.latents > 1:
            dist.all_reduce(tensor, group=self.group("latents"))
        return tensor

    def local_latents(self, name: str, tensor: Tensor) -> Tensor:
        """This process's latents of a tensor of all, in memory of their own; name: see
        :func:`latent_dim`. Local."""
        dim = latent_dim(name)
        if self.latents == 1 or dim is None:
            return tensor
        return tensor.chunk(self.latents, dim)[self.rank("latents")].clone()

    def shard(self, module: torch.nn.Module) -> None:
        """Keep of a module's parameters and buffers this process's latents alone. Local."""
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.data = self.local_latents(name, tensor.data)

    @torch.no_grad()
    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of all latents, for all processes. The inverse of :meth:`local_latents`."""
        dim = latent_dim(name)
        if self.latents == 1 or dim is None:
            return tensor
        part = tensor.movedim(dim, 0).contiguous()
        whole = part.new_empty(len(part) * self.latents, *part.shape[1:])
        dist.all_gather_into_tensor(whole, part, group=self.group("latents"))
        return whole.movedim(0, dim)

    def gather_to_first(self, name: str, tensor: Tensor) -> Tensor | None:
        """:meth:`gather` for the first process, in its host memory; None for others."""
        whole = self.gather(name, tensor)
        if self.alone:
            return whole
        return whole.cpu() if self.first else None

    # ---- agreement

    def broadcast_flag(self, flag: bool, device: torch.device) -> bool:
        """The first process's flag, for all."""
        if self.alone:
            return flag
        tensor = torch.tensor(int(flag), device=device)
        dist.broadcast(tensor, 0)
        return bool(tensor)

    def from_first(self, value: Any) -> Any:
        """The first process's value, for all."""
        result = [value]
        if not self.alone:
            dist.broadcast_object_list(result, 0)
        return result[0]

    def barrier(self) -> None:
        """Wait until all are here."""
        if not self.alone:
            dist.barrier()

    def wait_for_file(self, path: Path) -> None:
        """Wait until this process sees a file that the first one has written. Local. Raises
        FileNotFoundError after `SEEN_WITHIN`."""
        began = time.monotonic()
        while not self.alone and not path.exists():
            if time.monotonic() - began > SEEN_WITHIN:
                raise FileNotFoundError(
                    f"{path}, which the first process has written, is not seen by this one: give a "
                    "folder that all share"
                )
            time.sleep(0.1)

    def close(self) -> None:
        """End the process group; nothing of the team works afterwards."""
        if not self.alone:
            dist.destroy_process_group()


ALONE = Team()


def latent_dim(name: str) -> int | None:
    """Along which dimension of a run's tensor latents are, by its name, such as
    "adam.exp_avg_sq.W_enc"; None: along none."""
    last = name.rpartition(".")[2]
    if last in ("b_dec", "b_in", "batch_threshold", "generator"):
        return None
    return 1 if last == "W_enc" else 0


def start(latents: int = 1, device: str | None = None) -> Team:
    """The team of the processes that torchrun started, `latents` of them along that dimension;
    alone without torchrun.

    device: "cuda" (the default where there is one; of the local rank) or "cpu", with gloo. Raises
    ValueError if the processes are no multiple of `latents`, or not started by torchrun.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if latents < 1 or world % latents:
        raise ValueError(
            f"{world} processes cannot be dealt into {latents} along latents: start a multiple"
        )
    if world == 1:
        return ALONE
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError("WORLD_SIZE is set, and not by torchrun: start with torchrun, or unset it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    options = {}
    one_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if one_store and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all attempts: without a prefix, a restarted process may find
        # the addresses of the dead. Several nodes do not count their attempts together: set
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=PATIENCE)
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        options = {"store": store, "rank": int(os.environ["RANK"]), "world_size": world}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE, **options)
    mesh = init_device_mesh(device, (world // latents, latents), mesh_dim_names=("data", "latents"))
    return Team(mesh)
