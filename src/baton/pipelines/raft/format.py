"""Prompt formats: a YAML file each, saying how rows are written and answers are read."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from baton.config.decode import decode
from baton.config.experiment import nearest
from baton.config.home import find_file
from baton.config.yaml import load_yaml
from baton.errors import ConfigError

_BUILT_IN = Path(str(files("baton.pipelines.raft") / "formats"))
# What may stand before a heading in a line: Markdown, brackets, numbers.
_BEFORE = r"(?m)^[\s#*>【\[(]*(?:(?:\d+|[一二三四五六七八九十]+)\s*[.、)]\s*)?[*【]*\s*"
_AFTER = r"[*】\])\s]*(?::|$)"
_NUMBERS = r"\d+(?:\s*[、,，和及]\s*\d+)*"


@dataclass(frozen=True, kw_only=True)
class QuoteMarks:
    """What stands around verbatim quotes; below `heading` alone, if that is given."""

    begin: str
    end: str
    heading: str | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherPrompts:
    """What a teacher is asked: for questions about a chunk, for answers with and without it."""

    questions: str
    answer: str
    absent: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a row becomes a prompt, and what an answer consists of.

    `user` and the teacher's prompts are Jinja templates over `question`, `documents`, `oracle`,
    `headings` and `count`.

    Attributes:
        citation: the word that cites a document by its number; None where none is cited.
        answer_marker: the short answer is what follows its last occurrence.
        admits: what an answer says when the documents do not hold the evidence.
    """

    system: str | None = None
    user: str
    headings: list[str] = field(default_factory=list)
    citation: str | None = None
    quote: QuoteMarks
    answer_marker: str | None = None
    admits: list[str]
    teacher: TeacherPrompts

    def __post_init__(self) -> None:
        for name in ("user", "teacher.questions", "teacher.answer", "teacher.absent"):
            try:
                self._render(name, question="", documents=[""], oracle="", count=1)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        if not self.admits:
            raise ValueError("admits: name at least one phrase for missing evidence")
        if self.quote.heading is not None and self.quote.heading not in self.headings:
            raise ValueError(f"quote.heading: {self.quote.heading} is none of the headings")

    # --- writing --------------------------------------------------------------------------

    def prompt(self, question: str, documents: Sequence[str]) -> str:
        """What the user says."""
        return self._render("user", question=question, documents=documents)

    def ask_questions(self, oracle: str, count: int) -> str:
        return self._render("teacher.questions", oracle=oracle, count=count)

    def ask_answer(self, question: str, documents: Sequence[str], oracle: str) -> str:
        return self._render("teacher.answer", question=question, documents=documents, oracle=oracle)

    def ask_absent(self, question: str, documents: Sequence[str]) -> str:
        return self._render("teacher.absent", question=question, documents=documents)

    def _render(self, name: str, **values: Any) -> str:
        from jinja2 import TemplateError

        owner: Any = self
        for part in name.split("."):
            owner = getattr(owner, part)
        try:
            return str(_template(owner).render(headings=self.headings, **values))
        except TemplateError as error:
            raise ConfigError(f"{name}: {error}") from error

    # --- reading --------------------------------------------------------------------------

    def headings_of(self, answer: str) -> list[tuple[str, int]]:
        """The headings that stand in an answer, and where the text below each begins."""
        plain = _plain(answer)
        found = []
        for heading in self.headings:
            pattern = _BEFORE + re.escape(_plain(heading)) + _AFTER
            found += [(m.start(), heading, m.end()) for m in re.finditer(pattern, plain)]
        return [(heading, end) for _, heading, end in sorted(found)]

    def is_structured(self, answer: str) -> bool:
        """All headings, each once, in their order; and the marker of the short answer."""
        if [heading for heading, _ in self.headings_of(answer)] != self.headings:
            return False
        return self.answer_marker is None or bool(self.final_answer(answer, default=""))

    def quotes_of(self, answer: str) -> list[str]:
        """What an answer claims to quote; an opened quote that is never closed is an empty one."""
        begin, end = self.quote.begin, self.quote.end
        quotes = []
        for piece in self._evidence(answer).split(begin)[1:]:
            quote, closed, _ = piece.partition(end)
            quotes.append(quote.strip() if closed else "")
        return quotes

    def _evidence(self, answer: str) -> str:
        if self.quote.heading is None:
            return answer
        plain = _plain(answer)
        marks = [*self.headings_of(answer), ("", len(plain))]
        spans = [
            (start, following)
            for (heading, start), (_, following) in itertools.pairwise(marks)
            if heading == self.quote.heading
        ]
        return "".join(answer[start:end] for start, end in spans)

    def cited(self, answer: str) -> set[int]:
        """Numbers of the documents that an answer cites, from 1."""
        if self.citation is None:
            return set()
        found = self._citations.findall(answer)
        return {int(number) for numbers in found for number in re.findall(r"\d+", numbers)}

    def renumbered(self, answer: str, new: Callable[[int], int]) -> str:
        """The answer with every document that it cites under its new number."""
        if self.citation is None:
            return answer

        def renumber(match: re.Match[str]) -> str:
            return re.sub(r"\d+", lambda number: str(new(int(number[0]))), match[0])

        return self._citations.sub(renumber, answer)

    @functools.cached_property
    def _citations(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.citation or '')}\s*({_NUMBERS})")

    def admits_absence(self, answer: str) -> bool:
        """Does it say that the documents do not hold the evidence?"""
        plain = _plain(answer)
        return any(_plain(phrase) in plain for phrase in self.admits)

    def final_answer(self, answer: str, *, default: str | None = None) -> str:
        """What follows the last marker; without one `default`, or the whole text."""
        if self.answer_marker is not None:
            _, marker, final = answer.rpartition(self.answer_marker.strip())
            if marker:
                return final.strip()
        return answer.strip() if default is None else default


def load_format(name: str) -> Format:
    """A built-in format, or one's own file. Raises `ConfigError` with every problem of it."""
    if name.endswith((".yaml", ".yml")):
        path = find_file(name)
    else:
        path = _BUILT_IN / f"{name}.yaml"
        known = sorted(file.stem for file in _BUILT_IN.glob("*.yaml"))
        if name not in known:
            raise ConfigError(
                f"data.format: no format {name!r}; {nearest(name, known)}, or name a .yaml file"
            )
    document = load_yaml(path)
    return decode(Format, document.data, document=document)


def _plain(text: str) -> str:
    """Half-width punctuation and lower case, character by character, so that places agree."""
    return "".join(
        wide if len(wide := unicodedata.normalize("NFKC", c).lower()) == 1 else c for c in text
    )


@functools.cache
def _template(text: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    # Block tags on lines of their own leave no blank lines; text stays as it is, many lines too.
    environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=False)
    return environment.from_string(text)
