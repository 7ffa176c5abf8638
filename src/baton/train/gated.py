"""A gated MLP, `down(silu(gate) * up)`, with LoRA: few passes over memory, and little kept.

Gate and up are kept; the rest is made again in the backward pass, where one Triton kernel puts the
gradient of both halves in their place and sums those of the adapters on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch

from baton.train.bordered import Bordered, border_of, input_gradient
from baton.train.dropout import drop, kept
from baton.train.launchable import HAS_TRITON, can_launch

kernels: Any = None
if HAS_TRITON:
    from baton.train import gated_kernels as kernels

# Beyond it the kernels' tiles do not fit a GPU's registers.
MOST_RANK = 128
# The product of the halves, and its gradient, exist for a part of the rows at a time: for 16,384
# tokens of a 7B model half of it is 0.3 GiB. So many parts, and so many rows of each at least, cost
# the matrix products next to nothing.
_FORWARD = (2, 8192)
_BACKWARD = (4, 4096)


def gate(both: torch.Tensor, out: torch.Tensor) -> None:
    """Write `silu(gate) * up` to `out`.

    Args:
        both: `(tokens, 2 * width)`: gate, then up; contiguous.
        out: `(tokens, width)`, any row stride.
    """
    if can_launch(both):
        kernels.forward(both, out)
        return
    wide = torch.promote_types(both.dtype, torch.float32)
    halves = both.to(wide).chunk(2, 1)
    out.copy_(torch.nn.functional.silu(halves[0]) * halves[1])


def gate_backward(
    grad: torch.Tensor,
    grad_thin: torch.Tensor,
    down_a: torch.Tensor,
    both: torch.Tensor,
    thin: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `down_a`, `(down_rank, width)`, and of B, `(2 * rank, width)`, in float32.

    That of `both` takes its place: the two of them are the largest tensors of a training step.

    Args:
        grad: `(tokens, width)`: of the product; with a `seed`, without what comes through the next
            adapter.
        grad_thin: `(tokens, down_rank)`: of what that adapter's A makes of the product.
        down_a: `(down_rank, width)`.
        both: as for `gate`.
        thin: `(tokens, 2 * rank)`: what the A of gate and of up made of the input.
        seed: of the dropout of the product, `(1,)`; None without.
        p: the share that is dropped.
        first: the number of the first of these tokens, on which their dropout depends.
    """
    if can_launch(both):
        made: tuple[torch.Tensor, torch.Tensor] = kernels.backward(
            grad, grad_thin, down_a, both, thin, seed, p, first
        )
        return made
    wide = torch.promote_types(both.dtype, torch.float32)
    one, other = both.to(wide).chunk(2, 1)
    share = torch.sigmoid(one)
    silu = one * share
    product, g = silu * other, grad.to(wide)
    if seed is not None:
        mask = kept(grad.shape, seed, p, first).to(wide) / (1 - p)
        product, g = product * mask, g + (grad_thin @ down_a).to(wide) * mask
    both.copy_(torch.cat((g * other * (share + silu * (1 - share)), g * silu), 1))
    grads = zip(both.to(wide).chunk(2, 1), thin.to(wide).chunk(2, 1), strict=True)
    grad_b = torch.cat([part.T @ half for half, part in grads])
    return grad_thin.to(wide).T @ product, grad_b


def _parts(tokens: int, most: int, least_rows: int) -> Iterator[slice]:
    """All rows, in at most so many parts of at least so many rows."""
    size = -(-tokens // max(1, min(most, tokens // least_rows)))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


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
        halves: gate's weight above up's, `(2 * width, in)`, dense or the parts of an NF4 one;
            best with a border, like `weight`.
        a: `(2 * rank, in)`: the A of gate, then of up.
        b: `(2 * width, 2 * rank)`: their B, scaled, on a diagonal.
        weight: of down, `(in, width)`.
        down_a: `(down_rank, width)`; `down_b`: `(in, down_rank)`, scaled.
        seeds: `(2,)` of the adapters' dropout; None without.
        p: the share that is dropped.

    Returns:
        The output; gate and up, `(tokens, 2 * width)`; and the products of the inputs with `a` and
        `down_a`, with the zeros that a border has after its ranks.
    """
    width, tokens = down_a.shape[1], len(x)
    seed, other = (None, None) if seeds is None else (seeds[:1], seeds[1:])
    above = Bordered.filled(halves, a, b)
    thin = above.thin(x, seed, p)
    both = above.outputs(x, thin)
    down = Bordered.filled(weight, down_a, down_b)
    out = x.new_empty(tokens, down.rows)
    down_thin = x.new_empty(tokens, down.wide.shape[1] - width)
    for rows in _parts(tokens, *_FORWARD):
        # The product with what the adapter makes of it beside it, where it is wanted.
        held = x.new_empty(len(both[rows]), down.wide.shape[1])
        product = held[:, :width]
        gate(both[rows], product)
        down_thin[rows] = held[:, width:] = down.thin(product, other, p, rows.start)
        down.outputs_of(held, out[rows])
        del product
        del held
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
    rooms = border_of(len(a), x.device), border_of(len(down_a), x.device)
    widths = (len(down_b), len(b), *rooms)
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
    """Gradients of `x`, `a`, `b`, `down_a` and `down_b`; `both` holds its gradient afterwards."""
    (down_rank, width), (ranks, size) = down_a.shape, a.shape
    down = Bordered.filled(weight, down_a, down_b)
    sums = []
    for rows in _parts(len(x), *_BACKWARD):
        if seeds is None:
            seed, (ahead, grad_thin) = None, down.gradient(grad[rows])
        else:
            seed, beside = seeds[1:], down.gradient_parts(grad[rows])
            ahead, grad_thin = beside[:, :width], beside[:, width:]
            del beside
        some, used = thin[rows, :ranks], grad_thin[:, :down_rank]
        sums.append(gate_backward(ahead, used, down_a, both[rows], some, seed, p, rows.start))
        del ahead, grad_thin, used
    # A second backward pass over the same graph is an error now, not a wrong gradient.
    torch.autograd.graph.increment_version(both)
    grad_down_a, grad_b = (reduce(torch.add, of).to(x.dtype) for of in zip(*sums, strict=True))
    beside = Bordered.filled(halves, a, b).gradient_parts(both)
    read, seed = (x, None) if seeds is None else (drop(x, seeds[:1], p), seeds[:1])
    return (
        input_gradient(beside, a, seed, p),
        beside[:, size : size + ranks].T @ read,
        torch.block_diag(*(half.T for half in grad_b.chunk(2))),
        grad_down_a,
        (grad.T @ down_thin)[:, :down_rank].contiguous(),
    )


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
