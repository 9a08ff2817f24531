"""Two layouts of the entries of [batch, d_sae]: all of them, or only those that matter.

The loss and its gradient depend on a set S of entries alone: those that are active, or within the
straight-through window of their threshold (these need a gradient for θ, though they decode to
nothing). A dense step costs 10·d_in·d_sae FLOPs a token (2 to encode, 2 to decode, 6 for the
gradients); on S it costs 2·d_in·d_sae + 8·d_in·|S|, and the gradients are the same ones. That of x
is never formed. `sparse.py` finds S.

:class:`Dense` (plain autograd, the reference) and :class:`Support` have the same methods. A CPU
uses torch's own operations, a GPU the kernels of `kernels.py` if Triton is installed.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels


class Dense:
    """Every entry of [batch, d_sae]: entries are a matrix, gradients come from torch's autograd."""

    dense = True

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        """π = (x − b_dec) W_enc + b_enc, written so that no gradient of x's shape is formed."""
        return x @ W_enc + (b_enc - b_dec @ W_enc)

    def decode(self, entries: Tensor, W_dec: Tensor) -> Tensor:
        """entries · W_dec, [batch, d_in]."""
        return entries @ W_dec

    def at(self, latents: Tensor) -> Tensor:
        """A quantity of each latent, [d_sae], where it meets the entries."""
        return latents

    def per_token(self, entries: Tensor) -> Tensor:
        """Sums over latents, [batch]."""
        return entries.sum(-1)

    def per_latent(self, entries: Tensor) -> Tensor:
        """Means over tokens, [d_sae]."""
        return entries.mean(0)


class ByToken(NamedTuple):
    """A support's entries in the order of tokens, int32: their positions in the order of latents,
    [n]; where each token's begin, and the end of the last, [batch + 1]; the latent of each, [n]."""

    order: Tensor
    start: Tensor
    latent: Tensor


class Support:
    """Some entries of [batch, d_sae]: a vector of n of them, latent by latent; all others count as
    zero.

    start: int32 [d_sae + 1], where each latent's entries begin, and the end; token: int32 [n];
    shape: (batch, d_sae); pre: pre-activations, [n], if known; triton: whether kernels are used.
    """

    dense = False

    def __init__(
        self,
        start: Tensor,
        token: Tensor,
        shape: tuple[int, int],
        pre: Tensor | None = None,
        triton: bool = False,
    ):
        self.start, self.token, self.shape = start, token, shape
        self.pre, self.triton = pre, triton
        self._narrowed: tuple[Tensor, Tensor, Support] | None = None

    def __len__(self) -> int:
        return len(self.token)

    @cached_property
    def latent(self) -> Tensor:
        """Latent of each entry, int32 [n]."""
        latents = torch.arange(self.shape[1], dtype=torch.int32, device=self.start.device)
        return latents.repeat_interleave(self.start.diff(), output_size=len(self))

    @cached_property
    def by_token(self) -> ByToken:
        return ByToken(*transposed(self.start, self.token, self.shape[::-1], self.triton))

    def take(self, index: Tensor) -> Support:
        """The support of the entries at `index`, int64, ascending."""
        start = torch.searchsorted(index, self.start, out_int32=True)
        token = self.token.index_select(0, index)
        pre = None if self.pre is None else self.pre.index_select(0, index)
        return Support(start, token, self.shape, pre, self.triton)

    def nonzero(self, entries: Tensor) -> tuple[Support, Tensor]:
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

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        """π at the entries, [n]; as :meth:`Dense.encode`."""
        return _Encode.apply(x, W_enc, b_enc, b_dec, self)

    def decode(self, entries: Tensor, W_dec: Tensor) -> Tensor:
        return _Decode.apply(entries, W_dec, self)

    def at(self, latents: Tensor) -> Tensor:
        if self.triton:
            return _At.apply(latents, self)
        return latents.index_select(0, self.latent)

    def per_token(self, entries: Tensor) -> Tensor:
        if self.triton:
            order, start, _ = self.by_token
            return _Sums.apply(entries, start, order, self.token)
        return entries.new_zeros(self.shape[0]).index_add(0, self.token, entries)

    def per_latent(self, entries: Tensor) -> Tensor:
        if self.triton:
            return _Sums.apply(entries, self.start, None, self.latent) / self.shape[0]
        return entries.new_zeros(self.shape[1]).index_add(0, self.latent, entries) / self.shape[0]


DENSE = Dense()
Layout = Dense | Support
"""How the entries of a pass lie; :class:`jumprelu.distributed.Sharded` wraps either of the two."""


def transposed(
    start: Tensor, column: Tensor, shape: tuple[int, int], triton: bool = False
) -> tuple[Tensor, ...]:
    """(order, start, row) of a matrix's entries in the order of its columns, all int32; arguments
    as for :func:`jumprelu.kernels.transposed`."""
    if triton:
        return kernels.transposed(start, column, shape)
    positions = np.arange(len(column), dtype=np.int32)
    rows = scipy.sparse.csr_array((positions, column.numpy(), start.numpy()), shape=shape)
    columns = rows.tocsc()  # a counting sort: several times as fast as sorting
    return tuple(
        torch.from_numpy(array).int() for array in (columns.data, columns.indptr, columns.indices)
    )


# ---- products and sums over entries


def dots(support: Support, rows: Tensor, atoms: Tensor) -> Tensor:
    """⟨rows[token], atoms[latent]⟩ at each entry, [n]; rows: [batch, d_in]; atoms: [d_sae,
    d_in]."""
    if len(support) == 0:
        return rows.new_zeros(0)
    if support.triton:
        return kernels.dots(support.latent, support.token, rows.contiguous(), atoms.contiguous())
    # what torch calls the gradient of an embedding bag with respect to the weights of its samples
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        atoms, rows, support.token, support.start[:-1], support.latent, 0
    )


def token_sums(support: Support, entries: Tensor, atoms: Tensor) -> Tensor:
    """Σ over each token's entries of entry · atoms[latent], [batch, d_in]."""
    order, start, latent = support.by_token
    return _bag(start, latent, entries.index_select(0, order), atoms, support.triton)


def latent_sums(support: Support, entries: Tensor, rows: Tensor) -> Tensor:
    """Σ over each latent's entries of entry · rows[token], [d_sae, d_in]."""
    return _bag(support.start, support.token, entries, rows, support.triton)


def _bag(start: Tensor, index: Tensor, weight: Tensor, rows: Tensor, triton: bool) -> Tensor:
    """Σ over each bag's entries of weight · rows[index]."""
    if triton:
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
        if support.pre is not None:
            # another tensor of the same memory: the support must not hold its own graph
            return support.pre.detach()
        return dots(support, centred, W_enc.T) + support.at(b_enc)

    @staticmethod
    @once_differentiable
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
    @once_differentiable
    def backward(ctx, gradient):
        entries, W_dec = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_entries = dots(ctx.support, gradient, W_dec) if ctx.needs_input_grad[0] else None
        to_atoms = None
        if ctx.needs_input_grad[1]:
            support, entries = ctx.support.nonzero(entries)
            to_atoms = latent_sums(support, entries, gradient)
        return to_entries, to_atoms, None


# On a GPU, torch's own sums by index add in whatever order threads come: the next two take them in
# one order.


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents, support):
        ctx.support = support
        return latents.index_select(0, support.latent)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return kernels.totals(ctx.support.start, gradient), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entries, start, order, index):
        ctx.save_for_backward(index)
        return kernels.totals(start, entries if order is None else entries.index_select(0, order))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index), None, None, None
