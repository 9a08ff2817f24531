"""Exact sparse encoding and decoding: after the encoder's matmul, only entries that matter are
computed.

Of the [batch, d_sae] pre-activations, the loss and its gradient depend on a set S alone: entries
that are active, or within the straight-through window of their threshold. A dense step costs
10·d_in·d_sae FLOPs a token (2 to encode, 2 to decode, 6 for the gradients); on S it costs
2·d_in·d_sae + 8·d_in·|S|, and the gradients are the same ones.

Notable here:
- two layouts with the same five methods, :class:`Dense` (plain autograd, the reference) and
  :class:`Support`, so that architectures and losses are written once.
- an inactive latent inside the window needs a gradient for θ: it is in S, though it decodes to
  nothing.
- the gradient of x is never formed: nothing before an SAE is trained.
- what a CPU does with torch's own operations, a GPU does with the kernels of `kernels.py`, where
  Triton is there.
- :func:`screen` may look for S in bfloat16. It lowers the bar by what rounding can hide, and
  computes what it found again in float32: S can only be larger than needed, and no value comes from
  bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch

from . import kernels

CHUNK, GPU_CHUNK = 2**21, 2**27
"""Pre-activations in memory at a time: few enough for a cache, many enough for a matmul at full
speed. A GPU is waited for once for each."""

DENSE_ABOVE, GPU_DENSE_ABOVE = 0.15, 0.08
"""Share of entries in S above which the dense step is the faster one; for a GPU an estimate, not
measured."""

BF16_BELOW = 0.03
"""Share of entries up to which looking in bfloat16 is worth computing what was found once more;
both measured in notebook 10."""


class Dense:
    """Every entry of [batch, d_sae]: entries are a matrix, gradients come from torch's autograd."""

    def encode(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor
    ) -> torch.Tensor:
        """π = (x − b_dec) W_enc + b_enc, written so that no gradient of x's shape is formed."""
        return x @ W_enc + (b_enc - b_dec @ W_enc)

    def decode(self, entries: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        """entries · W_dec, [batch, d_in]."""
        return entries @ W_dec

    def at(self, latents: torch.Tensor) -> torch.Tensor:
        """What belongs to latents, [d_sae], where it meets entries."""
        return latents

    def per_token(self, entries: torch.Tensor) -> torch.Tensor:
        """Sums over latents, [batch]."""
        return entries.sum(-1)

    def per_latent(self, entries: torch.Tensor) -> torch.Tensor:
        """Means over tokens, [d_sae]."""
        return entries.mean(0)


class ByToken(NamedTuple):
    """A support's entries in the order of tokens."""

    order: torch.Tensor
    """Their positions in the order of latents: int32 [n]."""
    start: torch.Tensor
    """Where each token's entries begin, and the end of the last: int32 [batch + 1]."""
    latent: torch.Tensor
    """Latent of each: int32 [n]."""


class Support:
    """Some entries of [batch, d_sae]: a vector of n of them, latent by latent; what is not in it
    counts as zero.

    start: int32 [d_sae + 1], where each latent's entries begin, and the end; token: int32 [n];
    shape: (batch, d_sae). pre: the pre-activations there, [n], if they are known.
    """

    def __init__(
        self,
        start: torch.Tensor,
        token: torch.Tensor,
        shape: tuple[int, int],
        pre: torch.Tensor | None = None,
    ):
        self.start, self.token, self.shape, self.pre = start, token, shape, pre
        self._narrowed: tuple[torch.Tensor, torch.Tensor, Support] | None = None

    def __len__(self) -> int:
        return len(self.token)

    @cached_property
    def latent(self) -> torch.Tensor:
        """Latent of each entry, int32 [n]."""
        latents = torch.arange(self.shape[1], dtype=torch.int32, device=self.start.device)
        return latents.repeat_interleave(self.start.diff(), output_size=len(self))

    @cached_property
    def by_token(self) -> ByToken:
        return ByToken(*_transposed(self.start, self.token, self.shape[::-1]))

    def take(self, index: torch.Tensor) -> Support:
        """The support of some of the entries: those at `index`, int64, ascending."""
        start = torch.searchsorted(index, self.start, out_int32=True)
        pre = None if self.pre is None else self.pre.index_select(0, index)
        return Support(start, self.token.index_select(0, index), self.shape, pre)

    def nonzero(self, entries: torch.Tensor) -> tuple[Support, torch.Tensor]:
        """The support and the values of those `entries` that are not zero; all of them if hardly
        any is zero."""
        kept = entries != 0
        if kept.sum() > 0.75 * len(self):
            return self, entries
        if self._narrowed is None or not torch.equal(kept, self._narrowed[0]):
            index = kept.nonzero().squeeze(-1)
            self._narrowed = kept, index, self.take(index)
        _, index, support = self._narrowed
        return support, entries.index_select(0, index)

    def encode(
        self, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor
    ) -> torch.Tensor:
        """π at the entries, [n]; as :meth:`Dense.encode`."""
        return _Encode.apply(x, W_enc, b_enc, b_dec, self)

    def decode(self, entries: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        return _Decode.apply(entries, W_dec, self)

    def at(self, latents: torch.Tensor) -> torch.Tensor:
        if kernels.serves(latents):
            return _At.apply(latents, self)
        return latents.index_select(0, self.latent)

    def per_token(self, entries: torch.Tensor) -> torch.Tensor:
        if kernels.serves(entries):
            return _PerToken.apply(entries, self)
        return entries.new_zeros(self.shape[0]).index_add(0, self.token, entries)

    def per_latent(self, entries: torch.Tensor) -> torch.Tensor:
        if kernels.serves(entries):
            return _PerLatent.apply(entries, self) / self.shape[0]
        return entries.new_zeros(self.shape[1]).index_add(0, self.latent, entries) / self.shape[0]


def _transposed(
    start: torch.Tensor, column: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    """(order, start, row) of a matrix's entries in the order of its columns, all int32."""
    if kernels.serves(column):
        return kernels.transposed(start, column, shape)
    positions = np.arange(len(column), dtype=np.int32)
    rows = scipy.sparse.csr_array((positions, column.numpy(), start.numpy()), shape=shape)
    columns = rows.tocsc()  # a counting sort: several times as fast as sorting
    return tuple(
        torch.from_numpy(array).int() for array in (columns.data, columns.indptr, columns.indices)
    )


# ---- three kernels


def dots(support: Support, rows: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """⟨rows[token], atoms[latent]⟩ at each entry, [n]; rows: [batch, d_in]; atoms: [d_sae,
    d_in]."""
    if len(support) == 0:
        return rows.new_zeros(0)
    if kernels.serves(rows):
        return kernels.dots(support.latent, support.token, rows.contiguous(), atoms.contiguous())
    # what torch calls the gradient of an embedding bag with respect to the weights of its samples
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        atoms, rows, support.token, support.start[:-1], support.latent, 0
    )


def token_sums(support: Support, entries: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """Σ over each token's entries of entry · atoms[latent], [batch, d_in]."""
    order, start, latent = support.by_token
    return _bag(start, latent, entries.index_select(0, order), atoms)


def latent_sums(support: Support, entries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Σ over each latent's entries of entry · rows[token], [d_sae, d_in]."""
    return _bag(support.start, support.token, entries, rows)


def _bag(
    start: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Σ over each bag's entries of weight · rows[index]."""
    if kernels.serves(rows):
        return kernels.bag(start, index, weight.contiguous(), rows.contiguous())
    return torch.nn.functional.embedding_bag(
        index, rows, start, mode="sum", include_last_offset=True, per_sample_weights=weight
    )


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, support):
        centred = x - b_dec
        ctx.support = support
        ctx.save_for_backward(centred, W_enc)
        if (
            support.pre is not None
        ):  # another tensor of the same memory: with a gradient, the support would hold its own graph
            return support.pre.detach()
        return dots(support, centred, W_enc.T) + support.at(b_enc)

    @staticmethod
    def backward(ctx, gradient):
        centred, W_enc = ctx.saved_tensors
        support, gradient = ctx.support.nonzero(gradient)
        to_bias = support.per_latent(gradient) * support.shape[0]
        return None, latent_sums(support, gradient, centred).T, to_bias, -(W_enc @ to_bias), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entries, W_dec, support):
        ctx.support = support
        ctx.save_for_backward(entries, W_dec)
        support, entries = support.nonzero(entries)
        return token_sums(support, entries, W_dec)

    @staticmethod
    def backward(ctx, gradient):
        entries, W_dec = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_entries = dots(ctx.support, gradient, W_dec) if ctx.needs_input_grad[0] else None
        to_atoms = None
        if ctx.needs_input_grad[1]:
            support, entries = ctx.support.nonzero(entries)
            to_atoms = latent_sums(support, entries, gradient)
        return to_entries, to_atoms, None


# On a GPU, torch's own sums by index add in whatever order threads come: these three take them in
# one order.


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents, support):
        ctx.support = support
        return latents.index_select(0, support.latent)

    @staticmethod
    def backward(ctx, gradient):
        return kernels.totals(ctx.support.start, gradient), None


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entries, support):
        ctx.support = support
        return kernels.totals(
            support.by_token.start, entries.index_select(0, support.by_token.order)
        )

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.support.token), None


class _PerLatent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entries, support):
        ctx.support = support
        return kernels.totals(support.start, entries)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.support.latent), None


