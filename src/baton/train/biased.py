"""T5's attention and dropout in training, with few passes over memory.

transformers' own way makes the matrix of scores, in float32 where the bias is trained, and keeps
the mask of every dropout. Here the scores exist a block at a time, and what dropout takes follows
from a hash of the place, so that the backward pass needs no mask. T5's bias is a function of the
distance between key and query: only its values by distance are passed from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerCrossAttention

from baton.train.copies import Copies
from baton.train.dropout import HashDropout, new_seed
from baton.train.launchable import HAS_TRITON, has_kernels
from baton.train.layers import layers_of

kernels: Any = None
if HAS_TRITON:
    from baton.train import biased_kernels as kernels

_WIDTHS = (16, 32, 64, 128)


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Are there kernels for this device? They need Triton, Ampere and 16-bit products."""
    return dtype != torch.float32 and has_kernels(device)


def fuse(network: Any) -> None:
    """Let a T5 train with this attention and this dropout, in place; before it is compiled.

    Elsewhere than in training, and for heads of odd widths, SDPA does the attention. Parameters
    stay as they are; linear layers compute with `Copies` of them.
    """
    # Each has a configuration of its own, which the whole model's does not reach.
    for part in (network, network.encoder, network.decoder):
        part.set_attn_implementation("sdpa")
    for stack in (network.encoder, network.decoder):
        copies = Copies(stack)
        for layer in layers_of(stack):
            for parent, attention in _attentions(layer):
                attention.__class__ = BiasedAttention
                if isinstance(parent, T5LayerCrossAttention):
                    copies.add(attention, "kv", [attention.k, attention.v])
                else:
                    copies.add(attention, "qkv", [attention.q, attention.k, attention.v])
            copies.add_others(layer)
    # Elsewhere nothing is compiled, and torch's own dropout is one kernel.
    for module in [module for layer in layers_of(network) for module in layer.modules()]:
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Dropout:
                setattr(module, name, HashDropout(child.p).train(child.training))


def _attentions(layer: torch.nn.Module) -> list[tuple[torch.nn.Module, Any]]:
    """Those that the kernels can do, each after the module that it is part of."""
    pairs: list[tuple[torch.nn.Module, Any]]
    pairs = [(parent, child) for parent in layer.modules() for child in parent.children()]
    return [(p, c) for p, c in pairs if type(c) is T5Attention and c.key_value_proj_dim in _WIDTHS]


