"""What Triton's `tl.dot` takes, and how exact it is to be."""

from __future__ import annotations

import torch

_LEAST = 16


def padded(rank: int) -> int:
    """The least width of an operand that holds so many ranks: a power of two, 16 at least."""
    return max(_LEAST, 1 << (rank - 1).bit_length())


def precision_of(x: torch.Tensor) -> str:
    """`input_precision` of products of `x`: float32 stays float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
