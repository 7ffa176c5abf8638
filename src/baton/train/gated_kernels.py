"""Triton kernels of a gated MLP's activation: forward, and backward in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _forward(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=inside).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, both, grad_both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = row * 2 * width + column
    g = tl.load(grad + row * width + column, mask=inside).to(tl.float32)
    gate = tl.load(both + first, mask=inside).to(tl.float32)
    up = tl.load(both + first + width, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    # d silu(z) / d z = s(z) (1 + z (1 - s(z)))
    grad_gate = g * up * share * (1 + gate * (1 - share))
    tl.store(grad_both + first, grad_gate.to(grad_both.dtype.element_ty), mask=inside)
    tl.store(grad_both + first + width, (g * silu).to(grad_both.dtype.element_ty), mask=inside)
    tl.store(out + row * width + column, (silu * up).to(out.dtype.element_ty), mask=inside)


def forward(both: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `(tokens, 2 * width)`."""
    tokens, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(tokens, width)
    _forward[(tokens, triton.cdiv(width, _BLOCK))](both, out, width, BLOCK=_BLOCK)
    return out


def backward(grad: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `both`, and the product made again."""
    tokens, width = grad.shape
    grad_both, out = torch.empty_like(both), torch.empty_like(grad)
    grid = (tokens, triton.cdiv(width, _BLOCK))
    _backward[grid](grad, both, grad_both, out, width, BLOCK=_BLOCK)
    return grad_both, out
