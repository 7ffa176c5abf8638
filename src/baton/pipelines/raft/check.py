"""What a file of RAFT rows holds, its mistakes, and what would make a poor student."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from baton.pipelines.raft.format import Format
from baton.pipelines.raft.rows import Row, examine
from baton.pipelines.raft.scores import judge


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Mistakes make a file unusable; notes are about rows that would teach badly."""

    rows: list[Row]
    mistakes: list[str]
    notes: list[str]

    @property
    def summary(self) -> str:
        rows = self.rows
        documents = sum(len(row.documents) for row in rows)
        with_oracle = sum(row.oracle is not None for row in rows)
        both = sum(row.absent_answer is not None for row in rows)
        mean = documents / len(rows) if rows else 0
        return (
            f"{len(rows):,} rows: {with_oracle:,} with an oracle, {both:,} of these with an"
            f" absent_answer too; {mean:.1f} documents a row"
        )


def check(path: Path, format: Format) -> Findings:
    """Read every row; judge every target by the standards that students are held to."""
    rows, mistakes = examine(path)
    notes = [f"{path}:{row.line}: {note}" for row in rows for note in _notes(row, format)]
    twice = Counter(row.question for row in rows)
    notes += [
        f"{path}: {count} rows ask {question!r}" for question, count in twice.items() if count > 1
    ]
    return Findings(rows=rows, mistakes=mistakes, notes=notes)


def _notes(row: Row, format: Format) -> list[str]:
    notes = []
    for field, answer, documents in (
        ("teacher_answer", row.answer, row.documents),
        ("absent_answer", row.absent_answer, _without_oracle(row)),
    ):
        if answer is None:
            continue
        verdict = judge(answer, documents, oracle=None, format=format)
        if not verdict.is_structured:
            wanted = " > ".join(format.headings) or f"a text that ends in {format.answer_marker}"
            notes.append(f"{field}: is not structured as students are to answer: {wanted}")
        if verdict.found < verdict.quotes:
            lost = verdict.quotes - verdict.found
            notes.append(f"{field}: {lost} of {verdict.quotes} quotes are in no document it saw")
        odd = sorted(n for n in format.cited(answer) if not 1 <= n <= len(row.documents))
        if odd:
            notes.append(
                f"{field}: cites {format.citation}{odd[0]}, there are {len(row.documents)}"
            )
    return notes


def _without_oracle(row: Row) -> tuple[str, ...]:
    return tuple(text for i, text in enumerate(row.documents) if i != row.oracle)
