"""Sparse training on a GPU: Triton kernels that find the entries of S, and sum over them.

They compute what `sparse.py`, `support.py` and `optim.py` compute on a CPU. All of them wait for
memory, not for arithmetic, so each says what it moves.

- entries are in compressed rows: `start`, int32 [rows + 1], says where each row's entries begin,
  and the end of the last. There are fewer than 2³¹ of them; offsets into matrices are 64 bits.
- no kernel uses atomics: each output is written once, by one program, in one order. Results are the
  same to the bit from run to run.
- sums are taken in float32, never in TF32; bfloat16 is only ever how a matrix is stored.
- without Triton (macOS, PyTorch for CPUs) :func:`serves` is False. With TRITON_INTERPRET=1 in the
  environment before Triton is imported, the same code runs on a CPU, for tests.

Source: Gao et al. 2024 (arXiv 2406.04093), in an appendix, train SAEs with sparse Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

jit = triton.jit if triton is not None else lambda function: function

ENTRIES = 8
"""Entries that a program works on at a time: so many rows are on their way from memory at once."""

WIDEST = 2**14
"""Columns of a matrix whose rows :func:`adam` can keep at norm 1: a program holds one row in
registers."""


def serves(tensor: Tensor, wanted: bool | None = None) -> bool:
    """Whether the kernels are used for tensors that are where this one is; wanted: as
    :attr:`jumprelu.sparse.SparsePolicy.triton`."""
    return triton is not None and (tensor.is_cuda if wanted is None else wanted)


# ---- finding entries


@jit
def _count(products, bar, counts, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    level = tl.load(bar + row)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        product = tl.load(products + row * columns + column, mask=column < columns, other=0.0).to(
            tl.float32
        )
        found += ((product > level) & (column < columns)).to(tl.int32)
    tl.store(counts + row, tl.sum(found, 0))


@jit
def _list(products, bar, start, column_out, value_out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    level = tl.load(bar + row)
    place = tl.load(start + row)  # of the next entry
    if place < tl.load(start + row + 1):
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            product = tl.load(
                products + row * columns + column, mask=column < columns, other=0.0
            ).to(tl.float32)
            over = (product > level) & (column < columns)
            found = tl.sum(over.to(tl.int32), 0)
            if found > 0:  # most blocks have none, and a running sum costs more than a sum
                ordinal = tl.cumsum(over.to(tl.int32), 0)  # among those of the block, from 1
                tl.store(column_out + place + ordinal - 1, column, mask=over)
                tl.store(value_out + place + ordinal - 1, product, mask=over)
            place += found


def compact(
    products: Tensor, bar: Tensor | None = None, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(start, column, value) of the entries of `products` above their row's bar, row by row,
    columns ascending; None if there are more than `limit`. ValueError at 2³¹ entries.

    products: float32 or bfloat16 [rows, columns]; bar: float32 [rows], or None for zeros. column:
    int32 [n]; value: float32 [n]. Waits for the device once, to learn n. Memory: reads `products`
    once, and once more the rows that have an entry; writes 8 bytes an entry.
    """
    _contiguous(products=products, bar=bar)
    rows, columns = products.shape
    bar = products.new_zeros(rows, dtype=torch.float32) if bar is None else bar
    counts = torch.empty(rows, dtype=torch.int32, device=products.device)
    block = _power_of_two(columns, 1024)
    _launch(_count, (rows,), products, bar, counts, columns, BLOCK=block)
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    n = int(ends[-1])
    if limit is not None and n > limit:
        return None
    if n >= 2**31:
        raise ValueError(f"{n:,} entries: expected fewer than 2³¹; give fewer rows, or a limit")
    start = ends.int()
    column = torch.empty(n, dtype=torch.int32, device=products.device)
    value = torch.empty(n, dtype=torch.float32, device=products.device)
    if n:
        _launch(_list, (rows,), products, bar, start, column, value, columns, BLOCK=block)
    return start, column, value


