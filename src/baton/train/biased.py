"""T5's attention and dropout in training, with few passes over memory.

transformers' own way makes the matrix of scores, in float32 where the bias is trained, and keeps
the mask of every dropout. Here the scores exist a block at a time, and what dropout takes follows
from a hash of the place, so that the backward pass needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from baton.train.dropout import HashDropout
from baton.train.launchable import has_kernels
from baton.train.layers import layers_of

NAME = "baton_biased"
_WIDTHS = (16, 32, 64, 128)


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Are there kernels for this device? They need Triton, Ampere and 16-bit products."""
    return dtype != torch.float32 and has_kernels(device)


def fuse(network: Any) -> None:
    """Let a T5 train with this attention and this dropout, in place; before it is compiled."""
    AttentionInterface.register(NAME, biased_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    # Each has a configuration of its own, which the whole model's does not reach.
    for part in (network, network.encoder, network.decoder):
        part.set_attn_implementation(NAME)
    # Elsewhere nothing is compiled, and torch's own dropout is one kernel.
    for module in [module for layer in layers_of(network) for module in layer.modules()]:
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Dropout:
                setattr(module, name, HashDropout(child.p).train(child.training))


def biased_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, `query` `(batch, heads, n, width)`.

    Without gradients, and where a causal layer has a mask besides, SDPA does it.
    """
    causal = bool(module.is_causal)
    usable = position_bias is not None and query.shape[-1] in _WIDTHS
    if not (usable and torch.is_grad_enabled()) or (causal and attention_mask is not None):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            **options,
        )
    # All queries see the same keys.
    mask = None if attention_mask is None else attention_mask[:, 0, 0].to(torch.uint8)
    seed = torch.randint(2**31 - 1, (1,), device=query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _ = _attend(query, key, value, position_bias, mask, seed, scale, causal, dropout)
    return out, None


@torch.library.custom_op("baton::biased_attention", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dropout(softmax(scale * q @ k.T + bias)) @ v`, and what the backward pass needs besides.

    Args:
        q: `(batch, heads, n, width)`; `k` and `v` `(batch, heads, m, width)`.
        bias: `(1, heads, n, m)`.
        mask: `(batch, m)` uint8, not 0 where a key is to be seen.
        seed: `(1,)` int64, of the dropout.

    Returns:
        `(batch, n, heads, width)`, and `(batch, heads, n)` float32: the logarithms to base 2 of
        the softmax's denominators.
    """
    from baton.train import biased_kernels

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return biased_kernels.forward(
        q, k, v, bias.contiguous(), mask, seed, scale=scale, causal=causal, dropout=dropout
    )


@_attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, n, width = q.shape
    normal = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    return q.new_empty(batch, n, heads, width), normal


@torch.library.custom_op("baton::biased_attention_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    out: torch.Tensor,
    normal: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `q`, `k`, `v`, each `(batch, tokens, heads, width)`, and of `bias`."""
    from baton.train import biased_kernels

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return biased_kernels.backward(
        grad.contiguous(),
        q,
        k,
        v,
        bias.contiguous(),
        mask,
        seed,
        out,
        normal,
        scale=scale,
        causal=causal,
        dropout=dropout,
        needs_bias=needs_bias,
    )


@_attend_backward.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    out: torch.Tensor,
    normal: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
    return made[0], made[1], made[2], bias.new_empty(bias.shape if needs_bias else 0)


def _attend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, bias, mask, seed, ctx.scale, ctx.causal, ctx.dropout = inputs
    ctx.save_for_backward(q, k, v, bias, mask, seed, *output)


def _attend_gradient(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    needs_bias = ctx.needs_input_grad[3]
    *grads, grad_bias = _attend_backward(
        grad, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.dropout, needs_bias
    )
    by_head = [g.transpose(1, 2) for g in grads]
    return (*by_head, grad_bias if needs_bias else None, *[None] * 5)


_attend.register_autograd(_attend_gradient, setup_context=_attend_context)
