"""Rows from plain documents, the Berkeley way: a teacher asks questions of chunks and answers them.

Zhang et al., "RAFT: Adapting Language Model to Domain Specific RAG" (2024).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from baton.data.chunks import same
from baton.data.json_lines import JsonLines
from baton.data.replies import Reply
from baton.data.teacher import Teacher, in_order
from baton.errors import DataError, RefusedError
from baton.pipelines.raft.format import Format
from baton.pipelines.raft.rows import Row
from baton.pipelines.raft.scores import judge

# What a teacher is asked to write where a chunk answers no question.
_NONE = re.compile(r"(?i)\W*none\W*")
# Numbers and dashes that teachers put before a question although they were asked not to.
_NUMBERED = re.compile(r"^\s*(?:[-*•]|[Qq]?\d+\s*[.):、:])\s*")
_LETTER = re.compile(r"\w")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows are made. The same recipe, documents and replies give the same bytes.

    Attributes:
        tries: how often a teacher may answer one request in a form that cannot be used.
        absent: also ask for an answer without the oracle, so that training may choose any `p`.
    """

    chunk_chars: int = 2000
    questions: int = 3
    distractors: int = 4
    absent: bool = True
    tries: int = 3
    seed: int = 42


@dataclass
class Tally:
    """What became of the chunks and questions."""

    chunks: int = 0
    chunks_without_questions: int = 0
    questions: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Dropped:
    """A question that became no row."""

    question: str
    reason: str
    detail: str


def build(
    chunks: Sequence[str],
    teacher: Teacher,
    format: Format,
    recipe: Recipe,
    out: Path,
    *,
    on_chunk: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Write a row for every question that can be answered; `OUT.rejects.jsonl` names the others.

    Both files appear only when all is done. After a kill the same call goes on from the
    teacher's cache: what was answered is not asked again, and the bytes come out the same.

    Raises:
        DataError: there are fewer chunks than a row shows documents.
        TeacherError: the teacher stopped answering; nothing that it said is lost.
    """
    needed = recipe.distractors + 1 + recipe.absent
    if len(chunks) < needed:
        raise DataError(
            f"{len(chunks)} different chunks are too few: a row shows {needed} documents; bring"
            " more text, or lower --chunk-chars or --distractors"
        )
    tally = Tally()
    rejects = out.with_name(f"{out.name}.rejects.jsonl")
    with JsonLines(out) as rows_file, JsonLines(rejects) as rejects_file:

        def work(index: int) -> list[Row | _Dropped] | None:
            return _rows_of(index, chunks, teacher, format, recipe)

        made = in_order(work, range(len(chunks)), parallel=teacher.config.parallel)
        for index, found in enumerate(made):
            tally.chunks += 1
            tally.chunks_without_questions += not found
            for row in found or ():
                tally.questions += 1
                if isinstance(row, Row):
                    tally.rows += 1
                    rows_file.write(row.to_json())
                else:
                    tally.dropped[row.reason] += 1
                    rejects_file.write(
                        {"chunk": index, "question": row.question, "reason": row.reason}
                        | {"detail": row.detail}
                    )
            on_chunk(tally)
    return tally


def _rows_of(
    index: int, chunks: Sequence[str], teacher: Teacher, format: Format, recipe: Recipe
) -> list[Row | _Dropped]:
    """Everything made of one chunk: its questions, one after the other."""
    try:
        questions = _questions(
            teacher, format.ask_questions(chunks[index], recipe.questions), recipe
        )
    except RefusedError as error:
        return [_Dropped("", "refused", str(error))]
    rows: list[Row | _Dropped] = []
    for number, question in enumerate(questions):
        try:
            rows.append(_row(index, number, question, chunks, teacher, format, recipe))
        except RefusedError as error:
            rows.append(_Dropped(question, "refused", str(error)))
        except _Unusable as error:
            rows.append(_Dropped(question, error.reason, error.detail))
    return rows


def _questions(teacher: Teacher, prompt: str, recipe: Recipe) -> list[str]:
    """The questions of a chunk; none where the teacher says so, or says nothing usable."""
    for attempt in range(recipe.tries):
        reply = teacher.ask(prompt, attempt=attempt)
        if _NONE.fullmatch(reply.text):
            return []
        lines = [_NUMBERED.sub("", line).strip() for line in reply.text.splitlines()]
        questions = list(dict.fromkeys(line for line in lines if _LETTER.search(line)))
        if questions and not reply.is_cut:
            return questions[: recipe.questions]
    return []


def _row(
    index: int,
    number: int,
    question: str,
    chunks: Sequence[str],
    teacher: Teacher,
    format: Format,
    recipe: Recipe,
) -> Row:
    rng = np.random.Generator(np.random.PCG64([recipe.seed & 0xFFFFFFFF, index, number]))
    others = [i for i in range(len(chunks)) if i != index]
    # One more than training shows beside the oracle: what stands in its place when it is absent.
    count = recipe.distractors + recipe.absent
    drawn = [others[i] for i in rng.choice(len(others), count, replace=False)]
    oracle = int(rng.integers(count + 1))
    drawn.insert(oracle, index)
    documents = tuple(chunks[i] for i in drawn)
    answer = _answer(
        teacher, format.ask_answer(question, documents, chunks[index]), documents, format, recipe
    )
    absent_answer = None
    if recipe.absent:
        shown = documents[:oracle] + documents[oracle + 1 :]
        absent = _answer(teacher, format.ask_absent(question, shown), shown, format, recipe)
        # The teacher counted the documents it saw; the row counts the oracle as well.
        absent_answer = format.renumbered(absent, lambda n: n + (n > oracle))
    return Row(
        number=0,
        line=0,
        question=question,
        documents=documents,
        oracle=oracle,
        answer=answer,
        absent_answer=absent_answer,
    )


class _Unusable(Exception):
    """No answer of the teacher could be used; `reason` is a stable word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _answer(
    teacher: Teacher, prompt: str, documents: Sequence[str], format: Format, recipe: Recipe
) -> str:
    """An answer that a student may learn: whole, structured, every quote in the documents."""
    fault = _Unusable("unusable", "never asked")
    for attempt in range(recipe.tries):
        reply = teacher.ask(prompt, attempt=attempt)
        found = _fault(reply, documents, format)
        if found is None:
            return reply.text.strip()
        fault = found
    raise fault


def _fault(reply: Reply, documents: Sequence[str], format: Format) -> _Unusable | None:
    text = reply.text.strip()
    if reply.is_cut:
        return _Unusable("cut_off", "the answer is longer than the teacher's max_tokens")
    if "\0" in text or not text:
        return _Unusable("empty", "the answer is empty, or holds a NUL character")
    verdict = judge(text, documents, oracle=None, format=format)
    if not verdict.is_structured:
        return _Unusable("unstructured", f"headings or the final answer are missing: {text[:100]}")
    if verdict.found < verdict.quotes:
        lost = [q for q in format.quotes_of(text) if not _is_in(q, documents)]
        return _Unusable("unfaithful", f"a quote is in no document: {lost[0][:100]!r}")
    return None


def _is_in(quote: str, documents: Sequence[str]) -> bool:
    return bool(quote) and any(same(quote) in same(text) for text in documents)


def iter_reasons(tally: Tally) -> Iterator[str]:
    """`12 unfaithful`, the most frequent first."""
    for reason, count in tally.dropped.most_common():
        yield f"{count:,} {reason}"
