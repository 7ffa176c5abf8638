"""Tensors of which several processes hold a share each: one safetensors file a process.

torch's distributed checkpoint (DCP) plans who writes and reads what. Its own files are pickles,
which could run code, or safetensors with another header at every save; these are neither.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    Metadata,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from baton.errors import DamagedError
from baton.train.tensor_files import save_tensors

FOLDER = "shards"
_OFFSETS = "offsets"


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor in one of the files: where it begins in the whole, and its shape."""

    name: str
    path: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def chunks(folder: Path) -> Iterator[Chunk]:
    """Every part of every tensor below `folder`. Raises `DamagedError` if a header is not ours."""
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            try:
                offsets = json.loads((file.metadata() or {})[_OFFSETS])
                for name in sorted(file.keys()):
                    part = file.get_slice(name)
                    yield Chunk(
                        name,
                        path,
                        tuple(offsets[name]),
                        tuple(part.get_shape()),
                        _DTYPES[part.get_dtype()],
                    )
            except KeyError as error:
                raise DamagedError(f"{FOLDER}/{path.name}: no {error} in its header") from error


def sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole tensors, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for chunk in chunks(folder):
        ends = tuple(o + n for o, n in zip(chunk.offsets, chunk.shape, strict=True))
        known = found.get(chunk.name, ends)
        found[chunk.name] = tuple(map(max, known, ends))
    return found


def read_whole(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, put together, by the rest of their names."""
    whole: dict[str, torch.Tensor] = {}
    shapes = sizes(folder)
    with _Opened() as opened:
        for chunk in chunks(folder):
            if chunk.name.startswith(prefix):
                name = chunk.name.removeprefix(prefix)
                if name not in whole:
                    whole[name] = torch.empty(shapes[chunk.name], dtype=chunk.dtype)
                place = _spans(chunk.offsets, chunk.shape)
                whole[name][place] = opened[chunk.path].get_tensor(chunk.name)
    return whole


def load_tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's safetensors file, put together where it was sharded."""
    if (folder / file).exists() or not (folder / FOLDER).is_dir():
        return load_file(folder / file)
    return read_whole(folder, f"{file}:")


def sharded_bytes(folder: Path, file: str) -> int:
    """What the tensors of a checkpoint's file take in its shards; 0 where it was not sharded."""
    mine = (chunk for chunk in chunks(folder) if chunk.name.startswith(f"{file}:"))
    return sum(math.prod(chunk.shape) * chunk.dtype.itemsize for chunk in mine)


def place_tensors(folder: Path, file: str, target: Path) -> None:
    """Copy a checkpoint's safetensors file to `target`, put together where it was sharded."""
    if (folder / file).exists():
        shutil.copyfile(folder / file, target)
    else:
        save_tensors(load_tensors(folder, file), target)


class ShardWriter(StorageWriter):  # type: ignore[misc]
    """Writes this process's share below `folder`; every file says itself which parts it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    @classmethod
    def planner(cls) -> DefaultSavePlanner:
        """What all processes have alike is written by the first."""
        return DefaultSavePlanner(dedup_save_to_lowest_rank=True)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        count = len(plans)
        return [
            replace(plan, storage_data=f"{number:05d}-of-{count:05d}.safetensors")
            for number, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: Any) -> torch.futures.Future[list[WriteResult]]:
        tensors, offsets = {}, {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            # The last of few rows may leave a process none.
            if tensor.numel():
                tensors[item.index.fqn] = tensor.detach().contiguous()
                offsets[item.index.fqn] = list(item.tensor_data.chunk.offsets)
        header = {_OFFSETS: json.dumps(offsets, sort_keys=True)}
        save_tensors(tensors, self.folder / plan.storage_data, header)
        return _done([WriteResult(item.index, 0, None) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The manifest of the checkpoint is what makes it complete."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


@dataclass
class ShardReader(StorageReader):  # type: ignore[misc]
    """Reads below `folder` what any number of processes wrote."""

    folder: Path
    _paths: dict[tuple[str, tuple[int, ...]], Path] = field(default_factory=dict)

    @classmethod
    def planner(cls) -> DefaultLoadPlanner:
        return DefaultLoadPlanner()

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self) -> Metadata:
        tensors: dict[str, TensorStorageMetadata] = {}
        shapes = sizes(self.folder)
        for chunk in chunks(self.folder):
            entry = tensors.setdefault(
                chunk.name,
                TensorStorageMetadata(
                    TensorProperties(dtype=chunk.dtype), torch.Size(shapes[chunk.name]), []
                ),
            )
            entry.chunks.append(
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
            )
            self._paths[chunk.name, chunk.offsets] = chunk.path
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """All is known from `read_metadata`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> torch.futures.Future[None]:
        with _Opened() as opened:
            for item in plan.items:
                index: MetadataIndex = item.storage_index
                file = opened[self._paths[index.fqn, tuple(index.offset)]]
                part = file.get_slice(index.fqn)[_spans(item.storage_offsets, item.lengths)]
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Opened(dict[Path, Any]):
    """Files opened at first sight, closed together."""

    def __enter__(self) -> _Opened:
        self._stack = ExitStack()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __missing__(self, path: Path) -> Any:
        self[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self[path]


def _spans(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))


def _done(value: Any) -> torch.futures.Future[Any]:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(value)
    return future


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
