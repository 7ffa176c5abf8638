"""Causal attention within packed samples by kernels of our own, which are quick at short ones.

torch's variable-length FlashAttention gives a sample of 275 tokens the tiles, and its gradients
the passes, that pay at thousands.
"""

from __future__ import annotations

from typing import Any

import torch

from baton.train.launchable import has_kernels

_WIDTHS = (64, 128)
_MOST_HEADS = 16  # that share a key: a tile has to hold some tokens of each
# Hopper: tiles were chosen on an H200, and only there they are known to pay.
_GENERATIONS = (9,)


def can_attend(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Are there kernels for these queries and keys, `(tokens, heads, width)` on a GPU?"""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in _WIDTHS
        and q.shape[1] // k.shape[1] <= _MOST_HEADS
        and _is_known(q.device)
    )


# A compiler that looked inside would find calls that it cannot follow.
@torch.compiler.assume_constant_result
def _is_known(device: torch.device) -> bool:
    return has_kernels(device) and torch.cuda.get_device_capability(device)[0] in _GENERATIONS


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: torch.Tensor, scale: float
) -> torch.Tensor:
    """`softmax(scale * q @ k.T) @ v`, each token seeing those of its sample up to itself.

    Args:
        q: `(tokens, heads, width)`; `k` and `v` have as many heads or a fraction of them.
        edges: running sums of the samples' lengths from 0 to `tokens`, int32 on the device;
            samples may be empty.

    Returns:
        `(tokens, heads, width)`.
    """
    out: torch.Tensor
    out, _ = _attend(q, k, v, edges, scale)
    return out


@torch.library.custom_op("baton::packed_attention", mutates_args=())
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`, and `(key heads, tokens, heads that share one)` float32 for the backward pass.

    Those are the logarithms to base 2 of the softmax's denominators.
    """
    from baton.train import packed_kernels

    q, k, v = (_with_rows(x) for x in (q, k, v))
    return packed_kernels.forward(q, k, v, edges, scale=scale)


@_attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    (tokens, all_heads, _), heads = q.shape, k.shape[1]
    normal = q.new_empty(heads, tokens, all_heads // heads, dtype=torch.float32)
    return q.new_empty(q.shape), normal


@torch.library.custom_op("baton::packed_attention_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    edges: torch.Tensor,
    out: torch.Tensor,
    normal: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `q`, `k` and `v`."""
    from baton.train import packed_kernels

    grad, q, k, v = (_with_rows(x) for x in (grad, q, k, v))
    return packed_kernels.backward(grad, q, k, v, edges, out, normal, scale=scale)


@_attend_backward.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    edges: torch.Tensor,
    out: torch.Tensor,
    normal: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, edges, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, edges, *output)


def _attend_gradient(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    grads = _attend_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None)


_attend.register_autograd(_attend_gradient, setup_context=_attend_context)


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """With each head's values side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
