"""Triton kernel that adds what an adapter says to a gradient, without a pass of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.train.dot import padded, precision_of
from baton.train.dropout_kernels import is_kept, threshold_of

_ROWS = 64
_COLUMNS = 128
_MOST_RANK = 64  # more are taken in turns


@triton.jit(do_not_specialize=["tokens"])
def _border_add(
    beside, a, out, seed, tokens, columns, rank, stride, threshold, grow,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < tokens) & (column[None, :] < columns)
    start = beside + row[:, None] * stride
    added = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rank, RANK):
        ranks = first + tl.arange(0, RANK)
        known = (row[:, None] < tokens) & (ranks[None, :] < rank)
        thin = tl.load(start + columns + ranks[None, :], mask=known, other=0.0)
        known = (ranks[:, None] < rank) & (column[None, :] < columns)
        part = tl.load(a + ranks[:, None] * columns + column[None, :], mask=known, other=0.0)
        added += tl.dot(thin, part, input_precision=PRECISION)
    place = row[:, None] * columns + column[None, :]
    if DROPS:
        added = tl.where(is_kept(place, tl.load(seed), threshold), added * grow, 0.0)
    added += tl.load(start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, added.to(out.dtype.element_ty), mask=inside)


def input_gradient(
    beside: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, p: float
) -> torch.Tensor:
    """`baton.train.bordered.input_gradient`."""
    tokens, (rank, columns) = len(beside), a.shape
    out = beside.new_empty(tokens, columns)
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(tokens, _ROWS))
    _border_add[grid](
        beside, a, out, seed, tokens, columns, rank, beside.stride(0), threshold_of(p),
        1 / (1 - p), ROWS=_ROWS, COLUMNS=_COLUMNS, RANK=min(_MOST_RANK, padded(rank)),
        PRECISION=precision_of(beside), DROPS=seed is not None,
        num_warps=4,
    )  # fmt: skip
    return out
