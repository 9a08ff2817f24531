"""Finding S: the entries of [batch, d_sae] that a pass needs, after the encoder's matmul. What is
then done with them is in `support.py`.

:func:`screen` may look for S in bfloat16. It lowers the bar by what rounding can hide, and computes
what it found again in float32: S can only be larger than needed, and no value comes from bfloat16.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .support import Support, dots, transposed


@dataclass(frozen=True)
class SparsePolicy:
    """When a pass computes only the entries of S, and how it looks for them; results change to
    rounding only. Defaults for CPUs were measured, those for GPUs not."""

    dense_above: float = 0.2
    """Share of entries in S above which a dense step is the faster; 0: every step is dense. Sparse
    and dense steps take the same time at 0.11 (d_sae 1,024) and 0.20 (4,096) on a CPU with AVX-512,
    at 0.16 and above 0.21 on one with AMX: figures/benchmark_density.csv."""
    bf16_below: float = 0.03
    """Share of entries up to which looking in bfloat16 is worth computing what was found again."""
    gpu_bf16_below: float = 0.08
    """The same on a GPU, whose search is in bfloat16 alone: above it, steps are dense."""
    chunk: int = 2**21
    """Pre-activations in memory at a time: few enough for a second-level cache, many enough for a
    matmul at full speed."""
    gpu_chunk: int = 2**27
    """The same on a GPU, which is waited for once for each block."""
    triton: bool | None = None
    """Whether the kernels of `kernels.py` are used, where Triton is installed; None: on a GPU.
    True: also on a CPU, in Triton's interpreter, for tests."""

    def usable(self, x: Tensor) -> bool:
        """Whether there are sparse operations where x is: on a CPU, and on a GPU with Triton."""
        return x.device.type == "cpu" or kernels.serves(x, self.triton)


POLICY = SparsePolicy()


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32 (GPUs; CPUs with AMX or
    AVX512-BF16), else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if known.get("amx_bf16") or known.get("avx512_bf16") else torch.float32


@torch.no_grad()
def screen(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    low: Tensor,
    dtype: torch.dtype = torch.float32,
    limit: float = 1.0,
    policy: SparsePolicy = POLICY,
) -> Support | None:
    """The support of entries with π = x W_enc + b_enc > low, and π there; None if it would hold
    more than `limit` of all, or of the latents looked at first.

    x: [batch, d_in], centred; W_enc: [d_in, d_sae]; b_enc, low: [d_sae]. dtype: of the search,
    float32 or bfloat16. Neither the support nor π depend on it, but for float32's own rounding.
    """
    batch, d_sae = len(x), W_enc.shape[1]
    bf16, triton = dtype == torch.bfloat16, kernels.serves(x, policy.triton)
    if bf16:
        rows, atoms = _with_slack(x, W_enc, b_enc - low)
        bar = torch.zeros_like(b_enc)
    else:
        rows, atoms, bar = x, W_enc.T, low - b_enc  # π > low  ⇔  x W_enc > low − b_enc
    tokens, products, ends, total = [], [], [torch.zeros(1, dtype=torch.int32, device=x.device)], 0
    ahead = d_sae // 64 * 8 if limit < 1 else 0
    for first, chunk, over in _chunks(rows, d_sae, batch, policy, ahead):  # [some latents, batch]
        last = first + len(chunk)
        most = limit * batch * last - total
        with _sums_in_float32():
            torch.mm(atoms[first:last], rows.T, out=chunk)
        if triton:
            found = kernels.compact(chunk, None if bf16 else bar[first:last], int(most))
            if found is None:
                return None
            start, token, product = found
        else:
            if bf16:  # the sign of a bfloat16 is that of its bits read as an integer
                torch.gt(chunk.view(torch.int16), 0, out=over)
            else:
                torch.gt(chunk, bar[first:last].unsqueeze(-1), out=over)
            # to list too much costs more than anything else, so it is counted first; the latents
            # come in no particular order
            if int(over.count_nonzero()) > most:
                return None
            flat = _positions(over)
            row_starts = torch.arange(len(chunk) + 1) * batch
            start = torch.searchsorted(flat, row_starts, out_int32=True)
            token = (flat % batch).int()
            product = None if bf16 else chunk.view(-1).index_select(0, flat)
        ends.append(start[1:] + total)
        total += len(token)
        tokens.append(token)
        products.append(product)
    support = Support(torch.cat(ends), torch.cat(tokens), (batch, d_sae), triton=triton)
    if bf16:
        support.pre = dots(support, x, W_enc.T) + support.at(b_enc)
        return support.take((support.pre > support.at(low)).nonzero().squeeze(-1))
    support.pre = torch.cat(products) + support.at(b_enc)
    return support


