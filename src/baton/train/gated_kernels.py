"""Triton kernels of a gated MLP's activation, which add what the adapters say on the way.

The product of an adapter's two thin matrices is as large as the activations: written and read by
itself it would cost as much time as the activation does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.train.dropout_kernels import is_kept, threshold_of

# Of the shapes tried these were the fastest on an H200, at ranks of 16 and of 64.
_ROWS = 32
_COLUMNS = 64
_LEAST_RANK = 16  # tl.dot takes no fewer
_SPLITS = 16  # of the tokens, each a program's share of the adapters' gradients


@triton.jit
def _matrix(pointer, rows, columns, size, width, stride):
    """`(rows, columns)` of a row-major matrix; zeros outside."""
    inside = (rows[:, None] < size) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _halves(
    both, thin, b_gate, b_up, row, place, inside, tokens, width, rank,
    RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate and up, float32, with their adapters; and the two halves of `thin`."""
    gate = tl.load(both + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + place + width, mask=inside, other=0.0).to(tl.float32)
    ranks = tl.arange(0, RANK)
    thin_gate = _matrix(thin, row, ranks, tokens, rank, 2 * rank)
    thin_up = _matrix(thin + rank, row, ranks, tokens, rank, 2 * rank)
    gate += tl.dot(thin_gate, b_gate, input_precision=PRECISION)
    up += tl.dot(thin_up, b_up, input_precision=PRECISION)
    return gate, up, thin_gate, thin_up


@triton.jit(do_not_specialize=["tokens"])
def _gate_forward(
    both, thin, b, out, dropped, seed, tokens, width, rank, threshold, grow,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    ranks = tl.arange(0, RANK)
    b_gate = tl.trans(_matrix(b, column, ranks, width, rank, rank))
    b_up = tl.trans(_matrix(b + width * rank, column, ranks, width, rank, rank))
    place = row[:, None] * (2 * width) + column[None, :]
    gate, up, _, _ = _halves(
        both, thin, b_gate, b_up, row, place, inside, tokens, width, rank, RANK, PRECISION
    )
    product = gate * tl.sigmoid(gate) * up
    place = row[:, None] * width + column[None, :]
    tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)
    if DROPS:
        product = tl.where(is_kept(place, tl.load(seed), threshold), product * grow, 0.0)
        tl.store(dropped + place, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "share"])
def _gate_backward(
    grad, grad_down_thin, down_a, both, thin, b, grad_both, grad_down_a, grad_b, seed,
    tokens, share, width, rank, down_rank, threshold, grow,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DOWN_RANK: tl.constexpr,
    PRECISION: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    ranks, down_ranks = tl.arange(0, RANK), tl.arange(0, DOWN_RANK)
    b_gate = tl.trans(_matrix(b, column, ranks, width, rank, rank))
    b_up = tl.trans(_matrix(b + width * rank, column, ranks, width, rank, rank))
    a = _matrix(down_a, down_ranks, column, down_rank, width, width)
    kind: tl.constexpr = b.dtype.element_ty
    sum_a = tl.zeros((DOWN_RANK, COLUMNS), tl.float32)
    sum_gate = tl.zeros((COLUMNS, RANK), tl.float32)
    sum_up = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(part * share, tl.minimum(tokens, (part + 1) * share), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        place = row[:, None] * width + column[None, :]
        grad_thin = _matrix(grad_down_thin, row, down_ranks, tokens, down_rank, down_rank)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        added = tl.dot(grad_thin, a, input_precision=PRECISION)
        if DROPS:
            mask = is_kept(place, tl.load(seed), threshold)
            added = tl.where(mask, added * grow, 0.0)
        g += added
        wide = row[:, None] * (2 * width) + column[None, :]
        gate, up, thin_gate, thin_up = _halves(
            both, thin, b_gate, b_up, row, wide, inside, tokens, width, rank, RANK, PRECISION
        )
        chance = tl.sigmoid(gate)
        silu = gate * chance
        product = silu * up
        if DROPS:
            product = tl.where(mask, product * grow, 0.0)
        sum_a += tl.dot(tl.trans(grad_thin), product.to(kind), input_precision=PRECISION)
        # d silu(z) / d z = s(z) (1 + z (1 - s(z)))
        grad_gate = (g * up * chance * (1 + gate * (1 - chance))).to(kind)
        grad_up = (g * silu).to(kind)
        tl.store(grad_both + wide, grad_gate, mask=inside)
        tl.store(grad_both + wide + width, grad_up, mask=inside)
        sum_gate += tl.dot(tl.trans(grad_gate), thin_gate, input_precision=PRECISION)
        sum_up += tl.dot(tl.trans(grad_up), thin_up, input_precision=PRECISION)
    place = (part * down_rank + down_ranks[:, None]) * width + column[None, :]
    known = (down_ranks[:, None] < down_rank) & (column[None, :] < width)
    tl.store(grad_down_a + place, sum_a, mask=known)
    place = (part * 2 * width + column[:, None]) * rank + ranks[None, :]
    known = (column[:, None] < width) & (ranks[None, :] < rank)
    tl.store(grad_b + place, sum_gate, mask=known)
    tl.store(grad_b + place + width * rank, sum_up, mask=known)


def forward(
    both: torch.Tensor, thin: torch.Tensor, b: torch.Tensor, seed: torch.Tensor | None, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`baton.train.gated.gate`."""
    tokens, width, rank = both.shape[0], both.shape[1] // 2, b.shape[1]
    out = both.new_empty(tokens, width)
    dropped = out if seed is None else torch.empty_like(out)
    grid = (triton.cdiv(width, _COLUMNS), triton.cdiv(tokens, _ROWS))
    _gate_forward[grid](
        both, thin, b, out, dropped, seed, tokens, width, rank, threshold_of(p), 1 / (1 - p),
        ROWS=_ROWS, COLUMNS=_COLUMNS, RANK=_padded(rank), PRECISION=_precision(both),
        DROPS=seed is not None, num_warps=4,
    )  # fmt: skip
    return out, dropped


def backward(
    grad: torch.Tensor,
    grad_down_thin: torch.Tensor,
    down_a: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`baton.train.gated.gate_backward`."""
    (tokens, width), rank, down_rank = grad.shape, b.shape[1], down_a.shape[0]
    padded, down_padded = _padded(rank), _padded(down_rank)
    # More would not fit the registers, beside the sums.
    rows = 2 * _ROWS if max(padded, down_padded) <= 32 else _ROWS
    columns = _COLUMNS if max(padded, down_padded) <= 64 else _COLUMNS // 2
    share = triton.cdiv(triton.cdiv(tokens, rows), _SPLITS) * rows
    parts = triton.cdiv(tokens, share)
    grad_both = torch.empty_like(both)
    grad_down_a = both.new_empty(parts, down_rank, width, dtype=torch.float32)
    grad_b = both.new_empty(parts, 2 * width, rank, dtype=torch.float32)
    _gate_backward[(triton.cdiv(width, columns), parts)](
        grad, grad_down_thin, down_a, both, thin, b, grad_both, grad_down_a, grad_b, seed,
        tokens, share, width, rank, down_rank, threshold_of(p), 1 / (1 - p),
        ROWS=rows, COLUMNS=columns, RANK=padded, DOWN_RANK=down_padded,
        PRECISION=_precision(both), DROPS=seed is not None, num_warps=4,
    )  # fmt: skip
    return grad_both, grad_down_a.sum(0).to(down_a.dtype), grad_b.sum(0).to(b.dtype)


def _padded(rank: int) -> int:
    return max(_LEAST_RANK, int(triton.next_power_of_2(rank)))


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
