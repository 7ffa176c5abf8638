"""Attention over packed samples that never looks across a sample's edge."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from baton.errors import ModelError
from baton.train import packed

NAME = "baton_packed"
_TAKES_GQA = Version(torch.__version__) >= Version("2.12")


def register() -> None:
    """Make `attn_implementation="baton_packed"` known to transformers."""
    # Sample edges travel as lengths: without a function that makes masks, none is ever built.
    AttentionInterface.register(NAME, packed_attention)


def can_use_varlen(device: torch.device) -> bool:
    """Is there a variable-length kernel for this device? Flash attention needs Ampere."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


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


def check_separation(network: PreTrainedModel) -> None:
    """Refuse a model in which a token sees a later one, or another sample of its pack.

    Some architectures do not go through transformers' attention interface, or carry state
    from token to token: packed, they would train on a wrong loss without a word. Which ones
    do is found by trying: a token of another sample is changed, and one that comes later.

    Raises:
        ModelError: a change was seen where it must not be, or the model cannot be packed.
    """
    length, name = 6, type(network).__name__
    ids = torch.arange(1, 2 * length + 1, device=network.device)
    positions = torch.arange(length, device=network.device).repeat(2)

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = network.base_model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                packed_lengths=(length, length),
            )
        return output.last_hidden_state[0].float()

    other_sample, later = ids.clone(), ids.clone()
    other_sample[:length] += 1  # up to the edge: a convolution reaches a few tokens only
    later[-1] += 1
    was_training = network.training
    network.eval()
    try:
        plain = hidden(ids)
        pairs = (
            (plain[length:], hidden(other_sample)[length:]),
            (plain[:-1], hidden(later)[:-1]),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{name} cannot be trained packed: it does not use transformers' attention interface"
            " (Qwen, Llama, Mistral, Gemma 3, Phi, OLMo and most current models do)"
        ) from error
    finally:
        network.train(was_training)
    # A decayed linear-attention state shows faintly in a model that was never trained.
    tolerance = (1e-6 if network.dtype == torch.float32 else 1e-3) * float(plain.abs().max())
    chunked = getattr(network.config.get_text_config(), "attention_chunk_size", None)
    if chunked or any(float((a - b).abs().max()) > tolerance for a, b in pairs):
        raise ModelError(
            f"{name} mixes the samples of a pack, so its loss would be wrong: its layers do not"
            " use transformers' attention interface or carry state across tokens; choose"
            " another model (Qwen, Llama, Mistral, Gemma 3, Phi, OLMo and most current ones)"
        )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int,
    edges: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    # Under autocast values come from a product in 16 bits, but float32 angles turn queries and keys
    # of a float32 model to float32 again, which the kernel does not take.
    q, k, v = (x.transpose(1, 2).squeeze(0).to(value.dtype) for x in (query, key, value))
    # A window that is wider than every sample hides nothing.
    if (not window or window >= longest) and packed.can_attend(q, k):
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return packed.attend(q, k, v, edges, scale).unsqueeze(0)

    from torch.nn.attention.varlen import varlen_attn

    # The kernel shares key and value heads by itself; torch 2.11 takes no word for it.
    shares = {"enable_gqa": True} if _TAKES_GQA and q.shape[1] != k.shape[1] else {}
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
        **shares,
    )
    return out.unsqueeze(0)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token may look: itself and the `window - 1` tokens before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
