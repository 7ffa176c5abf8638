"""Micro-batches of clara: prompts, documents and queries, each packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from baton.data.tokenise import TokenFile
from baton.train.batch import PackedBatch, TokenSource, collate
from baton.train.cursor import Indices


class ClaraSource:
    """The samples of a stage: prompts with answers, and which documents each of them has.

    What a sample costs is the tokens of its prompt, of its documents, and of its query if any.
    """

    def __init__(self, folder: Path, name: str, *, has_queries: bool, most: int | None) -> None:
        stage = folder / name.partition("/")[0]
        part = name.partition("/")[2]
        self.turns = TokenFile(stage, part)
        self.lists = TokenFile(stage, f"{part}_documents")
        self.queries = TokenFile(stage, f"{part}_queries") if has_queries else None
        self.documents = TokenFile(folder, "documents")
        self._most = most

    def __len__(self) -> int:
        return len(self.turns) if self._most is None else min(self._most, len(self.turns))

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths = self.turns.lengths(indices)
        if self.queries is not None:
            lengths = lengths + self.queries.lengths(indices)
        of_documents = [self.documents.lengths(self.numbers(int(i))).sum() for i in indices]
        return lengths + np.array(of_documents, dtype=np.int64)

    def labelled(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.turns.labelled(indices)

    def sample(self, index: int) -> tuple[NDArray[np.int64], int]:
        return self.turns.sample(index)

    def numbers(self, index: int) -> NDArray[np.int64]:
        """Which documents a sample has, in its order."""
        return self.lists.sample(index)[0]


@dataclass(frozen=True)
class PackedTexts:
    """Texts to be encoded, packed.

    Attributes:
        pack: their tokens; each text ends in its memory tokens.
        memory: `(texts * vectors,)` int64: where the memory tokens are.
        lengths: tokens of each text, memory tokens included.
    """

    pack: PackedBatch
    memory: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class ClaraBatch:
    """One micro-batch.

    Attributes:
        turns: prompts and answers.
        slots: `(slots,)` int64: where in them a vector stands.
        documents: what is encoded.
        numbers: for each sample its documents, as positions in `documents`.
        queries: one of each sample, where documents are to be chosen.
    """

    turns: PackedBatch
    slots: torch.Tensor
    documents: PackedTexts
    numbers: tuple[tuple[int, ...], ...]
    queries: PackedTexts | None

    @property
    def samples(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, kw_only=True)
class BySamples:
    """Micro-batches of consecutive samples: a budget holds as many as fit at their fullest.

    Attributes:
        full: the most tokens that a sample can cost.
        memory_ids: first and one past the last id of the memory tokens.
        share_documents: encode a document once that several samples of a micro-batch have; only
            where neither gradient nor dropout tells the two apart.
        pad_to: as for `baton.train.batch.collate`.
    """

    device: torch.device
    full: int
    memory_ids: tuple[int, int]
    share_documents: bool
    pad_to: int | None

    def cut(
        self, source: TokenSource, indices: Indices, *, ranks: int, budget: int
    ) -> list[list[list[int]]]:
        size = max(1, budget // self.full)
        pieces = [
            list(range(first, min(first + size, len(indices))))
            for first in range(0, len(indices), size)
        ]
        return [pieces[rank::ranks] for rank in range(ranks)]

    def least(self, source: TokenSource, indices: Indices) -> int:
        return self.full

    def collate(self, source: TokenSource, indices: Indices, *, budget: int) -> ClaraBatch:
        """One micro-batch, on its device; of a `ClaraSource` only."""
        assert isinstance(source, ClaraSource), "prompts alone cannot be encoded"
        lists = [source.numbers(int(index)).tolist() for index in indices]
        flat = [number for numbers in lists for number in numbers]
        encoded = list(dict.fromkeys(flat)) if self.share_documents else flat
        place = {number: position for position, number in enumerate(encoded)}
        numbers, start = [], 0
        for own in lists:
            if self.share_documents:
                numbers.append(tuple(place[number] for number in own))
            else:
                numbers.append(tuple(range(start, start + len(own))))
            start += len(own)
        turns = collate(source.turns, indices.tolist(), device=self.device, pad_to=self.pad_to)
        queries = source.queries
        return ClaraBatch(
            turns=turns,
            slots=self._slots(source, indices),
            documents=self.texts(source.documents, encoded),
            numbers=tuple(numbers),
            queries=None if queries is None else self.texts(queries, indices.tolist()),
        )

    def texts(self, source: TokenSource, numbers: Sequence[int]) -> PackedTexts:
        """Texts of a source, to be encoded."""
        lengths = source.lengths(np.asarray(numbers, dtype=np.int64)).tolist()
        return PackedTexts(
            pack=collate(source, numbers, device=self.device, pad_to=self.pad_to),
            memory=self._moved(memory_positions(lengths, self.vectors)),
            lengths=tuple(lengths),
        )

    @property
    def vectors(self) -> int:
        return self.memory_ids[1] - self.memory_ids[0]

    def _slots(self, source: ClaraSource, indices: Indices) -> torch.Tensor:
        first, end = self.memory_ids
        tokens = np.concatenate([source.sample(int(index))[0] for index in indices])
        return self._moved(np.flatnonzero((tokens >= first) & (tokens < end)))

    def _moved(self, array: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def memory_positions(lengths: Sequence[int], vectors: int) -> NDArray[np.int64]:
    """Where the last `vectors` tokens of each text of a pack are."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    return (ends[:, None] - vectors + np.arange(vectors)[None, :]).reshape(-1)
