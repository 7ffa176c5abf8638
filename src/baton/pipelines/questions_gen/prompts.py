"""What the model is asked for: a problem on a topic, or a variation of a good one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.pipelines.questions_gen.problem import Problem

Kind = Literal["context", "parameters", "application"]
KINDS: tuple[Kind, ...] = ("context", "parameters", "application")

_FORM = (
    "Answer in this form:\nProblem: the problem\nAnswer: its final answer\nSolution: the solution"
)
_CHANGES = {
    "context": "Tell the same mathematics in another setting.",
    "parameters": "Change the numbers, and work the answer out anew: it is not the same any more.",
    "application": "Apply the same idea to another kind of question, and work its answer out.",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt: topic and difficulty, and for a variation the problem that is varied, and how."""

    topic: str
    difficulty: str
    kind: Kind | None = None
    source: Problem | None = None

    def text(self) -> str:
        """What the user's turn says."""
        if self.kind is None or self.source is None:
            return (
                f"Write a competition problem. Topic: {self.topic}. Level: {self.difficulty}.\n"
                f"{_FORM}"
            )
        return f"{variation(self.kind)}\n{_FORM}\n\n{self.source.text()}"


def variation(kind: Kind) -> str:
    """The instruction for a variation of a problem."""
    return f"Vary this competition problem. {_CHANGES[kind]}"
