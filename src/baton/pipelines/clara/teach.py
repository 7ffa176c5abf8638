"""What a teacher is asked about a chunk: questions, a paraphrase, and whether they are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from baton.data.teacher import Teacher
from baton.errors import RefusedError
from baton.pipelines.clara.memory import is_reserved_in

Kind = Literal["simple", "complex", "paraphrase"]
KINDS: tuple[Kind, ...] = ("simple", "complex", "paraphrase")

_PAIRS_FORM = (
    'Reply with JSON alone: a list of objects {"question": "…", "answer": "…"}. Questions must make'
    " sense to somebody who does not see the document; answers are short and stand in it."
)
_WRITE: dict[Kind, str] = {
    "simple": (
        "Write questions about the document below, each about a single fact of it, so that together"
        f" they cover every key fact. {_PAIRS_FORM}"
    ),
    "complex": (
        "Write questions about the document below, each of which needs at least two of its facts"
        f" put together, so that together they cover every key fact. {_PAIRS_FORM}"
    ),
    "paraphrase": (
        "Write the document below anew in other words and another order. Keep every fact and add"
        ' none. Reply with JSON alone: an object {"text": "…"}.'
    ),
}
_VERIFY = (
    "Below are a document and what somebody wrote about it. List the key facts of the document that"
    " are not covered, and the numbers of the items that are not supported by the document. Reply"
    ' with JSON alone: an object {"missing": ["…"], "wrong": [1]}; both lists are empty where all'
    " is well."
)
_MISSING: dict[Kind, str] = {
    "simple": "Write further questions for these facts only, which are not covered yet:",
    "complex": "Write further questions that bring in these facts, which are not covered yet:",
    "paraphrase": "Write it once more. These facts were missing:",
}
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How patient the building is.

    Attributes:
        rounds: how often what is missing or wrong is asked for again.
        tries: how often one request may be answered in a form that cannot be used.
    """

    rounds: int = 10
    tries: int = 3


@dataclass(frozen=True, slots=True)
class Failed:
    """A kind of row that could not be made of a chunk; `reason` is a stable word to count by."""

    kind: Kind
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Made:
    """What was made of a chunk and found complete and right: pairs, or one paraphrase."""

    kind: Kind
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def make(kind: Kind, chunk: str, teacher: Teacher, limits: Limits) -> Made | Failed:
    """Ask, have it verified, ask for what is missing, until nothing is or the rounds are over."""
    try:
        if kind == "paraphrase":
            return _paraphrase(chunk, teacher, limits)
        return _pairs(kind, chunk, teacher, limits)
    except RefusedError as error:
        return Failed(kind, "refused", str(error))
    except _Unusable as error:
        return Failed(kind, "unusable", str(error))


def _pairs(kind: Kind, chunk: str, teacher: Teacher, limits: Limits) -> Made | Failed:
    pairs: dict[str, str] = {}
    verdict = _Verdict((), ())
    request = f"{_WRITE[kind]}\n\n{_document(chunk)}"
    for _ in range(limits.rounds + 1):
        for question, answer in _ask(teacher, request, _read_pairs, limits):
            pairs.setdefault(question, answer)
        items = [f"Question: {q}\nAnswer: {a}" for q, a in pairs.items()]
        verdict = _verified(chunk, items, teacher, limits)
        wrong = [list(pairs)[number - 1] for number in verdict.wrong]
        pairs = {q: a for q, a in pairs.items() if q not in wrong}
        if not verdict.missing and pairs:
            return Made(kind, tuple(pairs), tuple(pairs.values()))
        missing = "\n".join(f"- {fact}" for fact in verdict.missing) or "- every fact"
        # What is known already makes each round another request.
        known = "\n".join(f"- {question}" for question in pairs) or "- none"
        request = (
            f"{_MISSING[kind]}\n{missing}\n\nThese questions are there already:\n{known}\n\n"
            f"{_PAIRS_FORM}\n\n{_document(chunk)}"
        )
    return _given_up(kind, verdict, limits)


def _paraphrase(chunk: str, teacher: Teacher, limits: Limits) -> Made | Failed:
    verdict = _Verdict((), ())
    request = f"{_WRITE['paraphrase']}\n\n{_document(chunk)}"
    for _ in range(limits.rounds + 1):
        [text] = _ask(teacher, request, _read_text, limits)
        verdict = _verified(chunk, [text], teacher, limits)
        if not verdict.missing and not verdict.wrong:
            return Made("paraphrase", (), (text,))
        missing = "\n".join(f"- {fact}" for fact in verdict.missing)
        missing = missing or "- (none; but it said what is not in the document)"
        request = (
            f"{_WRITE['paraphrase']}\n\n{_MISSING['paraphrase']}\n{missing}\n\nSo far:\n{text}\n\n"
            f"{_document(chunk)}"
        )
    return _given_up("paraphrase", verdict, limits)


def _given_up(kind: Kind, verdict: _Verdict, limits: Limits) -> Failed:
    said = "; ".join(verdict.missing) or f"{len(verdict.wrong)} items are not in the document"
    return Failed(kind, "incomplete", f"after {limits.rounds} more rounds: {said}")


@dataclass(frozen=True, slots=True)
class _Verdict:
    missing: tuple[str, ...]
    wrong: tuple[int, ...]


def _verified(chunk: str, items: Sequence[str], teacher: Teacher, limits: Limits) -> _Verdict:
    numbered = "\n".join(f"[{number}] {item}" for number, item in enumerate(items, start=1))

    def read(value: Any) -> list[_Verdict]:
        missing, wrong = value["missing"], value["wrong"]
        if not all(isinstance(fact, str) for fact in missing):
            raise ValueError("missing must be a list of texts")
        if not all(type(n) is int and 1 <= n <= len(items) for n in wrong):
            raise ValueError(f"wrong must name items from 1 to {len(items)}")
        return [_Verdict(tuple(missing), tuple(wrong))]

    request = f"{_VERIFY}\n\n{_document(chunk)}\n\n<ITEMS>\n{numbered}\n</ITEMS>"
    verdict: _Verdict = _ask(teacher, request, read, limits)[0]
    return verdict


class _Unusable(Exception):
    """No answer of the teacher was in the form that was asked for."""


def _ask(
    teacher: Teacher, request: str, read: Callable[[Any], list[Any]], limits: Limits
) -> list[Any]:
    """What `read` makes of the JSON of a reply; asked again where it cannot be used."""
    problem = ""
    for attempt in range(limits.tries):
        reply = teacher.ask(request, attempt=attempt)
        if reply.is_cut:
            problem = "the reply is longer than the teacher's max_tokens"
            continue
        try:
            return read(_json_in(reply.text))
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{error} in {reply.text[:100]!r}"
    raise _Unusable(problem)


def _json_in(text: str) -> Any:
    fenced = _FENCE.search(text)
    return json.loads(fenced[1] if fenced else text)


def _read_pairs(value: Any) -> list[tuple[str, str]]:
    pairs = []
    for item in value:
        pairs.append((_plain(item["question"]), _plain(item["answer"])))
    if not pairs:
        raise ValueError("no question")
    return pairs


def _read_text(value: Any) -> list[str]:
    return [_plain(value["text"])]


def _plain(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an empty text")
    if (word := is_reserved_in(text)) is not None or "\0" in text:
        raise ValueError(f"a reserved word ({word})")
    return text.strip()


def _document(chunk: str) -> str:
    return f"<DOCUMENT>\n{chunk}\n</DOCUMENT>"
