"""RAFT rows: a question, its documents, a teacher's answer; read whole, every mistake named."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.data.chunks import same
from baton.data.examined import examine_rows, required

ORACLE, DISTRACTOR = "oracle", "distractor"
_KINDS = (ORACLE, DISTRACTOR)
_FIELDS = ("question", "documents", "teacher_answer", "absent_answer")
# Of more mistakes than that, the first ones and their number say enough.
_SHOWN_PROBLEMS = 50


@dataclass(frozen=True, slots=True)
class Row:
    """A row as the file holds it; documents are numbered from 1 in what answers cite.

    Attributes:
        number: its place in the file, from 1; `line` is where it starts.
        documents: contents; `oracle` is the index of the one that holds the answer.
        answer: the teacher's, with the oracle at hand if there is one.
        absent_answer: the teacher's without the oracle, from the distractors alone.
    """

    number: int
    line: int
    question: str
    documents: tuple[str, ...]
    oracle: int | None
    answer: str
    absent_answer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as `read` takes it."""
        kinds = [ORACLE if i == self.oracle else DISTRACTOR for i in range(len(self.documents))]
        row = {
            "question": self.question,
            "documents": [
                {"content": content, "type": kind}
                for content, kind in zip(self.documents, kinds, strict=True)
            ],
            "teacher_answer": self.answer,
        }
        return row if self.absent_answer is None else row | {"absent_answer": self.absent_answer}


def read(path: Path) -> list[Row]:
    """Every row of a JSON array or JSONL file.

    Raises:
        DataError: names line, field and mistake of every bad row, or the file is none of ours.
    """
    return required(path, *examine(path), shown=_SHOWN_PROBLEMS)


def examine(path: Path) -> tuple[list[Row], list[str]]:
    """The good rows, and a message for every mistake: `file:line: field: what, what to do`."""
    return examine_rows(path, _mistakes, _row)


def _row(number: int, line: int, record: Any) -> Row:
    kinds = [document["type"] for document in record["documents"]]
    return Row(
        number=number,
        line=line,
        question=record["question"].strip(),
        documents=tuple(document["content"].strip() for document in record["documents"]),
        oracle=kinds.index(ORACLE) if ORACLE in kinds else None,
        answer=record["teacher_answer"].strip(),
        absent_answer=record["absent_answer"].strip() if record.get("absent_answer") else None,
    )


def _mistakes(record: object) -> Iterator[str]:
    if isinstance(record, Exception):
        yield f"row: not JSON ({record}); write one object a line"
        return
    if not isinstance(record, dict):
        yield f"row: a JSON {type(record).__name__}, expected an object with {', '.join(_FIELDS)}"
        return
    yield from _text(record, "question")
    about_documents = list(_documents(record))
    yield from about_documents
    yield from _text(record, "teacher_answer")
    if record.get("absent_answer") is not None:
        yield from _text(record, "absent_answer")
        # Of documents that are wrong themselves, nobody knows which was meant to be the oracle.
        if not about_documents and not any(_kind(d) == ORACLE for d in record["documents"]):
            yield (
                "absent_answer: no document is the oracle, so teacher_answer is already the answer"
                " without it; leave this out"
            )


def _documents(record: Mapping[str, Any]) -> Iterator[str]:
    if "documents" not in record:
        yield _missing(record, "documents")
        return
    documents = record["documents"]
    if not isinstance(documents, list) or not documents:
        yield f"documents: expected a list of documents, got {_short(documents)}"
        return
    for index, document in enumerate(documents):
        where = f"documents[{index}]"
        if not isinstance(document, dict):
            yield f"{where}: expected an object with content and type, got {_short(document)}"
            continue
        yield from _text(document, "content", f"{where}.")
        if "type" not in document:
            yield f"{where}.type: missing; is it the {ORACLE} or a {DISTRACTOR}?"
        elif document["type"] not in _KINDS:
            near = difflib.get_close_matches(str(document["type"]), _KINDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{where}.type: expected oracle or distractor, got {document['type']!r}{hint}"
    oracles = [index for index, d in enumerate(documents) if _kind(d) == ORACLE]
    if len(oracles) > 1:
        yield f"documents[{oracles[1]}].type: a second oracle beside documents[{oracles[0]}]"
    yield from _repeated(documents)


def _repeated(documents: Sequence[Any]) -> Iterator[str]:
    contents = [
        same(d["content"]) if isinstance(d, dict) and isinstance(d.get("content"), str) else None
        for d in documents
    ]
    for content, count in Counter(contents).items():
        if content and count > 1:
            first = contents.index(content)
            again = contents.index(content, first + 1)
            yield f"documents[{again}].content: the same text as documents[{first}]; keep one"


def _text(values: Mapping[str, Any], key: str, prefix: str = "") -> Iterator[str]:
    if key not in values:
        yield prefix + _missing(values, key)
        return
    value = values[key]
    if not isinstance(value, str):
        yield f"{prefix}{key}: expected text, got {_short(value)}"
    elif not value.strip():
        yield f"{prefix}{key}: empty; fill it in, or remove the row"
    elif "\0" in value:
        yield f"{prefix}{key}: holds a NUL character; remove it"
    elif not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        yield f"{prefix}{key}: holds half a surrogate pair; write the character whole"


def _missing(values: Mapping[str, Any], key: str) -> str:
    near = difflib.get_close_matches(key, [k for k in values if k not in _FIELDS], n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(values) or 'nothing'}"
    return f"{key}: missing; {hint}"


def _kind(document: Any) -> Any:
    return document.get("type") if isinstance(document, dict) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
