"""The input embedding with rows of its own for the tokens that clara adds."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding


class MemoryEmbedding(torch.nn.Module):  # type: ignore[misc]
    """Looks up ids below `first` in the frozen `base`, those from there on in rows of its own.

    Only the memory rows learn, in float32; the markers' rows behind them stay as they were drawn.
    The base keeps its rows for all ids, which a head tied to it still multiplies with.
    """

    def __init__(self, base: torch.nn.Module, *, first: int, vectors: int) -> None:
        super().__init__()
        self.base = base
        self.first = first
        rows = base.weight.detach()[first:]
        self.memory = torch.nn.Parameter(rows[:vectors].clone().float())
        self.register_buffer("markers", rows[vectors:].clone())

    @property
    def weight(self) -> torch.Tensor:
        """The base's rows, as code that knows plain embeddings asks for them."""
        weight: torch.Tensor = self.base.weight
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of `ids`, any shape, with the width of the model behind it, in the base's dtype."""
        rows: torch.Tensor = self.base(ids)
        own = torch.cat((self.memory.to(rows.dtype), self.markers.to(rows.dtype)))
        added = ids >= self.first
        return torch.where(added[..., None], embedding((ids - self.first).clamp_min(0), own), rows)
