"""TF-IDF similarity against many texts, many times a second.

Numbers are those of scikit-learn's `TfidfVectorizer(max_features=…)` with `cosine_similarity`,
fitted anew on every call as the published reward does: lower-cased words of two or more
characters, smooth idf, rows of length 1. Of words that are equally frequent at the limit the
same ones are chosen, because the same sort is asked.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

_WORD = re.compile(r"(?u)\b\w\w+\b")
# What novelty and diversity are where no text has a word.
UNKNOWN = 0.5


def words(text: str) -> Counter[str]:
    """How often each word occurs."""
    return Counter(_WORD.findall(text.lower()))


def _most_frequent(totals: Floats, limit: int) -> Places:
    """Places of the `limit` largest; `totals` is in the alphabetical order of the words."""
    if len(totals) <= limit:
        return np.arange(len(totals))
    # Not stable: among equals it must choose as scikit-learn does, with this very call.
    return (-totals).argsort()[:limit]


def _idf(documents: int, frequency: Floats) -> Floats:
    weights: Floats = np.log((1 + documents) / (1 + frequency)) + 1
    return weights


class History:
    """The last texts, up to `capacity`, and how similar the nearest of them is to another.

    Each word has a row in a table of counts and each text a column, so that a text comes and goes
    without touching the others. What all texts contribute to their lengths is kept between two
    questions; only words that a question has, or moves across the limit, are looked up anew.
    """

    def __init__(self, capacity: int = 1000, *, features: int = 100) -> None:
        self._features = features
        self._texts: deque[tuple[int, Counter[str]]] = deque()
        self._columns = list(range(capacity))
        self._words: list[str] = []  # in alphabetical order
        self._row_of: dict[str, int] = {}
        self._rows: list[int] = []  # without a word, to be given to the next ones
        self._counts = np.zeros((0, capacity), dtype=np.uint16)
        self._totals, self._frequency = np.zeros(0), np.zeros(0)
        self._base: _Base | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Append a text; the oldest goes where there are more than `capacity`."""
        if not self._columns:
            self._forget()
        self._base = None
        counted = words(text)
        for word in counted.keys() - self._row_of.keys():
            self._insert(word)
        column = self._columns.pop()
        self._texts.append((column, counted))
        rows, counts = self._split(counted)
        self._totals[rows] += counts
        self._frequency[rows] += 1
        self._counts[rows, column] = counts

    def novelty(self, text: str) -> float:
        """1 - the largest cosine of `text` with a text of the history; 1 if there is none."""
        if not self._texts:
            return 1.0
        counted = words(text)
        fresh = sorted(counted.keys() - self._row_of.keys())
        if not self._words and not fresh:
            return UNKNOWN
        rows, counts = self._split({w: n for w, n in counted.items() if w in self._row_of})
        chosen, fresh_kept = self._chosen(rows, counts, fresh, counted)
        documents = len(self._texts) + 1
        is_kept = chosen[rows]
        rows, counts = rows[is_kept], counts[is_kept]
        idf = _idf(documents, self._frequency[rows] + 1)
        weights = counts * idf
        rare = np.array([counted[word] for word in fresh_kept]) * _idf(documents, np.ones(1))
        length = np.sqrt(weights @ weights + rare @ rare)
        if not len(rows):
            return 1.0
        base = self._base or self._look_up()
        moved = np.flatnonzero(chosen != base.chosen)
        table = self._counts[np.concatenate([rows, moved])].astype(np.float64)
        products = (weights * idf) @ table[: len(rows)]
        signs = np.where(chosen[moved], 1.0, -1.0)
        change = np.concatenate([idf**2 - base.idf[rows] ** 2, signs * base.idf[moved] ** 2])
        squares = base.squares + change @ (table * table)
        # A text with any chosen word has a square of at least 1.
        lengths = np.sqrt(np.where(squares > 0.5, squares, 1.0))
        return float(1 - (products / lengths).max() / length)

    def _chosen(
        self, rows: Places, counts: Floats, fresh: Sequence[str], counted: Mapping[str, int]
    ) -> tuple[NDArray[np.bool_], list[str]]:
        """Which rows, and which words without one, are among the most frequent with this text."""
        totals = self._totals.copy()
        totals[rows] += counts
        if len(self._words) + len(fresh) <= self._features:
            return totals > 0, list(fresh)
        theirs = np.array([counted[word] for word in fresh], dtype=np.float64)
        every = np.concatenate([totals, theirs])
        least = np.partition(every, -self._features)[-self._features]
        is_in = every >= least
        if np.count_nonzero(is_in) > self._features:
            base = self._base or self._look_up()
            at = [bisect.bisect_left(self._words, word) for word in fresh]
            places = np.insert(base.ordered, at, np.arange(len(totals), len(every)))
            is_in = np.zeros(len(every), dtype=bool)
            is_in[places[_most_frequent(every[places], self._features)]] = True
        kept = [word for word, is_kept in zip(fresh, is_in[len(totals) :], strict=True) if is_kept]
        return is_in[: len(totals)], kept

    def _look_up(self) -> _Base:
        """The words most frequent without a question, and the lengths of all texts by them."""
        count = min(self._features, len(self._words))
        chosen = np.zeros(len(self._totals), dtype=bool)
        chosen[np.argpartition(self._totals, -count)[-count:]] = True
        idf = _idf(len(self._texts) + 1, self._frequency)
        table = self._counts[chosen].astype(np.float64)
        ordered = np.fromiter((self._row_of[w] for w in self._words), np.int64, len(self._words))
        self._base = _Base(chosen, idf, idf[chosen] ** 2 @ (table * table), ordered)
        return self._base

    def _split(self, counted: Mapping[str, int]) -> tuple[Places, Floats]:
        """Rows of words that have one, and their counts."""
        rows = np.fromiter((self._row_of[word] for word in counted), np.int64, len(counted))
        return rows, np.fromiter(counted.values(), np.float64, len(counted))

    def _insert(self, word: str) -> None:
        if not self._rows:
            size = len(self._counts)
            more = max(size, 256)
            grown = np.zeros((size + more, self._counts.shape[1]), dtype=np.uint16)
            grown[:size] = self._counts
            self._counts, self._rows = grown, list(range(size, size + more))
            self._totals = np.concatenate([self._totals, np.zeros(more)])
            self._frequency = np.concatenate([self._frequency, np.zeros(more)])
        self._row_of[word] = self._rows.pop()
        bisect.insort(self._words, word)

    def _forget(self) -> None:
        column, counted = self._texts.popleft()
        self._columns.append(column)
        rows, counts = self._split(counted)
        self._totals[rows] -= counts
        self._frequency[rows] -= 1
        self._counts[rows, column] = 0
        for word in [w for w in counted if not self._totals[self._row_of[w]]]:
            self._rows.append(self._row_of.pop(word))
            del self._words[bisect.bisect_left(self._words, word)]


