"""LoRA adapters by PEFT: attach, save and load, as plain PEFT folders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
from transformers import PreTrainedModel

from baton.errors import ConfigError, DamagedError
from baton.train.config import AdapterConfig
from baton.train.shard_files import load_tensors
from baton.train.tensor_files import save_tensors

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"


def attach(
    network: PreTrainedModel,
    adapter: AdapterConfig,
    *,
    base_name: str,
    seed: int,
    names: Sequence[str] = ("default",),
) -> PeftModel:
    """Wrap the frozen base with float32 LoRA weights drawn from `seed`.

    With several `names` there are as many adapters of the same shape; the first is active.

    Raises:
        ConfigError: a target names no module of the model.
    """

    def config() -> LoraConfig:
        return LoraConfig(
            r=adapter.r,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=adapter.targets,
            task_type="CAUSAL_LM",
        )

    torch.manual_seed(seed)
    try:
        model: PeftModel = get_peft_model(network, config(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config())
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
    for name in names:
        model.peft_config[name].base_model_name_or_path = base_name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:
            parameter.data = parameter.data.float()
    return model


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter of a PEFT model, as a folder that `PeftModel.from_pretrained` loads."""

    model: PeftModel
    name: str = "default"
    folder: str = FOLDER

    @property
    def file(self) -> str:
        return f"{self.folder}/{WEIGHTS}"

    def save(self, folder: Path) -> None:
        self.describe(folder)
        tensors = {k: v.contiguous() for k, v in self.tensors().items()}
        save_tensors(tensors, folder / self.file)

    def describe(self, folder: Path) -> None:
        """Write PEFT's configuration."""
        target = folder / self.folder
        target.mkdir(parents=True, exist_ok=True)
        config = self.model.peft_config[self.name]
        # PEFT keeps the targets as a set, which each process would write in another order.
        tidy = copy.copy(config)
        tidy.inference_mode, tidy.target_modules = True, sorted(config.target_modules)
        tidy.save_pretrained(str(target))

    def load(self, folder: Path) -> None:
        """Raises `DamagedError` if the weights are not this adapter's."""
        weights = load_tensors(folder, self.file)
        expected = self.tensors()
        if expected.keys() != weights.keys():
            odd = sorted(expected.keys() ^ weights.keys())
            raise DamagedError(f"{folder.name}: these adapter weights do not match: {odd[:3]}")
        set_peft_model_state_dict(self.model, weights, adapter_name=self.name)

    def tensors(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = get_peft_model_state_dict(
            self.model, adapter_name=self.name, save_embedding_layers=False
        )
        return weights