def transposed(start: Tensor, column: Tensor, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """(order, start, row) of a matrix's entries in the order of its columns, rows ascending, all
    int32. In torch, on any device: a radix sort of n numbers of 32 bits.

    order: their positions in the given order, [n]; start: [columns + 1]; row: of each, [n].
    """
    rows, columns = shape
    ordered, order = column.sort(stable=True)
    ends = torch.arange(columns + 1, dtype=torch.int32, device=column.device)
    column_start = torch.searchsorted(ordered, ends, out_int32=True)
    row = torch.arange(rows, dtype=torch.int32, device=column.device)
    row = row.repeat_interleave(start.diff(), output_size=len(column))
    return order.int(), column_start, row.index_select(0, order)


# ---- sums over entries


@jit
def _bag(start, index, weight, rows, out, width, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(start + target + 1)
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for first in range(tl.load(start + target), last, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        row = tl.load(index + entry, mask=entry < last, other=0).to(tl.int64)
        factor = tl.load(weight + entry, mask=entry < last, other=0.0).to(tl.float32)
        mask = (entry < last)[:, None] & (column < width)[None, :]
        total += factor[:, None] * tl.load(
            rows + row[:, None] * width + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
    tl.store(out + target * width + column, tl.sum(total, 0), mask=column < width)


def bag(start: Tensor, index: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Σ over each bag's entries of weight · rows[index], float32 [bags, width]; zeros where a bag
    is empty.

    start: int32 [bags + 1]; index: int32 [n]; weight: [n]; rows: float32 or bfloat16 [m, width].
    Memory: reads a row an entry; writes `out` once. Programs that run together take the same
    columns of different bags: a slice of `rows` that a cache can hold.
    """
    _contiguous(start=start, index=index, weight=weight, rows=rows)
    bags, width = len(start) - 1, rows.shape[1]
    out = torch.empty(bags, width, dtype=torch.float32, device=rows.device)
    block = _power_of_two(width, 512)
    tensors, sizes = (start, index, weight, rows, out), {"ENTRIES": ENTRIES, "BLOCK": block}
    _launch(_bag, (bags, -(-width // block)), *tensors, width, **sizes)
    return out


@jit
def _totals(start, entries, out, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    last = tl.load(start + target + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(start + target), last, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        total += tl.load(entries + entry, mask=entry < last, other=0.0).to(tl.float32)
    tl.store(out + target, tl.sum(total, 0))


def totals(start: Tensor, entries: Tensor) -> Tensor:
    """Σ of each bag's entries, float32 [bags]; start: int32 [bags + 1]; entries: [n]. Memory: reads
    an entry once."""
    entries = entries.contiguous()
    _contiguous(start=start)
    out = torch.empty(len(start) - 1, dtype=torch.float32, device=entries.device)
    _launch(_totals, (len(out),), start, entries, out, BLOCK=512)
    return out


@jit
def _dots(latent, token, rows, atoms, out, n, width, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    row = tl.load(token + entry, mask=entry < n, other=0).to(tl.int64)[:, None] * width
    atom = tl.load(latent + entry, mask=entry < n, other=0).to(tl.int64)[:, None] * width
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        mask = (entry < n)[:, None] & (column < width)
        left = tl.load(rows + row + column, mask=mask, other=0.0).to(tl.float32)
        total += left * tl.load(atoms + atom + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + entry, tl.sum(total, 1), mask=entry < n)


def dots(latent: Tensor, token: Tensor, rows: Tensor, atoms: Tensor) -> Tensor:
    """⟨rows[token], atoms[latent]⟩ at each entry, float32 [n].

    latent, token: int32 [n]; rows: [batch, width]; atoms: [d_sae, width], each float32 or bfloat16.
    Memory: reads a row an entry, and an atom for every `ENTRIES` where entries are latent by
    latent.
    """
    _contiguous(latent=latent, token=token, rows=rows, atoms=atoms)
    n, width = len(token), rows.shape[1]
    block = _power_of_two(width, 512)
    out = torch.empty(n, dtype=torch.float32, device=rows.device)
    tensors, sizes = (latent, token, rows, atoms, out), {"ENTRIES": ENTRIES, "BLOCK": block}
    _launch(_dots, (-(-n // ENTRIES),), *tensors, n, width, **sizes)
    return out


# ---- the optimiser


@jit
def _adam(
    parameter,
    gradient,
    exp_avg_sq,
    exp_avg,
    size,
    width,
    rate,
    beta1,
    rest1,
    beta2,
    rest2,
    root2,
    eps,
    FIRST_MOMENT: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * width + column
    mask = (column < width) & (place < size)
    p = tl.load(parameter + place, mask=mask, other=0.0)
    g = tl.load(gradient + place, mask=mask, other=0.0)
    if UNIT_NORM:
        g -= tl.sum(g * p, 0) * p
    v = tl.load(exp_avg_sq + place, mask=mask, other=1.0)  # 1: beyond the row, no 0/0 at eps = 0
    v = beta2 * v + rest2 * g * g
    tl.store(exp_avg_sq + place, v, mask=mask)
    m = g
    if FIRST_MOMENT:
        m = beta1 * tl.load(exp_avg + place, mask=mask, other=0.0) + rest1 * g
        tl.store(exp_avg + place, m, mask=mask)
    p -= tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
    if UNIT_NORM:
        p = tl.div_rn(p, tl.sqrt_rn(tl.sum(p * p, 0)))
    tl.store(parameter + place, p, mask=mask)


def adam(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_sq: Tensor,
    exp_avg: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    steps: int,
    unit_norm: bool = False,
) -> None:
    """One update in place, as :meth:`jumprelu.optim.Adam.step` makes it.

    All tensors: float32, of one shape; exp_avg: None for β₁ = 0; steps: counts this one; unit_norm:
    the parameter is [rows, width], width ≤ `WIDEST`, else ValueError. Memory: reads parameter,
    gradient and moments once, writes parameter and moments once: 20 bytes an element, 28 with a
    first moment.
    """
    _contiguous(parameter=parameter, gradient=gradient, exp_avg_sq=exp_avg_sq, exp_avg=exp_avg)
    size, width = parameter.numel(), 1024
    if unit_norm:
        if parameter.ndim != 2 or parameter.shape[1] > WIDEST:
            raise ValueError(
                f"unit_norm is for matrices of at most {WIDEST} columns, got a tensor of shape "
                f"{tuple(parameter.shape)}"
            )
        width = parameter.shape[1]
    block = _power_of_two(width, WIDEST)
    grid = (-(-size // max(1, width)),)
    # bias corrections, and what beta leaves of 1, in double precision: in float32, 1 − 0.999 is off
    # by a hundred-thousandth
    rate, root2 = lr / (1 - betas[0] ** steps), (1 - betas[1] ** steps) ** 0.5
    tensors = parameter, gradient, exp_avg_sq, gradient if exp_avg is None else exp_avg
    numbers = rate, betas[0], 1 - betas[0], betas[1], 1 - betas[1], root2, eps
    options = {"FIRST_MOMENT": exp_avg is not None, "UNIT_NORM": unit_norm, "BLOCK": block}
    warps = min(32, max(4, block // 512))
    _launch(_adam, grid, *tensors, size, width, *numbers, **options, num_warps=warps)


# ---- what all of them need


def _power_of_two(size: int, largest: int) -> int:
    """Triton's blocks are powers of two: the smallest that holds `size`, from 16 to `largest`."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def _contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name}: of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not "
                "contiguous; give its transpose or .contiguous()"
            )


def _launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Run `kernel` on the device of its first argument, which need not be the current one; nothing
    for an empty grid."""
    if 0 not in grid:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **options)
