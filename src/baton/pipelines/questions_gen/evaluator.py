"""How good a generated problem is, in six parts that can be checked, and its grade.

| part | weight | what is looked at |
|---|---|---|
| content | .25 | the answer: computed right 1, a number 0.5, words 0.25, wrong or missing 0 |
| clarity | .20 | formal checks that hold (asks something, ended, length, matter, brackets) |
| difficulty | .20 | steps of the solution that hold a relation, six or more count fully |
| completeness | .15 | problem, answer and solution are there, and the solution reaches the answer |
| originality | .10 | 1 - cosine to the nearest training problem |
| educational | .10 | a topic is recognised; the solution says why |

Everything is worth less by the share of the text that repeats itself.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass

from baton.pipelines.questions_gen.competition import DEFAULT_TOPIC, topics
from baton.pipelines.questions_gen.independent import Independent
from baton.pipelines.questions_gen.problem import Problem, read_problem

WEIGHTS = {
    "content": 0.25,
    "clarity": 0.20,
    "difficulty": 0.20,
    "completeness": 0.15,
    "originality": 0.10,
    "educational": 0.10,
}
GRADES = (
    (0.9, "A+"),
    (0.85, "A"),
    (0.8, "A-"),
    (0.75, "B+"),
    (0.7, "B"),
    (0.65, "B-"),
    (0.6, "C+"),
    (0.55, "C"),
    (0.5, "C-"),
    (0.4, "D"),
)
_STEP = re.compile(r"[^.\n]*[=<>≤≥≠≡][^.\n]*")
_WHY = re.compile(r"\b(because|since|therefore|thus|hence|so|by|as|if|then|we)\b", re.IGNORECASE)
_STEPS = 6


@dataclass(frozen=True, slots=True)
class Quality:
    """The six parts, each 0 to 1."""

    content: float
    clarity: float
    difficulty: float
    completeness: float
    originality: float
    educational: float

    @property
    def total(self) -> float:
        return math.fsum(WEIGHTS[name] * value for name, value in asdict(self).items())

    @property
    def grade(self) -> str:
        return grade(self.total)


def grade(total: float) -> str:
    """A+ from 0.9 down to D from 0.4; F below."""
    return next((name for least, name in GRADES if total >= least), "F")


def evaluate(text: str, judged: Independent) -> Quality:
    """The quality of a completion; `judged` is its independent score."""
    problem = read_problem(text)
    if problem is None:
        return Quality(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    kept = 1 - judged.repetition
    steps = len(_STEP.findall(problem.solution))
    named = topics(problem.problem, problem.solution) != (DEFAULT_TOPIC,)
    return Quality(
        content=kept * judged.checked,
        clarity=kept * judged.well_formed,
        difficulty=kept * min(steps / _STEPS, 1.0),
        completeness=kept * _completeness(problem),
        originality=kept * judged.novelty,
        educational=kept * (0.5 * named + 0.5 * bool(_WHY.search(problem.solution))),
    )


def _completeness(problem: Problem) -> float:
    reached = bool(problem.answer) and problem.answer in problem.solution
    return (1 + bool(problem.answer) + bool(problem.solution) + reached) / 4
