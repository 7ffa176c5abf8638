"""The model that learns: a base, what of it is trained, and how that is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from baton.train import adapters
from baton.train.base import describe, fingerprint, load_model
from baton.train.config import AdapterConfig, ModelConfig
from baton.train.layers import compile_layers, recompute_layers
from baton.train.stacked import stack_projections
from baton.train.state import FullWeights, Weights


@dataclass(frozen=True, kw_only=True)
class Learner:
    """`network` is the Hugging Face model; `model` is what trains, with adapters around it."""

    network: PreTrainedModel
    model: torch.nn.Module
    weights: Weights
    base_fingerprint: str
    compiled: bool = False

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
    compiled: bool = False,
) -> Learner:
    """Load the base and attach what is to learn, ready to train (`packed`) or to generate.

    `activation_checkpointing` and `compiled` are for training.
    """
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
    trained: torch.nn.Module = network
    weights: Weights = FullWeights(network)
    if adapter.method != "full":
        name = describe(model)["name"]
        trained = adapters.attach(network, adapter, base_name=name, seed=seed)
        weights = adapters.AdapterWeights(trained)
        if packed:
            stack_projections(trained)
    if compiled:
        compile_layers(network)
    if activation_checkpointing:
        recompute_layers(network)
    return Learner(
        network=network,
        model=trained,
        weights=weights,
        base_fingerprint=base,
        compiled=compiled,
    )


def share_weights(trained: Learner, other: Learner) -> None:
    """Let `other`, of the same model, read the weights that `trained` trains; its own are freed.

    What the optimizer does to one in place is done to both. Of a 4-bit base, which is frozen and
    kept in another form, `other` keeps its own.
    """
    weights = dict(trained.model.named_parameters())
    for name, parameter in other.model.named_parameters():
        source = weights[name]
        if type(parameter) is torch.nn.Parameter and parameter.dtype == source.dtype:
            parameter.data = source.data
