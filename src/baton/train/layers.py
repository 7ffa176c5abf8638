"""The repeated layers of a model: compiled one by one, recomputing where memory is short."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from baton.train.config import TrainConfig
from baton.train.launchable import why_not_launched

log = logging.getLogger(__name__)

# Kinds of layers, with and without gradients, each for one size and then for any size.
_MOST_COMPILED = 64


def layers_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's repeated layers, in order: the units of compiling and of recomputing."""
    return [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Does a run with this configuration compile? Says why not, where one could expect it."""
    if not config.compile or device.type != "cuda":
        return False
    why = "deterministic: true" if config.deterministic else why_not_launched(device)
    if why:
        log.warning("layers are not compiled, training is slower: %s", why)
    return not why


def compile_layers(network: PreTrainedModel, **options: Any) -> None:
    """Compile every repeated layer at its first call, with `options` of `torch.compile`.

    Layers of one shape share the code, made for packs of any size; what torch caches on disk
    makes it quick in a later leg.
    """
    torch._dynamo.config.recompile_limit = _MOST_COMPILED
    for layer in layers_of(network):
        layer.forward = _of_any_size(torch.compile(layer.forward, **options))
    # Or the first layer, whose input has no gradient, would need code of its own.
    _let_inputs_learn(network)


def _of_any_size(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Say of everything as long as the pack, and of its edges, that their size will change.

    Left to itself the compiler starts with fixed sizes, and compiles again whenever another
    one of them changes for the first time.
    """

    @functools.wraps(compiled)
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves((hidden, args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                if tensor.ndim > 1 and tensor.shape[1] == hidden.shape[1]:
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
                elif tensor.ndim == 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(hidden, *args, **kwargs)

    return forward


def recompute_layers(network: torch.nn.Module, count: int | None = None) -> None:
    """Let `count` layers, spread evenly, make their activations anew in the backward pass.

    All of them by default; the others do not, whatever an earlier call said. After
    `compile_layers`, if both.
    """
    layers = layers_of(network)
    count = len(layers) if count is None else count
    for number, layer in enumerate(layers):
        plain = getattr(layer.forward, "recomputes", layer.forward)
        chosen = (number + 1) * count // len(layers) > number * count // len(layers)
        if chosen:
            layer.forward = _recomputing(plain, getattr(layer, "again", nullcontext))
        elif hasattr(layer.forward, "recomputes"):
            layer.forward = plain
    if count:
        # Frozen embeddings would otherwise cut the graph below the first checkpoint.
        _let_inputs_learn(network)


def recompute_within(
    network: torch.nn.Module, again: Callable[[], AbstractContextManager[None]]
) -> None:
    """Say what must be as it was when a layer runs again; before `recompute_layers`.

    `again` is called when a layer first runs, the context that it returns is entered when the
    layer runs again: by then another adapter may be at work, for one.
    """
    for layer in layers_of(network):
        layer.again = again


@contextlib.contextmanager
def plain_layers(network: torch.nn.Module) -> Iterator[None]:
    """Layers neither compiled nor recomputing: generation has a new shape at every token."""
    changed = [(layer, layer.__dict__.pop("forward", None)) for layer in layers_of(network)]
    try:
        yield
    finally:
        for layer, forward in changed:
            if forward is not None:
                layer.forward = forward


def _let_inputs_learn(network: torch.nn.Module) -> None:
    """What the embeddings of a Hugging Face model say has a gradient, trained or not."""
    model = next(m for m in network.modules() if isinstance(m, PreTrainedModel))
    embeddings = model.get_input_embeddings()
    if not hasattr(embeddings, "learns"):
        embeddings.learns = True
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))


def _recomputing(
    forward: Callable[..., Any], again: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again()

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    recomputed.recomputes = forward  # type: ignore[attr-defined]
    return recomputed
