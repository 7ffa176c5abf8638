"""Triton kernel of a cross-entropy and its gradient, which takes the place of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _cross_entropy(logits, labels, losses, vocabulary, stride, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    column = tl.arange(0, BLOCK)
    # Of each column of the block by itself; they come together after the last.
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        x = tl.load(first + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(tl.maximum(most, x), -1e30)
        total = total * tl.exp(most - higher) + tl.exp(x - higher)
        most = higher
    highest = tl.max(most, 0)
    normaliser = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    label = tl.load(labels + row)
    tl.store(losses + row, normaliser - tl.load(first + label).to(tl.float32))
    tl.debug_barrier()
    for start in range(0, stride, BLOCK):
        place = start + column
        x = tl.load(first + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        # d loss / d logits = softmax - one-hot
        grad = (tl.exp(x - normaliser) - (place == label).to(tl.float32)) * scale
        tl.store(first + place, grad.to(logits.dtype.element_ty), mask=place < stride)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocabulary: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`baton.train.loss`'s, in one kernel; the gradient stands where the logits stood."""
    rows, stride = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, labels, losses, vocabulary, stride, scale, BLOCK=_BLOCK, num_warps=16
    )
    return losses.sum(), logits
