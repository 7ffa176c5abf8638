"""Triton kernels of a gated MLP's activation: each value is read once, and written once at most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.train.dot import padded, precision_of
from baton.train.dropout_kernels import is_kept, threshold_of


@dataclass(frozen=True)
class Tile:
    """What a program takes at once, and by how many warps."""

    rows: int
    columns: int
    warps: int
    stages: int = 3  # of loading ahead


# Of the shapes tried these were the fastest on an H200.
_FORWARD = Tile(16, 128, 4)
_BACKWARD = dict.fromkeys((16, 32, 64), Tile(32, 64, 4, 2)) | {128: Tile(32, 32, 4, 2)}  # by rank
# Of the tokens, each a program's share of the adapters' gradients, by the rank.
_SPLITS = {16: 16, 32: 16, 64: 8, 128: 4}


@triton.jit(do_not_specialize=["tokens"])
def _gate_forward(
    both, out, tokens, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    place = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(both + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + place + width, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    place = row[:, None] * stride + column[None, :]
    tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _matrix(pointer, rows, columns, size, width, stride):
    """`(rows, columns)` of a row-major matrix; zeros outside."""
    inside = (rows[:, None] < size) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _turned(pointer, rows, columns, size, width, stride):
    """The transpose of `_matrix`, `(columns, rows)`."""
    inside = (rows[None, :] < size) & (columns[:, None] < width)
    return tl.load(pointer + rows[None, :] * stride + columns[:, None], mask=inside, other=0.0)


@triton.jit
def _made_once(x):
    """`x`, which the compiler may move to another layout of threads, but not make again for it."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@triton.jit(do_not_specialize=["first", "tokens", "share"])
def _gate_backward(
    grad, grad_thin, down_a, both, thin, grad_down_a, grad_b, seed,
    first, tokens, share, width, rank, down_rank, stride, down_stride, thin_stride, threshold, grow,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DOWN_RANK: tl.constexpr,
    PRECISION: tl.constexpr, DROPS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    ranks, down_ranks = tl.arange(0, RANK), tl.arange(0, DOWN_RANK)
    if DROPS:
        a = _matrix(down_a, down_ranks, column, down_rank, width, width)
    kind: tl.constexpr = both.dtype.element_ty
    sum_a = tl.zeros((DOWN_RANK, COLUMNS), tl.float32)
    sum_gate = tl.zeros((RANK, COLUMNS), tl.float32)
    sum_up = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(part * share, tl.minimum(tokens, (part + 1) * share), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        place = both + row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
        g = _matrix(grad, row, column, tokens, width, stride).to(tl.float32)
        chance = tl.sigmoid(gate)
        silu = gate * chance
        product = silu * up
        if DROPS:
            index = (first + row[:, None]) * width + column[None, :]
            mask = is_kept(index, tl.load(seed), threshold)
            from_down = _matrix(grad_thin, row, down_ranks, tokens, down_rank, down_stride)
            added = tl.dot(from_down, a, input_precision=PRECISION)
            g += tl.where(mask, added * grow, 0.0)
            product = tl.where(mask, product * grow, 0.0)
        # d silu(z) / d z = s(z) (1 + z (1 - s(z)))
        grad_gate = (g * up * (chance + silu - silu * chance)).to(kind)
        grad_up = (g * silu).to(kind)
        product = product.to(kind)
        if ONCE:
            # The sums below want their operands laid out otherwise, for which the compiler would
            # compute all of the above a second time: 56 instructions a value instead of 31.
            product, grad_gate = _made_once(product), _made_once(grad_gate)
            grad_up = _made_once(grad_up)
        tl.store(place, grad_gate, mask=inside)
        tl.store(place + width, grad_up, mask=inside)
        down = _turned(grad_thin, row, down_ranks, tokens, down_rank, down_stride)
        sum_a += tl.dot(down, product, input_precision=PRECISION)
        one = _turned(thin, row, ranks, tokens, rank, thin_stride)
        other = _turned(thin + rank, row, ranks, tokens, rank, thin_stride)
        sum_gate += tl.dot(one, grad_gate, input_precision=PRECISION)
        sum_up += tl.dot(other, grad_up, input_precision=PRECISION)
    place = (part * down_rank + down_ranks[:, None]) * width + column[None, :]
    known = (down_ranks[:, None] < down_rank) & (column[None, :] < width)
    tl.store(grad_down_a + place, sum_a, mask=known)
    place = (part * 2 * rank + ranks[:, None]) * width + column[None, :]
    known = (ranks[:, None] < rank) & (column[None, :] < width)
    tl.store(grad_b + place, sum_gate, mask=known)
    tl.store(grad_b + place + rank * width, sum_up, mask=known)


def forward(both: torch.Tensor, out: torch.Tensor) -> None:
    """`baton.train.gated.gate`."""
    (tokens, width), tile = out.shape, _FORWARD
    grid = (triton.cdiv(width, tile.columns), triton.cdiv(tokens, tile.rows))
    _gate_forward[grid](
        both, out, tokens, width, out.stride(0), ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip


def backward(
    grad: torch.Tensor,
    grad_thin: torch.Tensor,
    down_a: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`baton.train.gated.gate_backward`."""
    (tokens, width), rank, down_rank = grad.shape, thin.shape[1] // 2, down_a.shape[0]
    most = padded(max(rank, down_rank))
    tile = _BACKWARD[most]
    share = triton.cdiv(triton.cdiv(tokens, tile.rows), _SPLITS[most]) * tile.rows
    parts = triton.cdiv(tokens, share)
    grad_down_a = both.new_empty(parts, down_rank, width, dtype=torch.float32)
    grad_b = both.new_empty(parts, 2 * rank, width, dtype=torch.float32)
    _gate_backward[(triton.cdiv(width, tile.columns), parts)](
        grad, grad_thin, down_a, both, thin, grad_down_a, grad_b, seed,
        first, tokens, share, width, rank, down_rank, grad.stride(0), grad_thin.stride(0),
        thin.stride(0), threshold_of(p), 1 / (1 - p),
        ROWS=tile.rows, COLUMNS=tile.columns, RANK=padded(rank), DOWN_RANK=padded(down_rank),
        PRECISION=precision_of(both), DROPS=seed is not None,
        ONCE=both.is_cuda and both.dtype.itemsize == 2 and seed is None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad_down_a.sum(0), grad_b.sum(0)
