"""One training run on several devices, on torch.distributed: tokens are dealt out, and latents too.

    torchrun --nproc-per-node 4 -m jumprelu train ACTS --config config.yaml --latents 2 --out DIR

Notable here:
- processes form a mesh, data × latents. Along `data` they see different tokens of each batch and
  average what they found; along `latents` they see the same tokens, and each holds its share of the
  latents: arrays, gradients, Adam's moments and counters.
- whether a latent is active is decided by that latent alone (JumpReLU, ReLU, Gated). So shards of
  latents exchange one partial reconstruction (Gated: two) and one L0 a token, and what b_dec gets
  through the encoder. TopK ranks all latents of a token, and can be dealt out by tokens only.
- a sum over latents, or a mean over tokens, is taken by the layout of a pass. :class:`Sharded` is a
  layout whose sums go on over the mesh: architectures and losses are those of one process.
- a checkpoint is gathered by the first process, tensor by tensor, and written as one process would
  write it. So it can be resumed on any mesh whose sizes divide the latents and the batch.
- files are decided on by the first process alone, and others wait until they see them: on several
  nodes, the folder of the run and the cache must be on a file system that all share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .losses import Layout
from .recipe import TrainConfig

PATIENCE = timedelta(days=1)
"""How long processes wait for one another: one may harvest while the others have nothing to do."""

SEEN_WITHIN = 90.0
"""Seconds that a file system may take to show a file on another node."""

ACROSS_LATENTS = ("l1", "l0", "l0_target", "l0_target_batch", "l0_quadratic", "tanh")
"""Losses of sums over a token's latents."""