# ---- finding S


def usable(x: torch.Tensor) -> bool:
    """Whether there are sparse operations for tensors that are where this one is: on a CPU, and on
    a GPU with Triton."""
    return x.device.type == "cpu" or kernels.serves(x)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32 (GPUs; CPUs with AMX or
    AVX512-BF16), else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if known.get("amx_bf16") or known.get("avx512_bf16") else torch.float32


@torch.no_grad()
def screen(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    low: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    limit: float = 1.0,
) -> Support | None:
    """The support of entries with π = x W_enc + b_enc > low, and π there; None if it would hold
    more than `limit` of all, or of the latents looked at first.

    x: [batch, d_in], centred; W_enc: [d_in, d_sae]; b_enc, low: [d_sae]. dtype: of the search.
    Neither the support nor π depend on it, but for float32's own rounding.
    """
    batch, d_sae = len(x), W_enc.shape[1]
    if dtype == torch.bfloat16:
        # one column more adds what rounding can hide, another b_enc − low, both rounded up, so that
        # π > low ⇒ entry > 0:
        # |xw − x̃w̃| ≤ (‖x − x̃‖ + 2⁻⁸‖x̃‖)‖w‖. The sign of a bfloat16 is that of its bits read as an integer
        rounded = x.to(dtype).float()
        slack = (x - rounded).norm(dim=-1, keepdim=True)
        slack += (2.0**-8 + x.shape[1] * 2.0**-23) * rounded.norm(
            dim=-1, keepdim=True
        )  # the latter of float32 sums
        offset = (b_enc - low).unsqueeze(-1)
        rows = _bf16(x, slack * 1.01, torch.ones_like(slack))
        atoms = _bf16(
            W_enc.T, W_enc.norm(dim=0).unsqueeze(-1) * 1.01, offset + offset.abs() * 2.0**-7
        )
    else:
        rows, atoms, bar = (
            x,
            W_enc.T,
            (low - b_enc).unsqueeze(-1),
        )  # π > low  ⇔  x W_enc > low − b_enc
    tokens, products, ends, total = [], [], [torch.zeros(1, dtype=torch.int32, device=x.device)], 0
    for first, chunk, over in _chunks(
        rows, d_sae, batch, d_sae // 64 * 8 if limit < 1 else 0
    ):  # [some latents, batch]
        with _sums_in_float32():
            torch.mm(atoms[first : first + len(chunk)], rows.T, out=chunk)
        if kernels.serves(x):
            level = None if dtype == torch.bfloat16 else bar[first : first + len(chunk)].flatten()
            found = kernels.compact(chunk, level, int(limit * batch * (first + len(chunk))) - total)
            if found is None:
                return None
            start, token, product = found
            ends.append(start[1:] + total)
            total += len(token)
            tokens.append(token), products.append(product)
            continue
        if dtype == torch.bfloat16:
            torch.gt(chunk.view(torch.int16), 0, out=over)
        else:
            torch.gt(chunk, bar[first : first + len(chunk)], out=over)
        # to list too much costs more than anything else, so it is counted first; the latents come
        # in no particular order
        if total + int(over.count_nonzero()) > limit * batch * (first + len(chunk)):
            return None
        flat = _positions(over)
        ends.append(
            torch.searchsorted(flat, torch.arange(1, len(chunk) + 1) * batch, out_int32=True)
            + total
        )
        total += len(flat)
        tokens.append((flat % batch).int())
        if dtype != torch.bfloat16:
            products.append(chunk.view(-1).index_select(0, flat))
    support = Support(torch.cat(ends), torch.cat(tokens), (batch, d_sae))
    if dtype == torch.bfloat16:
        support.pre = dots(support, x, W_enc.T) + support.at(b_enc)
        return support.take((support.pre > support.at(low)).nonzero().squeeze(-1))
    support.pre = torch.cat(products) + support.at(b_enc)
    return support


