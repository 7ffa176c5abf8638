"""The model of a task: one base, an embedding with memory rows, and an adapter for each role."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from baton.errors import DamagedError
from baton.pipelines.clara.embedding import MemoryEmbedding
from baton.pipelines.clara.memory import Vocabulary
from baton.train import adapters
from baton.train.adapters import AdapterWeights
from baton.train.base import describe, fingerprint, load_model
from baton.train.config import AdapterConfig, ModelConfig
from baton.train.layers import compile_layers, recompute_within
from baton.train.learner import Learner
from baton.train.stacked import stack_projections
from baton.train.tensor_files import save_tensors

ENCODER, DECODER, REASONER = "encoder", "decoder", "query_reasoner"
ROLES: Mapping[str, tuple[str, ...]] = {
    "stage1": (ENCODER, DECODER),
    "stage2": (ENCODER, DECODER),
    "stage3": (ENCODER, DECODER, REASONER),
}
# What learns; the memory rows of the embedding do in every stage.
LEARNS: Mapping[str, tuple[str, ...]] = {
    "stage1": (ENCODER, DECODER),
    "stage2": (ENCODER, DECODER),
    "stage3": (DECODER, REASONER),
}
MEMORY = "memory.safetensors"


class Roles:
    """Which adapter of a model is at work; none means the base by itself."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
        self.active: str | None = None

    @contextlib.contextmanager
    def using(self, role: str | None) -> Iterator[None]:
        """With the adapter of a role, inside; the one before comes back."""
        before = self.active
        self._switch(role)
        try:
            yield
        finally:
            self._switch(before)

    def again(self) -> contextlib.AbstractContextManager[None]:
        """For a layer that is run again in the backward pass: with the adapter of its first time.

        By then another one is at work.
        """
        return self.using(self.active)

    def _switch(self, role: str | None) -> None:
        self.active = role
        for layer in self._layers:
            # PEFT's own switch would also say anew what learns, in the middle of a graph.
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = [role]


@dataclass(frozen=True)
class ClaraWeights:
    """The adapters, each a PEFT folder, and every row that the added tokens have."""

    model: Any
    embedding: MemoryEmbedding
    head: torch.nn.Module
    roles: tuple[str, ...]

    def save(self, folder: Path) -> None:
        for role in self.roles:
            AdapterWeights(self.model, role, role).save(folder)
        save_tensors(
            {k: v.detach().clone().contiguous() for k, v in self._rows().items()}, folder / MEMORY
        )

    def load(self, folder: Path) -> None:
        """Raises `DamagedError` if the weights are not of this model."""
        self.load_only(folder, self.roles)

    def load_only(self, folder: Path, roles: Sequence[str]) -> None:
        """The added rows, and the adapters of some roles."""
        for role in roles:
            AdapterWeights(self.model, role, role).load(folder)
        rows, here = load_file(folder / MEMORY), self._rows()
        if {k: v.shape for k, v in rows.items()} != {k: v.shape for k, v in here.items()}:
            raise DamagedError(
                f"{folder.name}/{MEMORY}: holds {_shapes(rows)}, this model has {_shapes(here)}"
            )
        with torch.no_grad():
            for name, row in rows.items():
                here[name].copy_(row)

    def start_from(self, folder: Path, source: str, target: str) -> None:
        """Give the role `target` the saved weights of the role `source`."""
        AdapterWeights(self.model, target, source).load(folder)

    def _rows(self) -> dict[str, torch.Tensor]:
        first = self.embedding.first
        return {
            "memory": self.embedding.memory,
            "markers": self.embedding.markers,
            # They stand in the softmax, whatever a model is meant to say.
            "head": self.head.weight[first:],
        }


@dataclass(frozen=True, kw_only=True)
class ClaraLearner(Learner):
    """A learner with roles."""

    vocabulary: Vocabulary
    embedding: MemoryEmbedding
    roles: Roles

    def parameters_of(self, role: str) -> list[torch.nn.Parameter]:
        """The weights of one adapter."""
        return [p for name, p in self.model.named_parameters() if f".{role}." in f".{name}."]


def build(
    model: ModelConfig,
    adapter: AdapterConfig,
    tokenizer: Any,
    *,
    stage: str,
    vectors: int,
    encoder_tokens: int,
    base_folder: Path,
    revision: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int,
    compiled: bool = False,
) -> ClaraLearner:
    """Load the base, add tokens to `tokenizer` and rows for them, attach the roles of a stage.

    Fresh adapters and rows follow from `seed`. Everything that learns is float32.
    """
    network = load_model(
        model,
        adapter,
        base_folder=base_folder,
        revision=revision,
        device=device,
        compute_dtype=compute_dtype,
        packed=True,
    )
    vocabulary = Vocabulary.extend(tokenizer, vectors=vectors, encoder_tokens=encoder_tokens)
    return assemble(
        network,
        adapter,
        vocabulary,
        stage=stage,
        base_name=describe(model)["name"],
        seed=seed,
        compiled=compiled,
    )


def assemble(
    network: Any,
    adapter: AdapterConfig,
    vocabulary: Vocabulary,
    *,
    stage: str,
    base_name: str,
    seed: int,
    compiled: bool = False,
) -> ClaraLearner:
    """Add rows and the roles of a stage to a loaded base."""
    base = fingerprint(network)
    embedding = add_rows(network, vocabulary, seed=seed)
    trained = adapters.attach(network, adapter, base_name=base_name, seed=seed, names=ROLES[stage])
    stack_projections(trained)
    roles = Roles(trained)
    learner = ClaraLearner(
        network=network,
        model=trained,
        weights=ClaraWeights(trained, embedding, network.get_output_embeddings(), ROLES[stage]),
        base_fingerprint=base,
        vocabulary=vocabulary,
        embedding=embedding,
        roles=roles,
    )
    trained.requires_grad_(False)
    embedding.memory.requires_grad_(True)
    for role in LEARNS[stage]:
        for parameter in learner.parameters_of(role):
            parameter.requires_grad_(True)
    recompute_within(network, roles.again)
    if compiled:
        compile_layers(network)
    return learner


def add_rows(network: Any, vocabulary: Vocabulary, *, seed: int) -> MemoryEmbedding:
    """Resize embedding and head to the extended vocabulary; only the memory rows will learn."""
    torch.manual_seed(seed)
    network.resize_token_embeddings(vocabulary.first + vocabulary.added)
    embedding = MemoryEmbedding(
        network.get_input_embeddings(), first=vocabulary.first, vectors=vocabulary.vectors
    )
    network.set_input_embeddings(embedding)
    network.requires_grad_(False)
    return embedding


def copy_weights(source: Path, target: Path, roles: Sequence[str]) -> None:
    """Put the adapters and rows of a checkpoint into the folder of final weights."""
    for role in roles:
        shutil.copytree(source / role, target / role)
    shutil.copyfile(source / MEMORY, target / MEMORY)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
