"""The keys and values of many sequences, in pages of one pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

PAGE = 64  # tokens; also what one turn of the decoding kernel reads


@dataclass
class Pages:
    """A pool of pages for every layer, and which of them are free.

    Page 0 belongs to nobody: sequences that have ended write there.

    Attributes:
        count: pages, page 0 included.
        layers: keys and values of a layer by its number, each `(count * PAGE, kv_heads, width)`;
            made when the layer first writes.
    """

    count: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = list(range(self.count - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, tokens: int) -> list[int]:
        """Pages for a sequence of so many tokens, `pages_for(tokens)` of those that are free."""
        return [self._free.pop() for _ in range(pages_for(tokens))]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(reversed(pages))

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `(tokens, kv_heads, width)` at `slots`; returns all of the layer."""
        if layer not in self.layers:
            shape = (self.count * PAGE, *key.shape[1:])
            self.layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self.layers[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)
