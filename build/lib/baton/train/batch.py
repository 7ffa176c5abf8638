"""Packed micro-batches: samples end to end in one row, with their edges beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

# What torch's cross-entropy leaves out.
IGNORE = -100


class TokenSource(Protocol):
    """Tokenised samples by number; reading one is O(1)."""

    def __len__(self) -> int: ...

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each sample."""
        ...

    def labelled(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each sample that carry loss."""
        ...

    def sample(self, index: int) -> tuple[NDArray[np.int64], int]:
        """The tokens of a sample and how many of the first ones are prompt."""
        ...


@dataclass(frozen=True)
class PackedBatch:
    """Samples packed into one row of `tokens` tokens.

    Attributes:
        input_ids: `(1, tokens)` int64.
        position_ids: `(1, tokens)` int64, from 0 in every sample.
        labels: `(tokens,)` int64: the token that should follow, or `IGNORE`. The last token
            of a sample never predicts the first of the next.
        lengths: tokens of each sample.
        use_varlen: hand the edges to a variable-length kernel.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]
    use_varlen: bool = False

    def edges(self) -> dict[str, Any]:
        """Keyword arguments that travel through the model to `packed_attention`."""
        if not self.use_varlen:
            return {"packed_lengths": self.lengths}
        running = np.cumsum((0, *self.lengths), dtype=np.int32)
        return {
            "cu_seq_lens_q": torch.from_numpy(running).to(self.input_ids.device),
            "max_length_q": max(self.lengths),
        }


def collate(
    source: TokenSource, indices: Sequence[int], *, device: torch.device, use_varlen: bool
) -> PackedBatch:
    """Pack samples in the order given."""
    ids, labels, positions, lengths = [], [], [], []
    for index in indices:
        tokens, prompt = source.sample(index)
        following = np.full_like(tokens, IGNORE)
        following[max(prompt - 1, 0) : -1] = tokens[max(prompt, 1) :]
        ids.append(tokens)
        labels.append(following)
        positions.append(np.arange(len(tokens)))
        lengths.append(len(tokens))

    def moved(parts: list[NDArray[np.int64]]) -> torch.Tensor:
        row = torch.from_numpy(np.concatenate(parts))
        if device.type == "cuda":
            return row.pin_memory().to(device, non_blocking=True)
        return row

    return PackedBatch(
        moved(ids)[None], moved(positions)[None], moved(labels), tuple(lengths), use_varlen
    )
