"""How samples become micro-batches: packed end to end, or otherwise where a model asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from baton.train.batch import PackedBatch, TokenSource, collate
from baton.train.cursor import Indices
from baton.train.packing import pack


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
