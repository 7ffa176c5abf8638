"""How the memory of this device is used: tried out once, written down, kept to by every leg."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from baton.stage import Leg
from baton.train.batch import TokenSource
from baton.train.batching import Batching, Whole
from baton.train.config import TrainConfig
from baton.train.cursor import Indices
from baton.train.layers import layers_of, recompute_layers
from baton.train.planner import MemoryPlan, Planner, Trial
from baton.train.precision import Precision
from baton.train.ranks import Ranks

FILE = "memory.json"
_UNTRIED = 8192
# Of a device's memory; the rest is for what no trial shows, and for the allocator's gaps.
_USED = 0.93
_SOME_SAMPLES = 1 << 20
_ADAM_BYTES = 8  # two float32 moments a parameter


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Tries out micro-batches of one optimizer step; no weight changes.

    Attributes:
        part: what a micro-batch adds to the loss of its step.
        indices: the samples of that step.
    """

    model: torch.nn.Module
    part: Callable[[Any, Whole], torch.Tensor]
    precision: Precision
    ranks: Ranks
    batches: Batching
    source: TokenSource
    indices: Indices

    def __call__(self, plan: MemoryPlan) -> Trial | None:
        device = self.ranks.device
        recompute_layers(self.model, plan.recompute_layers)
        share = self.batches.cut(
            self.source, self.indices, ranks=self.ranks.size, budget=plan.tokens
        )[0]
        sizes = [int(self.source.lengths(self.indices[part]).sum()) for part in share]
        largest = int(np.argmax(sizes))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        started = time.monotonic()
        try:
            self._pass(self.indices[share[largest]], plan.tokens)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return None
        finally:
            self.model.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        peak = torch.cuda.max_memory_allocated(device)
        return Trial(tokens=sizes[largest], peak=peak, seconds=seconds)

    def _pass(self, indices: Indices, budget: int) -> None:
        self.model.train()
        labelled = int(self.source.labelled(indices).sum())
        batch = self.batches.collate(self.source, indices, budget=budget)
        with self.precision.autocast():
            loss = self.part(batch, Whole(len(indices), labelled))
        self.precision.backward(loss)


def given_plan(config: TrainConfig, model: torch.nn.Module, *, can_try: bool) -> MemoryPlan | None:
    """What the configuration says; None where it leaves open what can be tried out."""
    tokens, recompute = config.tokens_per_micro_batch, config.activation_checkpointing
    if recompute is None and config.sharding == "full":
        recompute = True
    if can_try and (tokens is None or recompute is None):
        return None
    layers = len(layers_of(model)) if recompute else 0
    return MemoryPlan(tokens=tokens or _UNTRIED, recompute_layers=layers)


def plan_memory(
    leg: Leg,
    folder: str,
    config: TrainConfig,
    trials: Trials,
    steps: Sequence[Indices],
) -> MemoryPlan:
    """The fastest plan that fits and is as configured; an earlier leg's if there is one.

    Every rank must call this. `steps` are the samples of some optimizer steps, the one of
    `trials` the largest.
    """
    layers = len(layers_of(trials.model))
    recompute = None
    if config.activation_checkpointing is not None:
        recompute = layers if config.activation_checkpointing else 0
    name = f"{folder}/{FILE}"
    known = None
    if leg.is_first and (leg.folder / name).exists():
        known = json.loads(leg.store.read(name))
    known = trials.ranks.broadcast(known)
    if known is not None:
        return MemoryPlan(**known)
    trainable = sum(p.numel() for p in trials.model.parameters() if p.requires_grad)
    limit = _limit(trials.ranks.device)
    found = Planner(
        measure=trials,
        layers=layers,
        limit=limit,
        later=_ADAM_BYTES * trainable,
        step_tokens=max(int(trials.source.lengths(s).sum()) for s in steps) // trials.ranks.size,
        longest=_longest(trials.source),
        tokens=config.tokens_per_micro_batch,
        recompute_layers=recompute,
        timed=not config.deterministic,
    ).choose()
    torch.cuda.reset_peak_memory_stats(trials.ranks.device)
    plan = MemoryPlan(**trials.ranks.broadcast(asdict(found)))
    if leg.is_first:
        leg.store.write(name, json.dumps(asdict(plan)).encode())
    leg.log(
        "planned",
        tokens_per_micro_batch=plan.tokens,
        recompute_layers=f"{plan.recompute_layers}/{layers}",
        memory_limit_gib=round(limit / 2**30, 1),
    )
    return plan


def _limit(device: torch.device) -> int:
    """Bytes that this process may use."""
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory * share
    return int(min(free, total) * _USED)


def _longest(source: TokenSource) -> int:
    """Tokens of the longest sample; a part of the samples in memory at a time."""
    starts = range(0, len(source), _SOME_SAMPLES)
    parts = (np.arange(s, min(s + _SOME_SAMPLES, len(source))) for s in starts)
    return max(int(source.lengths(part).max()) for part in parts)
