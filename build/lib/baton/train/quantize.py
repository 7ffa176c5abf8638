"""NF4 weights through bitsandbytes, on the GPU and on the CPU."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's base: 4-bit NormalFloat with double quantisation (Dettmers et al., 2023)."""
    import bitsandbytes  # noqa: F401  (say here, not deep inside loading, if it is missing)

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
