"""The teacher that is asked: a language model scores, improves and varies, in JSON."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from baton.data.teacher import Teacher
from baton.errors import RefusedError
from baton.pipelines.questions_gen.config import OpenAITeacher
from baton.pipelines.questions_gen.lesson import (
    CRITERIA,
    Lesson,
    Proposal,
    Variation,
    why_not_taught,
)
from baton.pipelines.questions_gen.problem import Problem
from baton.pipelines.questions_gen.prompts import KINDS, Kind, variation

T = TypeVar("T")

_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
_FIELDS = ("problem", "answer", "solution")

_SCORE = (
    "Judge this competition problem, which a student wrote. Reply with one JSON object and nothing"
    " else: a number from 0 (worst) to 10 (best) for each of"
    f" {', '.join(CRITERIA)}.\n\n"
)
_FORM = (
    "Reply with one JSON object and nothing else, with the texts problem, answer (the final answer"
    " alone) and solution.\n\n"
)
_IMPROVE = (
    "Improve this competition problem, which a student wrote on {topic}, level {difficulty}:"
    " correct what is wrong, make it clear and complete, and solve it. " + _FORM
)


class Malformed(ValueError):
    """A reply that is not what was asked for."""


class Tutor:
    """An `Instructor` behind an API; replies are kept, so nothing is asked twice."""

    def __init__(
        self,
        config: OpenAITeacher,
        cache: Path,
        *,
        variations: int,
        min_score: float,
        attempts: int,
    ) -> None:
        self._teacher = Teacher(config, cache)
        self._config = config
        self._variations = variations
        self._min_score = min_score
        self._attempts = attempts
        self._lock = threading.Lock()
        self.malformed: Counter[str] = Counter()

    def teach(self, proposal: Proposal) -> Lesson:
        """Three kinds of requests; what a reply lacks is asked for again, then left out."""
        dropped: list[str] = []
        scores = self._ask(_SCORE + proposal.text, _read_scores, dropped, "score")
        if scores is None:
            return Lesson(number=proposal.number, dropped=dropped)
        asked = _IMPROVE.format(topic=proposal.topic, difficulty=proposal.difficulty)
        improved = self._problem(asked + proposal.text, None, dropped, "improved")
        lesson = Lesson(number=proposal.number, scores=scores, improved=improved, dropped=dropped)
        if improved is None or lesson.score < self._min_score:
            return lesson
        varied = [self._vary(improved, i, dropped) for i in range(self._variations)]
        return Lesson(
            number=proposal.number,
            scores=scores,
            improved=improved,
            variations=[found for found in varied if found is not None],
            dropped=dropped,
        )

    def cost(self) -> dict[str, Any]:
        usage = self._teacher.usage
        return {
            "asked": usage.asked,
            "cached": usage.cached,
            "retried": usage.retried,
            "malformed": dict(sorted(self.malformed.items())),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost": usage.cost(self._config),
        }

    def _vary(self, source: Problem, number: int, dropped: list[str]) -> Variation | None:
        kind: Kind = KINDS[number % len(KINDS)]
        # A second variation of a kind is another request only if it says so.
        again = f" This is variation {number // len(KINDS) + 1} of this kind."
        text = f"{variation(kind)}{again if number >= len(KINDS) else ''} {_FORM}{source.text()}"
        other = source if kind == "parameters" else None
        found = self._problem(text, other, dropped, kind)
        return None if found is None else Variation(kind=kind, problem=found)

    def _problem(
        self, text: str, source: Problem | None, dropped: list[str], what: str
    ) -> Problem | None:
        found = self._ask(text, _read_problem, dropped, what)
        if found is None:
            return None
        if why := why_not_taught(found, source=source):
            dropped.append(f"{what}: {why}")
            return None
        return found

    def _ask(
        self, text: str, read: Callable[[dict[str, Any]], T], dropped: list[str], what: str
    ) -> T | None:
        for attempt in range(self._attempts):
            try:
                reply = self._teacher.ask(text, attempt=attempt)
            except RefusedError:
                dropped.append(f"{what}: refused")
                return None
            try:
                return read(_object(reply.text))
            except Malformed as error:
                with self._lock:
                    self.malformed[str(error)] += 1
        dropped.append(f"{what}: malformed")
        return None


def _object(text: str) -> dict[str, Any]:
    """The JSON object of a reply, in a fence, among words, or alone."""
    fenced = _FENCED.search(text)
    body = fenced[1] if fenced else text
    start, end = body.find("{"), body.rfind("}")
    try:
        value = json.loads(body[start : end + 1])
    except (ValueError, RecursionError):
        raise Malformed("no JSON") from None
    if not isinstance(value, dict):
        raise Malformed("no object")
    return value


def _read_scores(value: dict[str, Any]) -> dict[str, float]:
    scores = {}
    for name in CRITERIA:
        number = value.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise Malformed(f"no number for {name}")
        if not 0 <= number <= 10:
            raise Malformed(f"{name} out of range")
        scores[name] = number / 10
    return scores


def _read_problem(value: dict[str, Any]) -> Problem:
    texts = [value.get(name) for name in _FIELDS]
    # An answer that is a bare number is one all the same.
    texts = [str(t) if isinstance(t, int | float) and not isinstance(t, bool) else t for t in texts]
    for name, text in zip(_FIELDS, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise Malformed(f"no text for {name}")
    return Problem(*(str(text).strip() for text in texts))
