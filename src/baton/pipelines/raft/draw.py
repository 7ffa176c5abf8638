"""Which documents a row shows and in which order: a pure function of seed, row and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from baton.data.chunks import same
from baton.pipelines.raft.config import RaftData
from baton.pipelines.raft.format import Format
from baton.pipelines.raft.rows import Row

# Streams of random numbers that must not follow from each other.
_PRESENCE, _CHOICE, _ORDER = 1, 2, 3
# So many tries of a random document before giving up on finding one that is no duplicate.
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as a student sees it in one epoch: `oracle` is an index, None where it is absent."""

    documents: tuple[str, ...]
    oracle: int | None
    target: str


class Draw:
    """Shows rows as the configuration says; other rows lend documents where one has too few.

    With probability `p` the oracle is among the documents, beside `distractors` others; else a
    further distractor stands in its place. Presence and choice are drawn once a row, the order
    anew each epoch. Documents that the target cites or quotes are always chosen.
    """

    def __init__(self, data: RaftData, format: Format, rows: Sequence[Row]) -> None:
        self._data, self._format = data, format
        texts = {same(text): text for row in rows for text in row.documents}
        self._keys, self._texts = list(texts), list(texts.values())

    def is_present(self, row: Row) -> bool:
        """Does training show this row with its oracle?"""
        if row.oracle is None:
            return False
        if self._data.absent_target == "shown" and row.absent_answer is None:
            return True
        return bool(self._rng(_PRESENCE, row).random() < self._data.p)

    def shown(self, row: Row, *, epoch: int = 0, present: bool | None = None) -> Shown:
        """The row in an epoch; `present` overrules the draw."""
        if present is None:
            present = self.is_present(row)
        present = present and row.oracle is not None
        target = self._target(row, present)
        # Places in the file, or None for a document of another row.
        chosen = self._chosen(row, present, target)
        order = self._rng(_ORDER, row, epoch).permutation(len(chosen))
        placed = [chosen[i] for i in order]
        where = {place: index for index, (place, _) in enumerate(placed) if place is not None}
        if not present and row.oracle is not None and placed:
            # A citation of the oracle that nobody sees goes with what stands in its place.
            where.setdefault(row.oracle, int(np.argmax(order == 0)))

        def renumber(number: int) -> int:
            return where[number - 1] + 1 if number - 1 in where else number

        return Shown(
            tuple(text for _, text in placed),
            where[row.oracle] if present and row.oracle is not None else None,
            self._format.renumbered(target, renumber),
        )

    def reference(self, row: Row, present: bool) -> str:
        """What a perfect student would answer."""
        return self._target(row, present)

    def _target(self, row: Row, present: bool) -> str:
        if present or row.absent_answer is None or self._data.absent_target == "oracle":
            return row.answer
        return row.absent_answer

    def _chosen(self, row: Row, present: bool, target: str) -> list[tuple[int | None, str]]:
        """The documents to show: first the oracle or what replaces it, then distractors."""
        rng = self._rng(_CHOICE, row)
        own = [i for i in range(len(row.documents)) if i != row.oracle]
        kept = self._evidence(row, own, target)
        others = [i for i in rng.permutation(own).tolist() if i not in kept]
        wanted = self._data.distractors + (not present)
        places = [*kept, *others][: max(wanted, len(kept))]
        chosen: list[tuple[int | None, str]] = [(i, row.documents[i]) for i in places]
        if len(chosen) < wanted:
            chosen += [(None, text) for text in self._lent(row, wanted - len(chosen), rng)]
        if present and row.oracle is not None:
            chosen.insert(0, (row.oracle, row.documents[row.oracle]))
        return chosen

    def _lent(self, row: Row, count: int, rng: np.random.Generator) -> Iterator[str]:
        """Documents of other rows, as far as there are any that this row does not have."""
        taken = {same(text) for text in row.documents}
        for _ in range(_TRIES):
            if count == 0:
                break
            lent = int(rng.integers(len(self._texts)))
            if self._keys[lent] not in taken:
                taken.add(self._keys[lent])
                count -= 1
                yield self._texts[lent]

    def _evidence(self, row: Row, own: list[int], target: str) -> list[int]:
        """Distractors that the target cites or quotes from."""
        cited = self._format.cited(target)
        quotes = [same(quote) for quote in self._format.quotes_of(target) if quote]
        if not cited and not quotes:
            return []
        return [
            i
            for i in own
            if i + 1 in cited or any(quote in same(row.documents[i]) for quote in quotes)
        ]

    def _rng(self, stream: int, row: Row, *more: int) -> np.random.Generator:
        seed = [self._data.seed & 0xFFFFFFFF, stream, row.number, *more]
        return np.random.Generator(np.random.PCG64(seed))
