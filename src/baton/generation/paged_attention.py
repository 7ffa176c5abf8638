"""Attention of prompts to themselves, and of new tokens to all that their sequence has said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from baton.errors import ModelError
from baton.generation.pages import PAGE, Pages
from baton.train.attention import packed_attention
from baton.train.launchable import has_kernels

NAME = "baton_paged"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward pass does: whole prompts end to end, or one new token a sequence.

    Attributes:
        slots: `(tokens,)` int64: where each token's key and value go.
        prompts: edges of the prompts as `packed_attention` takes them; None for new tokens.
        table: `(sequences, pages)` int32: the pages of each sequence, in order.
        context: `(sequences,)` int32: tokens of each sequence, the new one included.
    """

    pages: Pages
    slots: torch.Tensor
    prompts: dict[str, Any] | None = None
    table: torch.Tensor | None = None
    context: torch.Tensor | None = None


def register() -> None:
    """Make `attn_implementation="baton_paged"` known to transformers."""
    AttentionInterface.register(NAME, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    paged: Step | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: `query` is `(1, heads, tokens, width)`.

    Raises:
        ModelError: the model needs soft-capping or attention sinks.
    """
    if softcap is not None or s_aux is not None or paged is None:
        raise ModelError(f"{type(module).__name__} cannot generate from a paged cache")
    stored = (x.squeeze(0).transpose(0, 1) for x in (key, value))
    keys, values = paged.pages.write(int(module.layer_idx), paged.slots, *stored)
    if paged.prompts is not None:
        return packed_attention(
            module,
            query,
            key,
            value,
            None,
            scaling=scaling,
            sliding_window=sliding_window,
            **paged.prompts,
        )
    assert paged.table is not None
    assert paged.context is not None
    out = decode(
        query.squeeze(0).transpose(0, 1),
        keys,
        values,
        paged.table,
        paged.context,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
    )
    return out[None], None


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    context: torch.Tensor,
    *,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Attention of the newest token of each sequence to its last `window` tokens, or to all.

    Args:
        query: `(sequences, heads, width)`.
        keys, values: a layer's pool, `(slots, kv_heads, width)`; `heads` is a multiple.
        table: `(sequences, pages)` int32.
        context: `(sequences,)` int32, tokens of each sequence, at least 1.

    Returns:
        `(sequences, heads, width)`.
    """
    if has_kernels(query.device):
        from baton.generation.paged_kernels import decode as kernel

        return kernel(query, keys, values, table, context, scale=scale, window=window)
    position = torch.arange(table.shape[1] * PAGE, device=table.device)
    slots = table[:, position // PAGE].long() * PAGE + position % PAGE
    seen = position < context[:, None]
    if window:
        seen &= position >= context[:, None] - window
    out = scaled_dot_product_attention(
        query[:, :, None],
        keys[slots].transpose(1, 2),
        values[slots].transpose(1, 2),
        attn_mask=seen[:, None, None],
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out.squeeze(2)
