"""What a teacher makes of a student's problem: a score, a better version, variations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from baton.pipelines.questions_gen.answers import Verdict, check
from baton.pipelines.questions_gen.problem import Problem
from baton.pipelines.questions_gen.prompts import Kind, Request

CRITERIA = ("correctness", "clarity", "difficulty", "originality", "educational_value")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A problem that the student wrote, and what it was asked for."""

    number: int
    topic: str
    difficulty: str
    text: str

    @property
    def request(self) -> Request:
        return Request(self.topic, self.difficulty)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """A variation of the improved problem."""

    kind: Kind
    problem: Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What is to be learned of one proposal.

    Attributes:
        scores: by criterion, 0 to 1; empty where the teacher could not judge.
        improved: None where nothing can be made of the proposal.
        dropped: why something is missing, counted in the report.
    """

    number: int
    scores: dict[str, float] = field(default_factory=dict)
    improved: Problem | None = None
    variations: Sequence[Variation] = ()
    dropped: Sequence[str] = ()

    @property
    def score(self) -> float:
        """Mean of the criteria; 0 where there are none."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Lesson:
        improved = values["improved"]
        return cls(
            number=values["number"],
            scores=values["scores"],
            improved=None if improved is None else Problem(**improved),
            variations=[
                Variation(kind=v["kind"], problem=Problem(**v["problem"]))
                for v in values["variations"]
            ],
            dropped=values["dropped"],
        )


class Instructor(Protocol):
    """A teacher, of whatever kind. Safe to use from several threads."""

    def teach(self, proposal: Proposal) -> Lesson:
        """Judge, improve and vary one proposal."""
        ...

    def cost(self) -> dict[str, Any]:
        """What was asked so far by this process, and what it cost."""
        ...


def why_not_taught(problem: Problem, *, source: Problem | None = None) -> str:
    """Why a problem of a teacher is not passed on; empty where nothing is wrong with it.

    `source` is the problem whose numbers were changed: the published pipeline passed on such
    variations with the old answer.
    """
    if not problem.problem or not problem.answer:
        return "no_answer"
    if check(problem) is Verdict.WRONG:
        return "wrong_answer"
    if source is not None and problem.problem == source.problem:
        return "not_varied"
    if source is not None and problem.answer == source.answer:
        return "answer_unchanged"
    return ""
