"""A problem with its answer and solution, as text that a model writes and that is read back."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECTION = re.compile(r"^[ \t]*(Problem|Answer|Solution):[ \t]*", re.MULTILINE)
# `\boxed{…}` with braces one deep inside, or GSM8K's last line.
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_HASHES = re.compile(r"^####\s*(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Problem:
    """`answer` is the final one, empty where none is known; `solution` the way to it."""

    problem: str
    answer: str = ""
    solution: str = ""

    def text(self) -> str:
        """What a model is trained to write. `read_problem` gives the same back."""
        parts = [f"Problem: {self.problem}"]
        if self.answer:
            parts.append(f"Answer: {self.answer}")
        if self.solution:
            parts.append(f"Solution: {self.solution}")
        return "\n".join(parts)


def read_problem(text: str) -> Problem | None:
    """The sections of a completion, the first of each kind; None without a problem in it."""
    found: dict[str, str] = {}
    marks = list(_SECTION.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=False):
        found.setdefault(mark[1], text[mark.end() : end].strip())
    if not found.get("Problem"):
        return None
    return Problem(found["Problem"], found.get("Answer", ""), found.get("Solution", ""))


def without_marker(solution: str) -> str:
    """A solution without GSM8K's last line, which only repeats the answer."""
    return _HASHES.sub("", solution).strip()


def final_answer(solution: str) -> str:
    """The last boxed expression, or what stands behind `####`; empty where there is neither."""
    boxed = _BOXED.findall(solution)
    hashes = _HASHES.findall(solution)
    last: str = (boxed or hashes or [""])[-1]
    return last.strip()
