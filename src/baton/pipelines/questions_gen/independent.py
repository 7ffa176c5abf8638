"""Scores that keywords cannot win: is a problem well formed, is it new, is its answer right?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from baton.pipelines.questions_gen.answers import Verdict, check
from baton.pipelines.questions_gen.problem import Problem, read_problem
from baton.pipelines.questions_gen.tfidf import Nearest

_ASKS = re.compile(
    r"\b(find|determine|compute|calculate|evaluate|prove|show|solve|simplify|express|how|what|"
    r"which|when|where|who|is it|does|give|construct)\b",
    re.IGNORECASE,
)
_MATTER = re.compile(r"\d|\$|[a-z]\s*[=<>^+]|[=<>≤≥]|\b[A-Z]{2,}\b")
_GRAM = 3
_SHORTEST, _LONGEST = 15, 1500

_CHECKED = {
    Verdict.RIGHT: 1.0,
    Verdict.UNKNOWN: 0.5,
    Verdict.NO_NUMBER: 0.25,
    Verdict.WRONG: 0.0,
    Verdict.MISSING: 0.0,
}


@dataclass(frozen=True, slots=True)
class Independent:
    """The parts, each 0 to 1, and what is counted besides.

    Attributes:
        well_formed: share of the formal checks that hold; 0 for no problem at all.
        novelty: 1 - cosine to the nearest training problem.
        checked: 1 for an answer computed to be right, 0.5 for a number that cannot be checked,
            0.25 for an answer in words, 0 for a wrong or missing one.
        repetition: share of word triples that occurred before in the same text.
    """

    well_formed: float
    novelty: float
    checked: float
    repetition: float
    verdict: Verdict

    @property
    def total(self) -> float:
        """Novelty and a right answer count as far as there is a well-formed problem."""
        kept = self.well_formed * (1 - self.repetition)
        return kept * (0.3 + 0.3 * self.novelty + 0.4 * self.checked)

    @property
    def is_right(self) -> bool:
        return self.verdict is Verdict.RIGHT


@dataclass(frozen=True)
class Judge:
    """Judges completions against the problems that the model was trained on."""

    training: Nearest

    @classmethod
    def of(cls, problems: Sequence[str]) -> Judge:
        return cls(Nearest(problems))

    def score(self, text: str) -> Independent:
        """The independent score of one completion."""
        problem = read_problem(text)
        if problem is None:
            return Independent(0.0, 0.0, 0.0, repetition(text), Verdict.MISSING)
        verdict = check(problem)
        return Independent(
            well_formed=well_formed(problem),
            novelty=self.training.novelty(problem.problem),
            checked=_CHECKED[verdict],
            repetition=repetition(text),
            verdict=verdict,
        )


def well_formed(problem: Problem) -> float:
    """Share of what holds: a question, ended, of some length, about something, balanced."""
    text = problem.problem
    signs = (
        _ASKS.search(text) is not None,
        text.rstrip("$ ").endswith((".", "?", "!", "]", "}")),
        _SHORTEST <= len(text) <= _LONGEST,
        _MATTER.search(text) is not None,
        _is_balanced(text),
    )
    # Words alone are no problem, however well they are punctuated.
    return 0.0 if not (signs[0] and signs[3]) else sum(signs) / len(signs)


def repetition(text: str) -> float:
    """Share of word triples that are not the first of their kind, 0 to 1."""
    words = text.lower().split()
    grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _is_balanced(text: str) -> bool:
    if text.replace(r"\$", "").count("$") % 2:
        return False
    waiting: list[str] = []
    for character in text:
        if character in "([{":
            waiting.append(character)
        # Half-open intervals [0, 1) are fine: any bracket closes a bracket, braces close braces.
        elif character in ")]}" and (not waiting or (waiting.pop() == "{") != (character == "}")):
            return False
    return not waiting
