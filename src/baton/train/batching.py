"""How samples become micro-batches: packed end to end, or otherwise where a model asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from baton.train.attention import can_use_varlen
from baton.train.batch import PackedBatch, TokenSource, collate
from baton.train.cursor import Indices
from baton.train.packing import pack
from baton.train.precision import Precision

# Matrix products like even sizes; the pads are a percent or two of a full pack.
_PAD_TO = 256


def pad_multiple(device: torch.device, precision: Precision) -> int | None:
    """What packs are filled up to a multiple of, where a variable-length kernel is to be used."""
    return _PAD_TO if can_use_varlen(device) and precision.is_half else None


@dataclass(frozen=True)
class Whole:
    """What all micro-batches of a step have together, on all ranks."""

    samples: int
    labelled: int


@dataclass(frozen=True)
class Idle:
    """A micro-batch that counts nothing: its rank takes part in what another one computes."""

    batch: Any


def shortest(source: TokenSource, indices: Indices) -> Indices:
    """The one of some samples that has the fewest tokens."""
    return indices[[int(source.lengths(indices).argmin())]]


class Batching(Protocol):
    """Cuts the samples of one step and makes what the loss of a run takes."""

    def cut(
        self, source: TokenSource, indices: Indices, *, ranks: int, budget: int
    ) -> list[list[list[int]]]:
        """For each rank its micro-batches, each a list of positions in `indices`.

        A pure function of its arguments, so that every rank computes all shares without
        asking the others. Every position occurs exactly once. `budget` is tokens a micro-batch.
        """
        ...

    def collate(self, source: TokenSource, indices: Indices, *, budget: int) -> Any:
        """One micro-batch, on its device."""
        ...

    def least(self, source: TokenSource, indices: Indices) -> int:
        """The smallest budget that is of use: no micro-batch gets smaller below it."""
        ...


@dataclass(frozen=True)
class Packed:
    """Samples end to end in one row, for causal models; `pad_to` as for `collate`."""

    device: torch.device
    pad_to: int | None

    def cut(
        self, source: TokenSource, indices: Indices, *, ranks: int, budget: int
    ) -> list[list[list[int]]]:
        return pack(source.lengths(indices).tolist(), ranks=ranks, budget=budget)

    def collate(self, source: TokenSource, indices: Indices, *, budget: int) -> PackedBatch:
        return collate(source, indices.tolist(), device=self.device, pad_to=self.pad_to)

    def least(self, source: TokenSource, indices: Indices) -> int:
        return int(source.lengths(indices).max())
