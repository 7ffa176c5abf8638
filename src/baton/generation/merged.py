"""A model in memory as a folder for other engines: adapters merged, 4-bit weights unpacked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight

from baton.train.quantize import is_nf4


def save_merged(model: Any, folder: Path) -> torch.dtype:
    """Write the model, with what its active adapter adds, as `from_pretrained` loads it.

    The model stays as it is: sums are taken in float32 and rounded to the dtype of its
    embeddings, a layer at a time. A QLoRA base is written as its 4-bit weights unpack, so the
    folder computes what the adapter was trained on. Returns the dtype of the weights.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype: torch.dtype = base.get_input_embeddings().weight.dtype
    with torch.no_grad():
        merged = {
            f"{name}.weight": _weight(module).to(dtype).cpu()
            for name, module in base.named_modules()
            if not name.endswith(".base_layer") and _is_changed(module)
        }
    # Scales of 4-bit weights are named after them: `….weight.absmax`.
    rest = {
        place: tensor
        for name, tensor in base.state_dict().items()
        if ".lora_" not in name
        and not (place := name.replace(".base_layer.", ".")).startswith(tuple(merged))
    }
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    # transformers names and joins tensors as checkpoints of this class have them.
    with torch.device("meta"):
        skeleton = type(base)._from_config(config, dtype=dtype)
    skeleton.save_pretrained(folder, state_dict=rest | merged)
    return dtype


def _is_changed(module: torch.nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) or is_nf4(module)


def _weight(module: Any) -> torch.Tensor:
    """What a linear layer multiplies by, `(out, in)`, in float32."""
    if not isinstance(module, BaseTunerLayer):
        return dequantize_module_weight(module).float()
    weight: torch.Tensor = dequantize_module_weight(module.get_base_layer()).float()
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter).float()
    return weight
