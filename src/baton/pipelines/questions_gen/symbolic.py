"""The teacher that computes: corrects answers, changes numbers, works answers out anew."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import sympy

from baton.pipelines.questions_gen.answers import compute
from baton.pipelines.questions_gen.competition import (
    DEFAULT_TOPIC,
    DIFFICULTIES,
    difficulty,
    topics,
)
from baton.pipelines.questions_gen.independent import repetition, well_formed
from baton.pipelines.questions_gen.lesson import CRITERIA, Lesson, Proposal, Variation
from baton.pipelines.questions_gen.problem import Problem, read_problem

_NUMBER = re.compile(r"\d+")
_TRIES = 8
_FURTHEST = 9


class Symbolic:
    """An `Instructor` by computer algebra, the same at every call; it costs nothing.

    Variations change the numbers of a problem: setting and application are beyond it.
    """

    def __init__(self, variations: int, *, seed: int) -> None:
        self._variations = variations
        self._seed = seed

    def teach(self, proposal: Proposal) -> Lesson:
        """Nothing is made of a proposal whose problem cannot be computed."""
        found = read_problem(proposal.text)
        if found is None:
            return Lesson(number=proposal.number, dropped=["no_problem"])
        improved = _solved(found.problem)
        if improved is None:
            return Lesson(number=proposal.number, dropped=["not_computable"])
        scores = _scores(found, improved, proposal)
        variations = self._varied(improved, proposal.number)
        missing = self._variations - len(variations)
        return Lesson(
            number=proposal.number,
            scores=scores,
            improved=improved,
            variations=variations,
            dropped=["no_variation"] * missing,
        )

    def cost(self) -> dict[str, Any]:
        return {"asked": 0, "cost": 0.0}

    def _varied(self, source: Problem, number: int) -> list[Variation]:
        rng = np.random.Generator(np.random.PCG64([self._seed, number]))
        varied: list[Variation] = []
        seen = {source.answer}
        for _ in range(self._variations * _TRIES):
            if len(varied) == self._variations:
                break
            text = _NUMBER.sub(lambda m: str(_other(int(m[0]), rng)), source.problem)
            solved = _solved(text)
            if solved is not None and solved.answer not in seen:
                seen.add(solved.answer)
                varied.append(Variation(kind="parameters", problem=solved))
        return varied


def _other(number: int, rng: np.random.Generator) -> int:
    return max(1, number + int(rng.integers(-min(number, _FURTHEST), _FURTHEST + 1)))


def _solved(problem: str) -> Problem | None:
    """A problem with the answer that it comes to; None where that cannot be computed."""
    wanted = compute(problem)
    if wanted is None:
        return None
    values = sorted(wanted.values, key=sympy.default_sort_key)
    answer = " or ".join(str(value) for value in values)
    return Problem(problem, answer, f"Computing it gives {answer}.")


def _scores(found: Problem, improved: Problem, proposal: Proposal) -> dict[str, float]:
    level = DIFFICULTIES.index(difficulty(found.problem, found.solution))
    named = topics(found.problem, found.solution)
    values = (
        float(found.answer == improved.answer),
        well_formed(found),
        (level + 1) / len(DIFFICULTIES),
        1 - repetition(proposal.text),
        1.0 if proposal.topic in named else 0.5 if named != (DEFAULT_TOPIC,) else 0.0,
    )
    return dict(zip(CRITERIA, values, strict=True))