def top(
    rows: torch.Tensor, k: int, buckets: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, index) of the `k` largest of each row, in no particular order, [n, k] each; rows:
    [n, d_sae].

    buckets: column i is dealt into bucket i mod `buckets`, k ≤ buckets ≤ d_sae; each bucket gives
    its largest, and these are the k largest of those. That misses a column only where a larger one
    of the true k shares its bucket; None: exact. Source: Chern et al. 2022 (arXiv 2206.14286),
    whose reduction on TPUs this is.
    """
    if buckets is None:
        return rows.topk(k, dim=-1, sorted=False)
    d_sae = rows.shape[-1]
    with torch.no_grad():
        whole = d_sae - d_sae % buckets
        best = rows[:, :whole].unflatten(-1, (-1, buckets)).amax(1)
        best[:, : d_sae - whole] = best[:, : d_sae - whole].maximum(rows[:, whole:])
        bucket = best.topk(k, dim=-1, sorted=False).indices
        # who gave it is asked only of the buckets that are kept: an argmax over all would cost as
        # much as the exact search
        first = bucket.unsqueeze(1)
        members = first + torch.arange(0, d_sae, buckets, device=rows.device).unsqueeze(
            -1
        )  # [n, of a bucket, k]
        members = torch.where(members < d_sae, members, first)  # some buckets have one fewer
        theirs = rows.gather(-1, members.flatten(1)).view(members.shape)
        index = torch.where(theirs == theirs.amax(1, keepdim=True), members, first).amax(1)
    return rows.gather(-1, index), index


@torch.no_grad()
def largest(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int, buckets: int | None = None
) -> Support:
    """The support of each token's `k` largest pre-activations, and π there; arguments as for
    :func:`screen` and :func:`top`."""
    batch, d_sae = len(x), W_enc.shape[1]
    values, latents = [], []
    for first, chunk, _ in _chunks(x, batch, d_sae):  # [some tokens, d_sae]
        found, index = top(
            torch.addmm(b_enc, x[first : first + len(chunk)], W_enc, out=chunk), k, buckets
        )
        values.append(found.flatten()), latents.append(index.flatten().int())
    each = torch.arange(0, batch * k + 1, k, dtype=torch.int32, device=x.device)
    order, start, token = _transposed(each, torch.cat(latents), (batch, d_sae))
    return Support(start, token, (batch, d_sae), torch.cat(values).index_select(0, order))


def _bf16(matrix: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """`matrix` with more columns, each [rows, 1], in bfloat16; on a GPU, with zeros up to a
    multiple of 8, as matmuls want it."""
    width = matrix.shape[1]
    more = len(columns) + (-(width + len(columns)) % 8 if matrix.is_cuda else 0)
    out = torch.empty(len(matrix), width + more, dtype=torch.bfloat16, device=matrix.device)
    out[:, :width], out[:, width + len(columns) :] = matrix, 0
    out[:, width : width + len(columns)] = torch.cat(columns, -1)
    return out


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """A GPU's bfloat16 products summed in float32 throughout, as the bound on their rounding
    assumes."""
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


_memory = threading.local()


def _chunks(
    like: torch.Tensor, rows: int, columns: int, ahead: int = 0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """A matrix of [rows, columns] by blocks of rows: (first row, room for the block, room for a
    mask of it).

    like: a tensor of the type and on the device wanted. ahead: rows of a smaller block that comes
    first, after which a caller may give up; 0: none. On a GPU there is no mask. It is always the
    same memory. To ask for new memory can cost more than the matmul that fills it: the system
    clears every page at its first use.
    """
    size = min(rows, max(1, (GPU_CHUNK if like.is_cuda else CHUNK) // max(1, columns)))
    # memory of inference mode cannot be written to outside of it
    key = size, columns, like.dtype, like.device, torch.is_inference_mode_enabled()
    if getattr(_memory, "key", None) != key:
        _memory.chunk = torch.empty(size, columns, dtype=like.dtype, device=like.device)
        _memory.mask = torch.empty(0 if like.is_cuda else size, columns, dtype=torch.bool)
        _memory.key = key
    ahead = min(ahead, size)
    if ahead:
        yield 0, _memory.chunk[:ahead], _memory.mask[:ahead]
    for first in range(ahead, rows, size):
        yield first, _memory.chunk[: rows - first], _memory.mask[: rows - first]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Where the flattened `mask` is true, in order, int64: as `nonzero`, but looking at eight at a
    time first."""
    flat = mask.view(-1)
    if len(flat) % 8:
        return flat.nonzero().squeeze(-1)
    words = flat.view(torch.int64)
    word = words.nonzero().squeeze(-1)
    within = words[word].view(torch.bool).nonzero().squeeze(-1)
    return (word.index_select(0, within >> 3) << 3) + (within & 7)