class _Total(torch.autograd.Function):
    """Sum over a group, or its mean. What follows is computed by all of them alike, so each one's
    gradient is that of its part; of a mean, gradients are averaged in the end."""

    @staticmethod
    def forward(ctx, part, group, mean=False):
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group) if mean else total

    @staticmethod
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
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Sharded:
    """A layout on one process's tokens and latents, with sums over all of both; methods as of
    :class:`jumprelu.sparse.Dense`."""

    def __init__(self, inner: Layout, team: Team):
        self.inner, self.team = inner, team
        self.at = inner.at

    def encode(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor
    ) -> torch.Tensor:
        if self.team.latents > 1:
            b_dec = _Spread.apply(b_dec, self.team.group("latents"))
        return self.inner.encode(x, W_enc, b_enc, b_dec)

    def decode(self, entries: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        return self._total(self.inner.decode(entries, W_dec))

    def per_token(self, entries: torch.Tensor) -> torch.Tensor:
        return self._total(self.inner.per_token(entries))

    def per_latent(self, entries: torch.Tensor) -> torch.Tensor:
        mean = self.inner.per_latent(entries)
        return _Total.apply(mean, self.team.group("data"), True) if self.team.data > 1 else mean

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        return _Total.apply(part, self.team.group("latents")) if self.team.latents > 1 else part


@dataclass(frozen=True)
class Team:
    """The processes of a run, and the place of this one; without a mesh it is alone, and everything
    here leaves things as they are. Methods that speak of "all" are to be called by all of them, in
    the same order."""

    mesh: DeviceMesh | None = None

    def size(self, which: str) -> int:
        """Processes along "data" or "latents"."""
        return self.mesh.size(self.mesh.mesh_dim_names.index(which)) if self.mesh else 1

    def rank(self, which: str) -> int:
        """This process's place along "data" or "latents"."""
        return self.mesh.get_local_rank(which) if self.mesh else 0

    def group(self, which: str) -> dist.ProcessGroup:
        return self.mesh.get_group(which)

    data = property(lambda self: self.size("data"), doc="Parts that a batch is dealt into.")
    latents = property(
        lambda self: self.size("latents"), doc="Parts that the latents are dealt into."
    )
    alone = property(lambda self: self.mesh is None, doc="Whether there is one process.")
    first = property(
        lambda self: self.alone or dist.get_rank() == 0,
        doc="Whether this is the process that writes files.",
    )

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError for a configuration that cannot be trained on this team, saying what
        would do."""

        def refuse(what: str, instead: str) -> None:
            raise ValueError(
                f"{what} cannot be trained on a mesh of {self.data} × {self.latents} (data × latents): {instead}"
            )

        if self.latents > 1:
            if config.architecture in ("topk", "batchtopk"):
                refuse(
                    f"architecture {config.architecture!r}",
                    "it ranks the latents of a token among all; take 1 along latents",
                )
            if config.loss not in ACROSS_LATENTS or config.preactivation:
                refuse(
                    f"sparsity loss {'preactivation' if config.preactivation else config.loss!r}",
                    f"expected one of {', '.join(ACROSS_LATENTS)}, or 1 along latents",
                )
            if config.bandwidth_by_density:
                refuse(
                    "bandwidth_by_density",
                    "it takes a median over all latents; take 1 along latents",
                )
            if config.d_sae % self.latents:
                refuse(f"d_sae = {config.d_sae}", f"expected a multiple of {self.latents}")
        if self.data > 1:
            if config.architecture == "batchtopk" or config.loss == "l0_target_batch":
                refuse(
                    config.loss if config.loss == "l0_target_batch" else "architecture 'batchtopk'",
                    "it is no mean over tokens; take 1 along data",
                )
            if config.batch_size % self.data:
                refuse(f"batch_size = {config.batch_size}", f"expected a multiple of {self.data}")
        if not self.alone and config.resample:
            refuse("resample", "it draws from a whole batch; leave it empty")

    def layout(self, inner: Layout) -> Layout | Sharded:
        """A layout whose sums are those of the team."""
        return inner if self.alone else Sharded(inner, self)

    # ---- tokens

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's rows of a batch, [batch, …]."""
        return batch if self.data == 1 else batch.tensor_split(self.data)[self.rank("data")]

    @torch.no_grad()
    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over `data`, in place where it can be."""
        if self.data > 1:
            tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
            dist.all_reduce(tensor, group=self.group("data"))
            tensor /= self.data
        return tensor

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gradients of means over one's own tokens become those of the mean over the batch."""
        if self.data > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    latent_by_latent = parameter.ndim == 2 and parameter.grad.stride(
                        0
                    ) < parameter.grad.stride(1)
                    parameter.grad = (
                        self.mean(parameter.grad.T).T
                        if latent_by_latent
                        else self.mean(parameter.grad)
                    )

    def agree_on(self, parameter: torch.nn.Parameter) -> None:
        """One gradient for a parameter that all shards of latents have: sums may have been taken in
        different orders."""
        if self.latents > 1:
            dist.broadcast(parameter.grad, group=self.group("latents"), group_src=0)

    # ---- latents

    @torch.no_grad()
    def sum_latents(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over shards of latents."""
        if self.latents > 1:
            dist.all_reduce(tensor, group=self.group("latents"))
        return tensor

    def mine(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This process's latents of a tensor of all; `name` says which dimension they are along."""
        dim = latent_dim(name)
        return (
            tensor
            if self.latents == 1 or dim is None
            else tensor.chunk(self.latents, dim)[self.rank("latents")]
        )

    def read(self, file: safe_open, name: str) -> torch.Tensor:
        """This process's latents of a tensor in an open file of safetensors; the rest is not
        read."""
        dim = latent_dim(name)
        if self.latents == 1 or dim is None:
            return file.get_tensor(name)
        stored = file.get_slice(name)
        each = stored.get_shape()[dim] // self.latents
        part = slice(self.rank("latents") * each, (self.rank("latents") + 1) * each)
        return stored[part] if dim == 0 else stored[:, part]

    def shard(self, module: torch.nn.Module) -> None:
        """Keep of a module's parameters and buffers this process's latents alone."""
        if self.latents > 1:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                part = self.mine(name, tensor.data)
                tensor.data = (
                    part.T.clone(memory_format=torch.contiguous_format).T
                    if name == "W_enc"
                    else part.clone()
                )

    @torch.no_grad()
    def gather(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of all latents from each one's own, for all. The inverse of :meth:`mine`."""
        dim = latent_dim(name)
        if self.latents == 1 or dim is None:
            return tensor
        part = tensor.movedim(dim, 0).contiguous()
        whole = part.new_empty(len(part) * self.latents, *part.shape[1:])
        dist.all_gather_into_tensor(whole, part, group=self.group("latents"))
        return whole.movedim(0, dim)

    def collect(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """:meth:`gather` for the first process, in its host memory; None for others."""
        whole = self.gather(name, tensor)
        return whole if self.alone else whole.cpu() if self.first else None

    # ---- agreement

    def agree(self, wanted: bool, device: torch.device) -> bool:
        """What the first process wants, for all."""
        if self.alone:
            return wanted
        flag = torch.tensor(int(wanted), device=device)
        dist.broadcast(flag, 0)
        return bool(flag)

    def wait(self) -> None:
        """Until all are here."""
        if not self.alone:
            dist.barrier()

    def see(self, path: Path) -> None:
        """Until this process sees a file that the first one has written: file systems of several
        nodes may take a while.

        Raises FileNotFoundError if it does not come.
        """
        began = time.monotonic()
        while not self.alone and not path.exists():
            if time.monotonic() - began > SEEN_WITHIN:
                raise FileNotFoundError(
                    f"the first process has written {path}, and this one does not see it: give a folder on a "
                    "file system that all share"
                )
            time.sleep(0.1)

    def tell(self, make: Callable[[], str]) -> str:
        """What `make` returns in the first process, for all; the others wait."""
        told = [make() if self.first else None]
        if not self.alone:
            dist.broadcast_object_list(told, 0)
        return told[0]

    def end(self) -> None:
        """Take leave of the others. Nothing of the team works afterwards."""
        if not self.alone:
            dist.destroy_process_group()


ALONE = Team()


def latent_dim(name: str) -> int | None:
    """The dimension of latents of a tensor of a run, by its name, such as "adam.exp_avg_sq.W_enc";
    None: it has none."""
    last = name.rpartition(".")[2]
    return (
        1
        if last == "W_enc"
        else None
        if last in ("b_dec", "b_in", "batch_threshold", "generator")
        else 0
    )


def start(latents: int = 1, device: str | None = None) -> Team:
    """The team of the processes that torchrun started, `latents` of them along that dimension;
    alone without torchrun.

    device: "cuda" (the default where there is one; each process takes the one of its local rank) or
    "cpu", with gloo. Raises ValueError if the number of processes is no multiple of `latents`, or
    they were not started by torchrun.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if latents < 1 or world % latents:
        raise ValueError(
            f"{world} processes cannot be dealt into {latents} along latents: give torchrun a multiple of it"
        )
    if world == 1:
        return ALONE
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError(
            "WORLD_SIZE is set, and not by torchrun: start the processes with torchrun, or unset it"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    where = {}
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("GROUP_WORLD_SIZE") == "1"
    ):
        # torchrun keeps one store for all attempts: without a prefix, a restarted process may find
        # the addresses of the dead. Nodes count their attempts each by itself; on several,
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has torchrun make new ones
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=PATIENCE,
        )
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        where = {"store": store, "rank": int(os.environ["RANK"]), "world_size": world}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE, **where)
    return Team(
        init_device_mesh(device, (world // latents, latents), mesh_dim_names=("data", "latents"))
    )
