"""The model that learns: a base, what of it is trained, and how that is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from baton.train import adapters
from baton.train.base import describe, fingerprint, load_model
from baton.train.config import AdapterConfig, ModelConfig
from baton.train.state import FullWeights, Weights


@dataclass(frozen=True, kw_only=True)
class Learner:
    """`network` is the Hugging Face model; `model` is what trains, with adapters around it."""

    network: PreTrainedModel
    model: torch.nn.Module
    weights: Weights
    base_fingerprint: str

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def total_parameters(self) -> int:
        """All weights, adapters included; a packed 4-bit weight counts as the two it holds."""
        return int(self.network.num_parameters())


def build_learner(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    base_folder: Path,
    revision: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    packed: bool,
    seed: int,
    activation_checkpointing: bool = False,
) -> Learner:
    """Load the base and attach what is to learn, ready to train (`packed`) or to generate."""
    network = load_model(
        model,
        adapter,
        base_folder=base_folder,
        revision=revision,
        device=device,
        compute_dtype=compute_dtype,
        packed=packed,
    )
    base = fingerprint(network)
    if activation_checkpointing:
        checkpoint_activations(network)
    if adapter.method == "full":
        return Learner(
            network=network, model=network, weights=FullWeights(network), base_fingerprint=base
        )
    base_name = describe(model)["name"]
    wrapped = adapters.attach(network, adapter, base_name=base_name, seed=seed)
    return Learner(
        network=network,
        model=wrapped,
        weights=adapters.AdapterWeights(wrapped),
        base_fingerprint=base,
    )


def checkpoint_activations(network: PreTrainedModel) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    # transformers 5.23 gave the method another name; the old one warns.
    enable = getattr(network, "activation_checkpointing_enable", None)
    (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    # Frozen embeddings would otherwise cut the graph below the first checkpoint.
    network.enable_input_require_grads()
