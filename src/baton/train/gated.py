"""The second half of a gated MLP, `down(silu(gate) * up)` with LoRA, kept small in memory.

The product of the two halves is made again in the backward pass rather than kept: a third of
what a layer keeps. One Triton kernel then gives the product and both gradients in one pass.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from baton.train import quantize

kernels: Any = None
if importlib.util.find_spec("triton") is not None:
    from baton.train import gated_kernels as kernels


def gate(both: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `(tokens, 2 * width)`, gate first: `(tokens, width)`."""
    if kernels is not None and both.is_cuda:
        product: torch.Tensor = kernels.forward(both)
        return product
    first, second = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(first) * second


def gate_backward(grad: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `both`, and the product made again."""
    if kernels is not None and both.is_cuda:
        made: tuple[torch.Tensor, torch.Tensor] = kernels.backward(grad, both)
        return made
    wide_dtype = torch.promote_types(both.dtype, torch.float32)
    first, second = both.to(wide_dtype).chunk(2, dim=-1)
    share = torch.sigmoid(first)
    silu, wide = first * share, grad.to(wide_dtype)
    slope = share * (1 + first * (1 - share))
    parts = torch.cat([wide * second * slope, wide * silu], dim=-1)
    return parts.to(both.dtype), (silu * second).to(both.dtype)


@torch.library.custom_op("baton::gated_lora", mutates_args=())
def gated_lora(
    both: torch.Tensor, weight: Sequence[torch.Tensor], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ weight.T + x @ a.T @ b.T` and `x @ a.T`, where `x` is `gate(both)`.

    Args:
        both: `(tokens, 2 * in)`.
        weight, a, b: as for `baton.train.stacked`.
    """
    x = gate(both)
    thin = x @ a.T
    out = thin @ b.T
    out.addmm_(x, quantize.dense(weight, b.shape[0], a.shape[1], x.dtype).T)
    return out, thin


@gated_lora.register_fake
def _(
    both: torch.Tensor, weight: Sequence[torch.Tensor], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return both.new_empty(both.shape[0], b.shape[0]), both.new_empty(both.shape[0], a.shape[0])


@torch.library.custom_op("baton::gated_lora_backward", mutates_args=())
def _gated_lora_backward(
    grad: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    weight: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `both`, `a` and `b`."""
    grad_thin = grad @ b
    grad_x = grad_thin @ a
    grad_x.addmm_(grad, quantize.dense(weight, b.shape[0], a.shape[1], grad.dtype))
    grad_both, x = gate_backward(grad_x, both)
    return grad_both, grad_thin.T @ x, grad.T @ thin


@_gated_lora_backward.register_fake
def _(
    grad: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    weight: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(both), torch.empty_like(a), torch.empty_like(b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    both, weight, a, b = inputs
    ctx.save_for_backward(both, output[1], a, b, *weight)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    both, thin, a, b, *weight = ctx.saved_tensors
    grad_both, grad_a, grad_b = _gated_lora_backward(grad.contiguous(), both, thin, weight, a, b)
    return grad_both, [None] * len(weight), grad_a, grad_b


gated_lora.register_autograd(_backward, setup_context=_save)
