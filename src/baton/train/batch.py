"""Packed micro-batches: samples end to end in one row, with their edges beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

# Samples of no tokens fill a pack's edges up to a multiple of this.
_EDGE_STEP = 16
_LEAST_LONGEST = 512


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
        predicts: `(labelled,)` int64: positions whose next token carries loss. The last token
            of a sample never predicts the first of the next.
        labels: `(labelled,)` int64: those next tokens.
        lengths: tokens of each sample; pads are samples too, of no labels.
        edges: running sums of `lengths` for a variable-length kernel, int32 on the device,
            with the last one repeated; None where each sample is attended to by itself.
        longest: at least the tokens of the longest sample, for that kernel.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predicts: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]
    edges: torch.Tensor | None = None
    longest: int = 0

    def attention(self) -> dict[str, Any]:
        """Keyword arguments that travel through the model to `packed_attention`."""
        if self.edges is None:
            return {"packed_lengths": self.lengths}
        return {"cu_seq_lens_q": self.edges, "max_length_q": self.longest}


def collate(
    source: TokenSource,
    indices: Sequence[int],
    *,
    device: torch.device,
    pad_to: int | None = None,
) -> PackedBatch:
    """Pack samples in the order given.

    With `pad_to` the pack is filled up to a multiple of so many tokens, and has edges for a
    variable-length kernel.
    """
    samples = [source.sample(index) for index in indices]
    lengths = [len(tokens) for tokens, _ in samples]
    starts = np.cumsum([0, *lengths])
    predicts = [
        np.arange(start + max(prompt - 1, 0), start + len(tokens) - 1)
        for start, (tokens, prompt) in zip(starts, samples, strict=False)
    ]
    labels = [tokens[max(prompt, 1) :] for tokens, prompt in samples]
    # One of few values: compiled code is made anew when a number becomes another.
    longest = max(_LEAST_LONGEST, 1 << (max(lengths) - 1).bit_length())
    pads = _pads(-int(starts[-1]) % pad_to, longest) if pad_to else []
    everything = [*lengths, *pads]
    ids = [*(tokens for tokens, _ in samples), np.zeros(sum(pads), np.int64)]

    def moved(row: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(row)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    return PackedBatch(
        input_ids=moved(np.concatenate(ids))[None],
        position_ids=moved(np.concatenate([np.arange(n) for n in everything]))[None],
        predicts=moved(np.concatenate(predicts)),
        labels=moved(np.concatenate(labels)),
        lengths=tuple(everything),
        edges=moved(_edges(everything)) if pad_to else None,
        longest=longest,
    )


def _pads(missing: int, longest: int) -> list[int]:
    """Lengths of the pads that fill `missing` tokens, none longer than the longest sample."""
    full, rest = divmod(missing, longest)
    return [longest] * full + [rest] * bool(rest)


def _edges(lengths: Sequence[int]) -> NDArray[np.int32]:
    """Running sums from 0; the number of them grows in steps, so that few shapes occur."""
    missing = -len(lengths) % _EDGE_STEP
    return np.cumsum([0, *lengths, *[0] * missing], dtype=np.int32)
