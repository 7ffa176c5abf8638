"""NF4 weights through bitsandbytes, on the GPU and on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn.modules import Linear4bit
from transformers import BitsAndBytesConfig


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's base: 4-bit NormalFloat with double quantisation (Dettmers et al., 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable(network: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for CPU inference.

    On CPUs with AVX512-BF16 it repacks a layer at its first call in eval mode, for a kernel
    that has no backward, and does not undo it when training goes on: the gradient below such
    a layer would be missing (bitsandbytes 0.50). Evaluation then also computes as training.
    """
    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


_state: Any = QuantState


def is_nf4(layer: torch.nn.Module) -> bool:
    return isinstance(layer, Linear4bit)


def rows_are_blocks(layer: Any) -> bool:
    """Does every row hold whole blocks, so that rows of several layers can be put together?

    bitsandbytes' CPU kernel counts blocks by row, and its GPU kernel along the whole weight.
    """
    return bool(layer.in_features % layer.weight.quant_state.blocksize == 0)


def stack(layers: Sequence[Any]) -> list[torch.Tensor]:
    """The NF4 weights of layers with one input, as one: packed values and scales of blocks.

    The layers keep views of the packed values. The scales, themselves quantised in QLoRA, are
    unpacked here once (half a bit a weight) rather than at every use.
    """
    scales = []
    for layer in layers:
        state = layer.weight.quant_state
        scale = state.absmax
        if state.nested:
            scale = dequantize_blockwise(scale, state.state2) + state.offset
        scales.append(scale.float())
    packed = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, packed.split([len(x.weight.data) for x in layers]), strict=True):
        layer.weight.data = part
    return [packed, torch.cat(scales)]


def dense(
    weight: Sequence[torch.Tensor], rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """A weight of `(rows, columns)` for a product: without its border, or unpacked from NF4."""
    if len(weight) == 1:
        return weight[0][:rows, :columns]
    packed, scales = weight
    state: Any = _state(
        absmax=scales,
        shape=torch.Size((rows, columns)),
        dtype=dtype,
        blocksize=2 * packed.numel() // scales.numel(),
        quant_type="nf4",
    )
    unpacked: torch.Tensor = dequantize_4bit(packed, state)
    return unpacked
