"""What a checkpoint holds, so that the run that goes on from it is the run that stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from baton.config.decode import decode
from baton.errors import ConfigError, DamagedError
from baton.record import dump_json
from baton.train.shard_files import load_tensors
from baton.train.tensor_files import save_tensors

STATE = "state.json"
TIMING = "timing.json"
OPTIMIZER = "optimizer.safetensors"
MODEL = "model.safetensors"
# Measurements of the machine: the only file of a checkpoint that two equal runs may differ in.
MEASURED_FILES = frozenset({TIMING})


@dataclass(kw_only=True)
class TrainState:
    """Where training is, in numbers that depend on nothing but the plan.

    There is no RNG state: dropout is seeded from (seed, step, rank, micro-batch), and the
    position in the data follows from `step`, so both come back by themselves.

    Attributes:
        step: optimizer steps done.
        dev_history: `[step, dev loss]` of every finished dev evaluation, or
            `[step, dev loss, score]` where answers are scored as well.
        dev_pending: the evaluation due at `step` was cut off by a handover.
        window: `[loss, gradient norm]` of the steps since the last logged one.
        figures: what else those steps noted, by name.
        tokens_per_micro_batch: smaller than planned after running out of memory.
        recompute_layers: how many make their activations anew.
        identity: what must not change between legs.
        environment: what may change, but is said when it does.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    dev_history: list[list[float]] = field(default_factory=list)
    dev_pending: bool = False
    window: list[list[float]] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    tokens_per_micro_batch: int
    recompute_layers: int = 0
    scaler: dict[str, float] | None = None
    identity: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and dev loss of the best evaluation; the earlier one wins a tie."""
        if not self.dev_history:
            return None
        row = min(self.dev_history, key=lambda row: (badness(row), row[0]))
        return int(row[0]), row[1]

    def evaluations_since_best(self) -> int:
        best = self.best
        return sum(1 for row in self.dev_history if best and row[0] > best[0])


def badness(row: Sequence[float]) -> float:
    """Of two rows of a dev history, the smaller is the better: by score if any, else by loss."""
    return -row[2] if len(row) > 2 else row[1]


@dataclass(kw_only=True)
class Timing:
    """Measured, over all legs up to a checkpoint."""

    training_seconds: float = 0.0
    peak_gpu_memory_bytes: int = 0
    first_started: str = ""


class Weights(Protocol):
    """How the part of a model that learns is written to a folder and read back."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class SpreadWeights(Weights, Protocol):
    """Weights of which every process may hold a share."""

    @property
    def file(self) -> str:
        """The safetensors file that they are, below the folder."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What that file holds: the model's own tensors, without gradient, by name."""
        ...

    def describe(self, folder: Path) -> None:
        """Write what belongs to them besides tensors."""
        ...


@dataclass(frozen=True)
class FullWeights:
    """Every weight of a model, tied ones once."""

    model: torch.nn.Module
    file: str = MODEL

    def save(self, folder: Path) -> None:
        save_tensors({k: v.contiguous() for k, v in self.tensors().items()}, folder / MODEL)

    def describe(self, folder: Path) -> None:
        """There is nothing but tensors."""

    def load(self, folder: Path) -> None:
        saved, here = load_tensors(folder, MODEL), self.tensors()
        if saved.keys() != here.keys():
            odd = sorted(saved.keys() ^ here.keys())
            raise DamagedError(f"{MODEL}: these weights do not match the model: {odd[:3]}")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(saved[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        seen: set[int] = set()
        tensors = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            # A share has no address of its own.
            place = id(tensor) if isinstance(tensor, DTensor) else tensor.data_ptr()
            if place not in seen:
                seen.add(place)
                tensors[name] = tensor.detach()
        return tensors


def save_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], folder: Path
) -> None:
    """Write every tensor of the optimizer's state under `item/parameter name`."""
    tensors = {
        f"{item}/{names[parameter]}": torch.as_tensor(value).detach().contiguous()
        for parameter, items in optimizer.state.items()
        for item, value in items.items()
    }
    save_tensors(tensors, folder / OPTIMIZER)


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], folder: Path
) -> None:
    """Read what `save_optimizer` wrote. Raises `DamagedError` if a parameter has no state."""
    tensors = load_tensors(folder, OPTIMIZER)
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        item, _, name = key.partition("/")
        if name not in by_name:
            raise DamagedError(f"{OPTIMIZER}: no parameter {name!r} in this model")
        parameter = by_name[name]
        # transformers' Adafactor counts its steps in a plain int.
        is_count = value.ndim == 0 and value.dtype == torch.int64
        optimizer.state[parameter][item] = value.item() if is_count else value.to(parameter.device)
    for name, parameter in by_name.items():
        if tensors and parameter not in optimizer.state:
            raise DamagedError(f"{OPTIMIZER}: nothing saved for parameter {name!r}")


def write_state(state: TrainState, timing: Timing, folder: Path) -> None:
    (folder / STATE).write_bytes(dump_json(asdict(state)))
    (folder / TIMING).write_bytes(dump_json(asdict(timing)))


def read_state(folder: Path) -> tuple[TrainState, Timing]:
    """Raises `DamagedError` when a file is not what `write_state` writes."""
    try:
        values: dict[str, Any] = json.loads((folder / STATE).read_bytes())
        timing: dict[str, Any] = json.loads((folder / TIMING).read_bytes())
        return decode(TrainState, values, where=STATE), decode(Timing, timing, where=TIMING)
    except (ConfigError, ValueError) as error:
        raise DamagedError(f"{folder.name}: {error}") from error


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """What changed, as `key -> "old -> new"`."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: f"{old.get(key, 'nothing')} -> {new.get(key, 'nothing')}" for key in keys}
