"""Attention over packed samples that never looks across a sample's edge."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from baton.errors import ModelError

NAME = "baton_packed"


def register() -> None:
    """Make `attn_implementation="baton_packed"` known to transformers."""
    AttentionInterface.register(NAME, packed_attention)
    # Sample edges travel as lengths, so no mask is ever built.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def can_use_varlen(device: torch.device) -> bool:
    """Is there a variable-length kernel for this device? Flash attention needs Ampere."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


def packed_attention(
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
    packed_lengths: tuple[int, ...] = (),
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal self-attention within each packed sample.

    Args:
        query: `(1, heads, tokens, width)`; `key` and `value` may have fewer heads.
        packed_lengths: tokens of each sample, summing to `tokens`.
        cu_seq_lens_q: the same as running sums, `(samples + 1,)` int32 on the device; given
            only where a variable-length kernel is to be used.

    Returns:
        `(1, tokens, heads, width)` and no weights.

    Raises:
        ModelError: the model needs soft-capping or attention sinks, which packing cannot give.
    """
    if softcap is not None or s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} uses logit soft-capping or attention sinks, which packed"
            " training does not have; choose a model without them"
        )
    window = sliding_window or 0
    if cu_seq_lens_q is not None:
        return _varlen(query, key, value, scaling, window, cu_seq_lens_q, max_length_q), None
    pieces = []
    start = 0
    for length in packed_lengths or (query.shape[2],):
        span = slice(start, start + length)
        start += length
        pieces.append(
            scaled_dot_product_attention(
                query[:, :, span],
                key[:, :, span],
                value[:, :, span],
                attn_mask=_band(length, window, query.device) if 0 < window < length else None,
                dropout_p=dropout,
                is_causal=not 0 < window < length,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    out = torch.cat(pieces, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int,
    edges: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    out: torch.Tensor = varlen_attn(
        q,
        k,
        v,
        cu_seq_q=edges,
        cu_seq_k=edges,
        max_q=longest,
        max_k=longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
    )
    return out.unsqueeze(0)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token may look: itself and the `window - 1` tokens before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
