"""A gated MLP, `down(silu(gate) * up)`, with LoRA: few passes over memory, and little kept.

What gate and up are without their adapters is kept; the rest is made again in the backward pass,
where one Triton kernel adds the adapters, gives the gradient of both halves and sums those of
the adapters on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from baton.train import quantize
from baton.train.dropout import drop, kept
from baton.train.launchable import HAS_TRITON, can_launch

kernels: Any = None
if HAS_TRITON:
    from baton.train import gated_kernels as kernels

# Beyond it the kernels' tiles do not fit a GPU's registers.
MOST_RANK = 128


def gate(
    both: torch.Tensor, thin: torch.Tensor, b: torch.Tensor, seed: torch.Tensor | None, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu(gate) * up`, `(tokens, width)`, and the same as the next adapter reads it: dropped.

    Args:
        both: `(tokens, 2 * width)`: gate, then up, without their adapters.
        thin: `(tokens, 2 * rank)`: what the A of each makes of the input.
        b: `(2 * width, rank)`: their B, scaled.
        seed: of the dropout, `(1,)`; None without.
        p: the share that is dropped.
    """
    if can_launch(both):
        made: tuple[torch.Tensor, torch.Tensor] = kernels.forward(both, thin, b, seed, p)
        return made
    first, second = _halves(both, thin, b)
    product = (torch.nn.functional.silu(first) * second).to(both.dtype)
    return product, product if seed is None else drop(product, seed, p)


def gate_backward(
    grad: torch.Tensor,
    grad_down_thin: torch.Tensor,
    down_a: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `both`, `down_a` and `b`.

    Args:
        grad: `(tokens, width)`: of the product, without what comes through the next adapter.
        grad_down_thin: `(tokens, down_rank)`: of what that adapter's A makes of the product.
        down_a: `(down_rank, width)`.
        both, thin, b, seed, p: as for `gate`.
    """
    if can_launch(both):
        made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = kernels.backward(
            grad, grad_down_thin, down_a, both, thin, b, seed, p
        )
        return made
    first, second = _halves(both, thin, b)
    share = torch.sigmoid(first)
    silu = first * share
    product, added = silu * second, (grad_down_thin @ down_a).to(first.dtype)
    if seed is not None:
        mask = kept(product.shape, seed, p).to(first.dtype) / (1 - p)
        product, added = product * mask, added * mask
    wide = grad.to(first.dtype) + added
    slope = share * (1 + first * (1 - share))
    grads = [(wide * second * slope).to(both.dtype), (wide * silu).to(both.dtype)]
    grad_b = [part.T @ half for part, half in zip(grads, thin.chunk(2, 1), strict=True)]
    return torch.cat(grads, 1), grad_down_thin.T @ product.to(both.dtype), torch.cat(grad_b)


def _halves(
    both: torch.Tensor, thin: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up with their adapters, in float32 at least."""
    wide = torch.promote_types(both.dtype, torch.float32)
    first, second = (
        half.to(wide) + (part @ rows.T).to(wide)
        for half, part, rows in zip(both.chunk(2, 1), thin.chunk(2, 1), b.chunk(2, 0), strict=True)
    )
    return first, second


@torch.library.custom_op("baton::gated_mlp", mutates_args=())
def gated_mlp(
    x: torch.Tensor,
    halves: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    weight: Sequence[torch.Tensor],
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    seeds: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The MLP's output, `(tokens, in)`, and what its backward pass needs besides.

    Args:
        x: `(tokens, in)`.
        halves: gate's weight above up's, `(2 * width, in)`, dense or the parts of an NF4 one.
        a: `(2 * rank, in)`: the A of gate, then of up.
        b: `(2 * width, rank)`: their B, scaled.
        weight: of down, `(in, width)`.
        down_a: `(down_rank, width)`; `down_b`: `(in, down_rank)`, scaled.
        seeds: `(2,)` of the adapters' dropout; None without.
        p: the share that is dropped.

    Returns:
        The output; gate and up without adapters, `(tokens, 2 * width)`; and the products of the
        inputs with `a` and `down_a`.
    """
    read = x if seeds is None else drop(x, seeds[:1], p)
    thin = read @ a.T
    both = x @ quantize.dense(halves, b.shape[0], x.shape[1], x.dtype).T
    product, dropped = gate(both, thin, b, None if seeds is None else seeds[1:], p)
    down_thin = dropped @ down_a.T
    out = down_thin @ down_b.T
    # Added in the product's own epilogue: the thin result costs no pass of its own.
    out.addmm_(product, quantize.dense(weight, down_b.shape[0], down_a.shape[1], x.dtype).T)
    return out, both, thin, down_thin


@gated_mlp.register_fake
def _(
    x: torch.Tensor,
    halves: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    weight: Sequence[torch.Tensor],
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    seeds: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = x.shape[0]
    widths = down_b.shape[0], b.shape[0], a.shape[0], down_a.shape[0]
    out, both, thin, down_thin = (x.new_empty(tokens, width) for width in widths)
    return out, both, thin, down_thin


@torch.library.custom_op("baton::gated_mlp_backward", mutates_args=())
def _gated_mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    down_thin: torch.Tensor,
    halves: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    weight: Sequence[torch.Tensor],
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    seeds: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x`, `a`, `b`, `down_a` and `down_b`."""
    grad_down_thin = grad @ down_b
    grad_product = grad @ quantize.dense(weight, grad.shape[1], down_a.shape[1], grad.dtype)
    grad_both, grad_down_a, grad_b = gate_backward(
        grad_product, grad_down_thin, down_a, both, thin, b, None if seeds is None else seeds[1:], p
    )
    del grad_product
    grad_thin = grad_both @ torch.block_diag(*b.chunk(2))
    grad_x, read = grad_thin @ a, x
    if seeds is not None:
        grad_x, read = drop(grad_x, seeds[:1], p), drop(x, seeds[:1], p)
    grad_x.addmm_(grad_both, quantize.dense(halves, b.shape[0], a.shape[1], grad.dtype))
    return grad_x, grad_thin.T @ read, grad_b, grad_down_a, grad.T @ down_thin


@_gated_mlp_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    down_thin: torch.Tensor,
    halves: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    weight: Sequence[torch.Tensor],
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    seeds: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = [torch.empty_like(value) for value in (x, a, b, down_a, down_b)]
    return made[0], made[1], made[2], made[3], made[4]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, halves, a, b, weight, down_a, down_b, seeds, ctx.p = inputs
    ctx.parts = len(halves)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], a, b, down_a, down_b, seeds, *halves, *weight)


def _backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    x, both, thin, down_thin, a, b, down_a, down_b, seeds, *weights = ctx.saved_tensors
    halves, weight = weights[: ctx.parts], weights[ctx.parts :]
    grad_x, grad_a, grad_b, grad_down_a, grad_down_b = _gated_mlp_backward(
        grad.contiguous(), x, both, thin, down_thin, halves, a, b, weight, down_a, down_b, seeds,
        ctx.p,
    )  # fmt: skip
    nothing = [None] * len(halves), [None] * len(weight)
    return grad_x, nothing[0], grad_a, grad_b, nothing[1], grad_down_a, grad_down_b, None, None


gated_mlp.register_autograd(_backward, setup_context=_save)
