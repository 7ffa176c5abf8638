"""The model that learns: a base, what of it is trained, and how that is saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from baton.train import adapters
from baton.train.base import describe, fingerprint, load_model
from baton.train.config import AdapterConfig, ModelConfig
from baton.train.layers import compile_layers
from baton.train.ranks import Ranks
from baton.train.sharding import Sharded, loading_device, shard
from baton.train.stacked import stack_projections
from baton.train.state import FullWeights, Weights


@dataclass(frozen=True, kw_only=True)
class Learner:
    """`network` is the Hugging Face model; `model` is what trains, with adapters around it.

    `sharded` is there when every rank has only a share of it.
    """

    network: PreTrainedModel
    model: torch.nn.Module
    weights: Weights
    base_fingerprint: str
    sharded: Sharded | None = None

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
    compiled: bool = False,
    over: Ranks | None = None,
) -> Learner:
    """Load the base and attach what is to learn, ready to train (`packed`) or to generate.

    `compiled` is for training, and so is `over`: the ranks over which the model is sharded.
    """
    network = load_model(
        model,
        adapter,
        base_folder=base_folder,
        revision=revision,
        device=device if over is None else loading_device(over),
        compute_dtype=compute_dtype,
        packed=packed,
    )
    is_here = over is None or over.rank == 0
    base = fingerprint(network) if is_here else ""
    base = base if over is None else over.broadcast(base)
    trained: torch.nn.Module = network
    weights: Weights = FullWeights(network)
    if adapter.method != "full":
        name = describe(model)["name"]
        if not packed:
            adapter = dataclasses.replace(adapter, dropout=0.0)
        trained = adapters.attach(network, adapter, base_name=name, seed=seed)
        weights = adapters.AdapterWeights(trained)
        if over is None:
            stack_projections(trained)
    sharded = None if over is None else shard(trained, over, compute_dtype)
    if compiled:
        compile_layers(network)
    return Learner(
        network=network,
        model=trained,
        weights=weights,
        base_fingerprint=base,
        sharded=sharded,
    )
