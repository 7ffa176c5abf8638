"""LoRA adapters by PEFT: attach, save and load, as plain PEFT folders."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import PreTrainedModel

from baton.errors import ConfigError, DamagedError
from baton.train.config import AdapterConfig
from baton.train.state import save_tensors

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"


def attach(
    network: PreTrainedModel, adapter: AdapterConfig, *, base_name: str, seed: int
) -> PeftModel:
    """Wrap the frozen base with float32 LoRA weights drawn from `seed`.

    Raises:
        ConfigError: a target names no module of the model.
    """
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        model: PeftModel = get_peft_model(network, config)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        linear = {
            name.rpartition(".")[2]
            for name, module in network.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        raise ConfigError(
            f"adapter.targets: none of {adapter.targets} is in this model;"
            f" its linear layers are {sorted(linear)}, or use all-linear"
        ) from error
    # PEFT would write the folder of this machine; people need the model's name.
    model.peft_config["default"].base_model_name_or_path = base_name
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter of a PEFT model, as a folder that `PeftModel.from_pretrained` loads."""

    model: PeftModel

    def save(self, folder: Path) -> None:
        target = folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        config = self.model.peft_config["default"]
        # PEFT keeps the targets as a set, which each process would write in another order.
        tidy = copy.copy(config)
        tidy.inference_mode, tidy.target_modules = True, sorted(config.target_modules)
        tidy.save_pretrained(str(target))
        save_tensors({k: v.contiguous() for k, v in self._weights().items()}, target / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Raises `DamagedError` if the weights are not this adapter's."""
        weights = load_file(folder / FOLDER / WEIGHTS)
        expected = self._weights()
        if expected.keys() != weights.keys():
            odd = sorted(expected.keys() ^ weights.keys())
            raise DamagedError(f"{folder.name}: these adapter weights do not match: {odd[:3]}")
        set_peft_model_state_dict(self.model, weights)

    def _weights(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = get_peft_model_state_dict(
            self.model, save_embedding_layers=False
        )
        return weights
