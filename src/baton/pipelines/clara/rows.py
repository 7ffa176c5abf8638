"""Rows of the three stages: read, checked, every mistake named with its line and field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.data.examined import examine_rows, required
from baton.pipelines.clara.memory import is_reserved_in

_GOLD = ("gold_answer", "answer", "answers", "golden_answers")
_KINDS = ("qa", "paraphrase")
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SayRow:
    """A row of stage 1: one document, and what it says as questions and answers or otherwise."""

    number: int
    line: int
    kind: str
    document: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def documents(self) -> tuple[str, ...]:
        return (self.document,)


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRow:
    """A row of stage 2 or 3: a question, documents, and every answer that counts as right.

    `positives` are indices of the documents that support the answer, None where nobody said.
    """

    number: int
    line: int
    question: str
    documents: tuple[str, ...]
    golds: tuple[str, ...]
    positives: tuple[int, ...] | None


Row = SayRow | AskRow


def read_say(path: Path) -> list[SayRow]:
    """Rows of stage 1. Raises `DataError` with every mistake."""
    return required(path, *examine_say(path), shown=_SHOWN_PROBLEMS)


def read_ask(path: Path, *, least: int, most: int | None = None) -> list[AskRow]:
    """Rows of stage 2 (`least` and `most` are top_k) or stage 3. Raises `DataError`."""
    return required(path, *examine_ask(path, least=least, most=most), shown=_SHOWN_PROBLEMS)


def examine_say(path: Path) -> tuple[list[SayRow], list[str]]:
    """The good rows of stage 1, and `file:line: field: what, what to do` for every mistake."""
    return examine_rows(path, _say_mistakes, _say_row)


def examine_ask(
    path: Path, *, least: int, most: int | None = None
) -> tuple[list[AskRow], list[str]]:
    """The same for stages 2 and 3; a row has at least `least` and at most `most` documents."""
    return examine_rows(path, lambda record: _ask_mistakes(record, least, most), _ask_row)


def _say_row(number: int, line: int, record: Any) -> SayRow:
    return SayRow(
        number=number,
        line=line,
        kind=record["data_type"],
        document=record["docs"][0],
        questions=tuple(record.get("question") or ()) if record["data_type"] == "qa" else (),
        answers=tuple(record["answers"]),
    )


def _ask_row(number: int, line: int, record: Any) -> AskRow:
    gold = record[next(key for key in _GOLD if record.get(key) is not None)]
    positives = record.get("pos_index")
    return AskRow(
        number=number,
        line=line,
        question=record["question"],
        documents=tuple(record["docs"]),
        golds=(gold,) if isinstance(gold, str) else tuple(gold),
        positives=None if positives is None else tuple(positives),
    )


def _say_mistakes(record: object) -> Iterator[str]:
    if not isinstance(record, dict):
        yield _not_an_object(record, "data_type, question, answers, docs")
        return
    kind = record.get("data_type")
    if kind not in _KINDS:
        yield f"data_type: expected qa or paraphrase, got {kind!r}"
    yield from _texts(record, "docs")
    documents = record.get("docs")
    if isinstance(documents, list) and len(documents) != 1:
        yield f"docs: stage 1 takes one document a row, got {len(documents)}"
    yield from _texts(record, "answers")
    if kind == "qa":
        yield from _texts(record, "question")
        questions, answers = record.get("question"), record.get("answers")
        counts = [len(texts) if isinstance(texts, list) else 0 for texts in (questions, answers)]
        if all(counts) and counts[0] != counts[1]:
            yield f"answers: {counts[1]} answers to {counts[0]} questions; each needs one"


def _ask_mistakes(record: object, least: int, most: int | None) -> Iterator[str]:
    if not isinstance(record, dict):
        yield _not_an_object(record, "question, docs, gold_answer")
        return
    yield from _text(record.get("question"), "question", record)
    yield from _texts(record, "docs")
    documents = record.get("docs")
    count = len(documents) if isinstance(documents, list) else None
    if count is not None and count < least:
        yield (
            f"docs: {count} documents are fewer than top_k ({least}); add documents, or lower top_k"
        )
    if count is not None and most is not None and count > most:
        yield f"docs: {count} documents, this stage takes exactly top_k ({most})"
    given = [key for key in _GOLD if record.get(key) is not None]
    if not given:
        yield _missing(record, "gold_answer")
    elif isinstance(record[given[0]], list):
        yield from _texts(record, given[0])
    else:
        yield from _text(record[given[0]], given[0], record)
    yield from _positives(record.get("pos_index"), count)


def _positives(positives: object, count: int | None) -> Iterator[str]:
    if positives is None or count is None:
        return
    if not isinstance(positives, list) or any(type(index) is not int for index in positives):
        yield f"pos_index: expected a list of positions in docs, got {positives!r}"
        return
    for index in positives:
        if not 0 <= index < count:
            yield f"pos_index: there is no document {index}; docs has 0 to {count - 1}"
    if len(set(positives)) < len(positives):
        yield f"pos_index: names a document twice: {positives}"


def _texts(record: Mapping[str, Any], key: str) -> Iterator[str]:
    value = record.get(key)
    if value is None:
        yield _missing(record, key)
    elif not isinstance(value, list) or not value:
        yield f"{key}: expected a list of texts, got {_short(value)}"
    else:
        for index, text in enumerate(value):
            yield from _text(text, f"{key}[{index}]", record)


def _text(value: object, where: str, record: Mapping[str, Any]) -> Iterator[str]:
    if value is None:
        yield _missing(record, where)
    elif not isinstance(value, str):
        yield f"{where}: expected text, got {_short(value)}"
    elif not value.strip():
        yield f"{where}: empty; fill it in, or remove the row"
    elif (word := is_reserved_in(value)) is not None:
        yield f"{where}: holds {word}, which is a token of this method; write it otherwise"
    elif not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        yield f"{where}: holds half a surrogate pair; write the character whole"


def _not_an_object(record: object, fields: str) -> str:
    if isinstance(record, Exception):
        return f"row: not JSON ({record}); write one object a line"
    return f"row: a JSON {type(record).__name__}, expected an object with {fields}"


def _missing(record: Mapping[str, Any], key: str) -> str:
    near = difflib.get_close_matches(key, list(record), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(record) or 'nothing'}"
    return f"{key}: missing; {hint}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def golds_of(rows: Sequence[AskRow]) -> list[str]:
    """The first right answer of each row: what is learnt."""
    return [row.golds[0] for row in rows]