@dataclass(frozen=True)
class _Base:
    """What does not depend on a question.

    Attributes:
        chosen: rows of the most frequent words.
        idf: of all rows.
        squares: of the lengths of all texts by the chosen words.
        ordered: rows in the alphabetical order of their words.
    """

    chosen: NDArray[np.bool_]
    idf: Floats
    squares: Floats
    ordered: Places


def diversity(group: Sequence[str], *, features: int = 50) -> list[float]:
    """For each text of a group: 1 - the mean cosine between all texts and this one once more.

    1 for a group of at most one; 0.5 where no text has a word.
    """
    if len(group) <= 1:
        return [1.0] * len(group)
    counted = [words(text) for text in group]
    names = sorted({word for counts in counted for word in counts})
    if not names:
        return [UNKNOWN] * len(group)
    table = np.array([[float(counts[word]) for word in names] for counts in counted])
    return [_diversity(np.concatenate([table, row[None]]), features) for row in table]


def _diversity(table: Floats, features: int) -> float:
    table = table[:, _most_frequent(table.sum(axis=0), features)]
    weights = table * _idf(len(table), (table > 0).sum(axis=0).astype(np.float64))
    lengths = np.sqrt(np.einsum("tw,tw->t", weights, weights))
    weights /= np.where(lengths > 0, lengths, 1.0)[:, None]
    cosines = weights @ weights.T
    count = len(table)
    return float(1 - (cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


class Nearest:
    """A fixed set of texts, and how similar the nearest of them is to another.

    TF-IDF over all words of the set; the words that only the other text has count for its length.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counted = [words(text) for text in texts]
        frequency = Counter(word for counts in counted for word in counts)
        self._count = len(texts)
        self._idf = {
            word: float(np.log((1 + self._count) / (1 + n)) + 1) for word, n in frequency.items()
        }
        self._rare = float(np.log(1 + self._count) + 1)
        found: dict[str, list[tuple[int, float]]] = {word: [] for word in frequency}
        for number, counts in enumerate(counted):
            length = np.sqrt(sum((n * self._idf[w]) ** 2 for w, n in counts.items()))
            for word, n in counts.items():
                found[word].append((number, n * self._idf[word] / length))
        self._found = {
            word: (np.array([i for i, _ in rows]), np.array([x for _, x in rows]))
            for word, rows in found.items()
        }

    def novelty(self, text: str) -> float:
        """1 - the largest cosine; 1 for an empty set, 0 for a text without words."""
        counts = words(text)
        if not counts:
            return 0.0
        if not self._count:
            return 1.0
        weights = {word: n * self._idf.get(word, self._rare) for word, n in counts.items()}
        length = float(np.sqrt(sum(value * value for value in weights.values())))
        cosines = np.zeros(self._count)
        for word, weight in weights.items():
            if word in self._found:
                numbers, values = self._found[word]
                cosines[numbers] += weight * values
        return float(max(0.0, 1 - cosines.max() / length))