def _with_slack(x: Tensor, W_enc: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, atoms) in bfloat16, whose product is above 0 wherever x W_enc + offset is.

    One column more adds what rounding can hide, |xw − x̃w̃| ≤ (‖x − x̃‖ + 2⁻⁸‖x̃‖)‖w‖, another adds the
    offset, [d_sae]; both are rounded up.
    """
    rounded = x.to(torch.bfloat16).float()
    slack = (x - rounded).norm(dim=-1, keepdim=True)
    of_sums = x.shape[1] * 2.0**-23  # of summing in float32
    slack += (2.0**-8 + of_sums) * rounded.norm(dim=-1, keepdim=True)
    offset = offset.unsqueeze(-1)
    norms = W_enc.norm(dim=0).unsqueeze(-1)
    rows = _bf16(x, slack * 1.01, torch.ones_like(slack))
    return rows, _bf16(W_enc.T, norms * 1.01, offset + offset.abs() * 2.0**-7)


def top(rows: Tensor, k: int, buckets: int | None = None) -> tuple[Tensor, Tensor]:
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
        bucket = best.topk(k, dim=-1, sorted=False).indices.unsqueeze(1)
        # which column it was is asked only of the buckets that are kept: an argmax over all would
        # cost as much as the exact search
        places = torch.arange(0, d_sae, buckets, device=rows.device).unsqueeze(-1)
        members = bucket + places  # [n, of a bucket, k]
        members = torch.where(members < d_sae, members, bucket)  # some buckets have one fewer
        values = rows.gather(-1, members.flatten(1)).view(members.shape)
        largest = values == values.amax(1, keepdim=True)
        index = torch.where(largest, members, bucket).amax(1)
    return rows.gather(-1, index), index


@torch.no_grad()
def largest(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    buckets: int | None = None,
    policy: SparsePolicy = POLICY,
) -> Support:
    """The support of each token's `k` largest pre-activations, and π there; arguments as for
    :func:`screen` and :func:`top`."""
    batch, d_sae = len(x), W_enc.shape[1]
    triton = kernels.serves(x, policy.triton)
    values, latents = [], []
    for first, chunk, _ in _chunks(x, batch, d_sae, policy):  # [some tokens, d_sae]
        pre = torch.addmm(b_enc, x[first : first + len(chunk)], W_enc, out=chunk)
        found, index = top(pre, k, buckets)
        values.append(found.flatten())
        latents.append(index.flatten().int())
    starts = torch.arange(0, batch * k + 1, k, dtype=torch.int32, device=x.device)
    order, start, token = transposed(starts, torch.cat(latents), (batch, d_sae), triton)
    pre = torch.cat(values).index_select(0, order)
    return Support(start, token, (batch, d_sae), pre, triton)


def _bf16(matrix: Tensor, *columns: Tensor) -> Tensor:
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
    like: Tensor, rows: int, columns: int, policy: SparsePolicy, ahead: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A matrix of [rows, columns] by blocks of rows: (first row, room for the block, room for a
    mask of it), always in the same memory: the system clears every page of new memory at its first
    use, which can cost more than the matmul that fills it.

    like: a tensor of the type and on the device wanted. ahead: rows of a smaller block that comes
    first, after which a caller may give up; 0: none. On a GPU there is no mask.
    """
    size = policy.gpu_chunk if like.is_cuda else policy.chunk
    size = min(rows, max(1, size // max(1, columns)))
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


def _positions(mask: Tensor) -> Tensor:
    """Where the flattened `mask` is true, in order, int64: as `nonzero`, but looking at eight at a
    time first."""
    flat = mask.view(-1)
    if len(flat) % 8:
        return flat.nonzero().squeeze(-1)
    words = flat.view(torch.int64)
    word = words.nonzero().squeeze(-1)
    within = words[word].view(torch.bool).nonzero().squeeze(-1)
    return (word.index_select(0, within >> 3) << 3) + (within & 7)
