"""Triton kernels of dropout by a hash of each value's place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.train.dot import padded, precision_of

_BLOCK = 2048
_ROWS, _COLUMNS = 32, 64  # of a product's tiles


@triton.jit
def is_kept(index, seed, threshold):
    """A hash of 32 bits (Wellons' lowbias32) against the rate of dropout."""
    x = index.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >= threshold


@triton.jit
def _drop(x, out, seed, size, threshold, grow, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(x + place, mask=inside).to(tl.float32)
    value = tl.where(is_kept(place, tl.load(seed), threshold), value * grow, 0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """`baton.train.dropout.drop` of a contiguous tensor on a GPU."""
    out, size = torch.empty_like(x), x.numel()
    grid = (triton.cdiv(size, _BLOCK),)
    _drop[grid](x, out, seed, size, threshold_of(p), 1 / (1 - p), BLOCK=_BLOCK)
    return out


@triton.jit(do_not_specialize=["first", "tokens"])
def _drop_product(
    x, a, out, seed, first, tokens, width, rank, x_stride, a_stride, threshold, grow,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    number = tl.load(seed)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        place = x + row[:, None] * x_stride + column[None, :]
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        index = (first + row[:, None]) * width + column[None, :]
        value = tl.where(is_kept(index, number, threshold), value * grow, 0.0)
        known = (column[:, None] < width) & (ranks[None, :] < rank)
        part = tl.load(a + ranks[None, :] * a_stride + column[:, None], mask=known, other=0.0)
        total += tl.dot(value.to(part.dtype), part, input_precision=PRECISION)
    known = (row[:, None] < tokens) & (ranks[None, :] < rank)
    tl.store(out + row[:, None] * rank + ranks[None, :], total.to(out.dtype.element_ty), mask=known)


def drop_product(
    x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, p: float, first: int
) -> torch.Tensor:
    """`baton.train.dropout.drop_product` on a GPU."""
    (tokens, width), rank = x.shape, len(a)
    out = x.new_empty(tokens, rank)
    _drop_product[(triton.cdiv(tokens, _ROWS),)](
        x, a, out, seed, first, tokens, width, rank, x.stride(0), a.stride(0), threshold_of(p),
        1 / (1 - p), ROWS=_ROWS, COLUMNS=_COLUMNS, RANK=padded(rank),
        PRECISION=precision_of(x), num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def threshold_of(p: float) -> int:
    """The least hash that is kept."""
    return int(p * 2**32)