class BiasedAttention(T5Attention):  # type: ignore[misc]
    """T5's attention, by kernels where something is to be learnt.

    Without gradients, with a cache, and where a causal layer has a mask besides, transformers'
    own does it. The position bias of this one, `(heads, distances)`, is not the other's: all
    layers of a pass must go the same way, and they do, as these three are the same for all.

    Attributes:
        qkv: of self-attention, a copy of the three weights, one below the other.
        kv: of cross-attention, that of the two that read what was encoded.
    """

    qkv: torch.Tensor
    kv: torch.Tensor

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As transformers calls it: `hidden_states` `(batch, n, d_model)`."""
        has_both = self.is_causal and mask is not None
        if not torch.is_grad_enabled() or past_key_values is not None or has_both:
            theirs: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
            theirs = super().forward(
                hidden_states, mask, key_value_states, position_bias, past_key_values, **options
            )
            return theirs
        if key_value_states is None:
            projected = [linear(hidden_states, self.qkv)]
        else:
            projected = [self.q(hidden_states), linear(key_value_states, self.kv)]
        heads = (-1, self.n_heads, self.key_value_proj_dim)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.bias_by_distance(hidden_states.shape[1])
        attended = attend(
            [x.unflatten(-1, heads) for x in projected],
            position_bias,
            # All queries see the same keys.
            None if mask is None else mask[:, 0, 0],
            scale=self.scaling,
            causal=self.is_causal,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o(attended.flatten(2)), position_bias, None

    def bias_by_distance(self, length: int) -> torch.Tensor:
        """`(heads, distances)` float32: see `attend`."""
        side = -(-length // kernels.BLOCK) * kernels.BLOCK
        weight = self.relative_attention_bias.weight
        buckets = self._relative_position_bucket(
            torch.arange(1 - side, side + 1, device=weight.device),
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        # Not by an index: that one's gradient is added up atomically, in another order each time.
        chosen = buckets[:, None] == torch.arange(len(weight), device=weight.device)
        return (chosen * weight.float().T[:, None]).sum(-1)


def attend(
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """`dropout(softmax(scale * q @ k.T + bias)) @ v`, with a seed of the device's generator.

    Args:
        packed: q, k and v in this order, each or some of them side by side in one tensor:
            `(batch, tokens, 1 or 2 or 3, heads, width)`. The `n` tokens of q need not be the
            `m` of k and v.
        bias: `(heads, N + M)` float32, where `N` and `M` are `n` and `m` rounded up to whole
            blocks of the kernels: what is added where the key is `1 - N` to `M` tokens after
            the query.
        mask: `(batch, m)`, True or not 0 where a key is to be seen.
        causal: queries see the keys up to their own index only.

    Returns:
        `(batch, n, heads, width)`.
    """
    seed = new_seed(1, packed[0].device)
    seen = None if mask is None else mask.to(torch.uint8)
    out, _ = _attend(packed, bias, seen, seed, scale, causal, dropout)
    return out


@torch.library.custom_op("baton::biased_attention", mutates_args=())
def _attend(
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attend` returns, and what the backward pass needs besides.

    That is `(batch, heads, n)` float32: the logarithms to base 2 of the softmax's denominators.
    """
    made: tuple[torch.Tensor, torch.Tensor] = kernels.forward(
        [x.contiguous() for x in packed],
        None if bias is None else bias.contiguous(),
        None if mask is None else mask.contiguous(),
        seed,
        scale=scale,
        causal=causal,
        dropout=dropout,
    )
    return made


@_attend.register_fake
def _(
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q = packed[0]
    batch, n, _, heads, width = q.shape
    normal = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    return q.new_empty(batch, n, heads, width), normal


@torch.library.custom_op("baton::biased_attention_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor,
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    out: torch.Tensor,
    normal: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
    needs_bias: bool,
) -> list[torch.Tensor]:
    """Gradients like `packed`, and of `bias`: empty where it is not needed."""
    grads, grad_bias = kernels.backward(
        grad.contiguous(),
        [x.contiguous() for x in packed],
        None if bias is None else bias.contiguous(),
        None if mask is None else mask.contiguous(),
        seed,
        out,
        normal,
        scale=scale,
        causal=causal,
        dropout=dropout,
        needs_bias=needs_bias,
    )
    return [*grads, grad_bias]


@_attend_backward.register_fake
def _(
    grad: torch.Tensor,
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    out: torch.Tensor,
    normal: torch.Tensor,
    scale: float,
    causal: bool,
    dropout: float,
    needs_bias: bool,
) -> list[torch.Tensor]:
    shape = bias.shape if bias is not None and needs_bias else (0,)
    grad_bias = torch.empty(shape, dtype=torch.float32, device=grad.device)
    return [*[x.new_empty(x.shape) for x in packed], grad_bias]


def _attend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    packed, *others, ctx.scale, ctx.causal, ctx.dropout = inputs
    ctx.save_for_backward(*others, *output, *packed)


def _attend_gradient(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    bias, mask, seed, out, normal, *packed = ctx.saved_tensors
    needs_bias = bias is not None and ctx.needs_input_grad[1]
    *grads, grad_bias = _attend_backward(
        grad, packed, bias, mask, seed, out, normal, ctx.scale, ctx.causal, ctx.dropout, needs_bias
    )
    return grads, grad_bias if needs_bias else None, *[None] * 5


_attend.register_autograd(_attend_gradient, setup_context=_attend_context)
