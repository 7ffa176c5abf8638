"""Triton kernels of dropout by a hash of each value's place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


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


def threshold_of(p: float) -> int:
    """The least hash that is kept."""
    return int(p * 2**32)
