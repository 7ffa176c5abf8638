"""Dropout whose mask is a hash of each value's place: nothing is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch

from baton.train.launchable import HAS_TRITON, can_launch

kernels: Any = None
if HAS_TRITON:
    from baton.train import dropout_kernels as kernels

_WORD = 0xFFFFFFFF


class HashDropout(torch.nn.Module):  # type: ignore[misc]
    """Dropout in compiled layers: cheap to compile, cheap to make again.

    The compiler's own random numbers (Philox) take longer than moving the values does.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        seed = new_seed(1, x.device)
        # Wellons' lowbias32, in arithmetic of 32 signed bits that wraps. The seed comes first:
        # products of a bare index the compiler works out by itself, in wider numbers.
        word = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + seed
        word = (word ^ ((word >> 16) & 0xFFFF)) * 0x7FEB352D
        word = (word ^ ((word >> 15) & 0x1FFFF)) * -0x7B935975
        word = word ^ ((word >> 16) & 0xFFFF)
        kept = (word & 0xFFFFFF) >= int(self.p * (1 << 24))
        return torch.where(kept, x * (1 / (1 - self.p)), 0.0)


def new_seed(count: int, device: torch.device) -> torch.Tensor:
    """`(count,)` int32 random numbers of the device's generator."""
    return torch.randint(2**31 - 1, (count,), dtype=torch.int32, device=device)


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Zero a share `p` of `x` and divide the rest by `1 - p`; the same again with the same seed.

    Args:
        x: any shape, contiguous.
        seed: `(1,)` integer on the device of `x`.
    """
    if can_launch(x):
        dropped: torch.Tensor = kernels.drop(x, seed, p)
        return dropped
    return torch.where(kept(x.shape, seed, p), x * (1 / (1 - p)), 0.0)


def drop_product(
    x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, p: float, first: int = 0
) -> torch.Tensor:
    """`drop(x) @ a.T`, `(tokens, rank)`, without making what is dropped.

    Args:
        x: `(tokens, width)`, any row stride: rows from `first` on of what `drop` would take.
        a: `(rank, width)`, any row stride.
        seed: `(1,)` integer on the device of `x`.
    """
    if can_launch(x):
        made: torch.Tensor = kernels.drop_product(x, a, seed, p, first)
        return made
    return torch.where(kept(x.shape, seed, p, first), x * (1 / (1 - p)), 0.0) @ a.T


def kept(shape: torch.Size, seed: torch.Tensor, p: float, first: int = 0) -> torch.Tensor:
    """Which values `drop` keeps, as the kernels compute it: of rows from `first` on."""
    start = first * shape[1:].numel()
    place = torch.arange(start, start + shape.numel(), device=seed.device).view(shape)
    word = place * 0x9E3779B1 + seed & _WORD
    word = (word ^ (word >> 16)) * 0x7FEB352D & _WORD
    word = (word ^ (word >> 15)) * 0x846CA68B & _WORD
    return (word ^ (word >> 16)) >= int(p * 2**32)
