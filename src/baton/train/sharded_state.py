"""A run's weights and optimizer, of which every process saves and loads its share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from baton.errors import ConfigError, DamagedError, StoreError
from baton.store.base import explained
from baton.train.ranks import Ranks
from baton.train.shard_files import ShardReader, ShardWriter, sizes
from baton.train.state import OPTIMIZER, SpreadWeights


@dataclass(frozen=True, kw_only=True)
class ShardedState:
    """The files of other checkpoints, tensor by tensor: `FILE:NAME`, below `shards/`.

    Any number of processes loads what any other number saved, one process included.
    """

    ranks: Ranks
    weights: SpreadWeights
    optimizer: torch.optim.Optimizer
    names: Mapping[torch.nn.Parameter, str]

    def save(self, folder: Path) -> None:
        """Write this process's share; all must call this, and all have written when it returns.

        Raises:
            StoreError: a process could not write.
        """
        tensors = self._weights()
        for parameter, items in self.optimizer.state.items():
            for item, value in items.items():
                tensors[f"{OPTIMIZER}:{item}/{self.names[parameter]}"] = torch.as_tensor(value)
        if self.ranks.rank == 0:
            self.weights.describe(folder)
        self._together(
            dcp.save,
            tensors,
            storage_writer=ShardWriter(folder),
            planner=ShardWriter.planner(),
        )

    def load(self, folder: Path) -> None:
        """Fill this process's share; all must call this.

        Raises:
            DamagedError: the tensors there are not those of this model.
        """
        tensors = self._weights()
        saved = sizes(folder)
        prefix = f"{OPTIMIZER}:"
        odd = tensors.keys() ^ {key for key in saved if not key.startswith(prefix)}
        if odd:
            raise DamagedError(f"{folder.name}: these weights do not match: {sorted(odd)[:3]}")
        by_name = {name: parameter for parameter, name in self.names.items()}
        for key, shape in saved.items():
            if not key.startswith(prefix):
                continue
            item, _, name = key.removeprefix(prefix).partition("/")
            if name not in by_name:
                raise DamagedError(f"{OPTIMIZER}: no parameter {name!r} in this model")
            tensors[key] = self._moment(by_name[name], item, shape)
        for name, parameter in by_name.items():
            if len(tensors) > len(self._weights()) and parameter not in self.optimizer.state:
                raise DamagedError(f"{OPTIMIZER}: nothing saved for parameter {name!r}")
        self._together(
            dcp.load,
            tensors,
            storage_reader=ShardReader(folder),
            planner=ShardReader.planner(),
        )

    def _weights(self) -> dict[str, torch.Tensor]:
        tensors = self.weights.tensors()
        return {f"{self.weights.file}:{name}": tensor for name, tensor in tensors.items()}

    def _moment(
        self, parameter: torch.nn.Parameter, item: str, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """An empty tensor of the optimizer's state, spread as its parameter is."""
        like = tuple(parameter.shape) == shape
        empty = (
            torch.zeros_like(parameter, dtype=torch.float32)
            if like
            else torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        )
        self.optimizer.state[parameter][item] = empty
        return empty

    def _together(self, work: Callable[..., Any], tensors: dict[str, Any], **options: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                work(
                    tensors,
                    process_group=self.ranks.control,
                    no_dist=self.ranks.size == 1,
                    **options,
                )
        except dcp.api.CheckpointException as error:
            # Of several processes the first says why; it is no Exception, so nobody else would.
            _, (reason, _) = min(error.failures.items())
            if isinstance(reason, OSError):
                raise explained(reason, "writing a share of the checkpoint") from reason
            raise StoreError(f"a share of the checkpoint: {reason}") from reason


def require_shared(folder: Path, ranks: Ranks) -> None:
    """Raises `ConfigError` unless all processes see one folder: each writes its share there."""
    mark = folder / ".shared-by-all"
    if ranks.rank == 0:
        mark.touch()
    ranks.gather(None)
    is_missing = not mark.exists()
    missing = ranks.agree(is_missing)[0]
    if ranks.rank == 0:
        mark.unlink()
    if missing:
        raise ConfigError(
            f"train.sharding: full needs a folder that all processes share, and {folder} is not on"
            " every machine; put the store, or BATON_SCRATCH, on a shared file system"
        )
