"""NF4 weights through bitsandbytes, on the GPU and on the CPU."""

from __future__ import annotations

import torch
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
