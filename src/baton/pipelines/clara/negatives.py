"""Rows of stages 2 and 3 from questions and the document that answers each: the other documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from baton.errors import DataError
from baton.pipelines.clara.rows import SayRow

Negatives = Literal["random", "nearest"]
# Documents compared at once: a block of similarities stays below 100 MB at 50,000 documents.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Fact:
    """A question, its answer, and the number of the document that answers it."""

    question: str
    answer: str
    document: int


def facts_of(rows: Sequence[SayRow]) -> tuple[list[str], list[Fact]]:
    """Every different document of stage 1 rows, and every question of each."""
    numbers: dict[str, int] = {}
    facts: dict[tuple[str, int], Fact] = {}
    for row in rows:
        number = numbers.setdefault(row.document, len(numbers))
        if row.kind == "qa":
            for question, answer in zip(row.questions, row.answers, strict=True):
                facts.setdefault((question, number), Fact(question, answer, number))
    return list(numbers), list(facts.values())


def ask_rows(
    facts: Sequence[Fact],
    documents: Sequence[str],
    *,
    count: int,
    negatives: Negatives,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """A row of `count` documents for every fact, its own at a random place: `pos_index` says where.

    `nearest` takes the other documents that are most like its own (TF-IDF over letters, which
    needs no word boundaries), `random` any others; both follow from `seed`.

    Raises:
        DataError: there are fewer documents than that.
    """
    if len(documents) < count:
        raise DataError(
            f"{len(documents)} different documents are too few for rows of {count}; bring more, or"
            " lower --top-k and --candidates"
        )
    near = _nearest(documents, count - 1) if negatives == "nearest" and count > 1 else {}
    for number, fact in enumerate(facts):
        rng = np.random.Generator(np.random.PCG64([seed & 0xFFFFFFFF, number]))
        if near:
            others = [int(i) for i in rng.permutation(near[fact.document])]
        else:
            drawn = rng.choice(len(documents) - 1, count - 1, replace=False)
            others = [int(i) + (i >= fact.document) for i in drawn]
        place = int(rng.integers(count))
        others.insert(place, fact.document)
        yield {
            "question": fact.question,
            "docs": [documents[i] for i in others],
            "gold_answer": fact.answer,
            "pos_index": [place],
        }


def _nearest(documents: Sequence[str], count: int) -> Mapping[int, Any]:
    """For each document the `count` others most like it; of equals the earlier."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), dtype=np.float32)
    matrix = vectors.fit_transform(documents)
    found: dict[int, Any] = {}
    for first in range(0, len(documents), _BLOCK):
        alike = (matrix[first : first + _BLOCK] @ matrix.T).toarray()
        for row, values in enumerate(alike, start=first):
            values[row] = -1.0
            found[row] = np.argsort(-values, kind="stable")[:count]
    return found
