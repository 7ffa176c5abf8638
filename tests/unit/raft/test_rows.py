"""A file of rows: every mistake named by line and field, nothing else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import DataError
from baton.pipelines.raft.check import check
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.rows import examine, read
from baton.pipelines.raft.sample import sample_path, sample_rows

REPOSITORY = Path(__file__).parents[3]


def row(**changes: Any) -> dict[str, Any]:
    documents = [
        {"content": "Tea is hot.", "type": "distractor"},
        {"content": "Ice is cold.", "type": "oracle"},
    ]
    whole = {"question": "Is ice cold?", "documents": documents, "teacher_answer": "Yes."}
    return {key: value for key, value in (whole | changes).items() if value != "left out"}


def documents(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"content": content, "type": kind} for content, kind in pairs]


PLANTED: list[tuple[Any, str]] = [
    ("{broken", "row: not JSON (Expecting property name enclosed in double quotes"),
    ([1, 2], "row: a JSON list, expected an object with question, documents, teacher_answer"),
    (row(question="left out"), "question: missing; there is documents, teacher_answer"),
    (row(question=["Is ice cold?"]), "question: expected text, got ['Is ice cold?']"),
    (row(documents=[]), "documents: expected a list of documents, got []"),
    (
        row(documents=documents(("a", "oracle"), ("b", "distracter"))),
        "documents[1].type: expected oracle or distractor, got 'distracter'; did you mean"
        " distractor?",
    ),
    (
        row(documents=documents(("a", "oracle"), (" ", "distractor"))),
        "documents[1].content: empty; fill it in, or remove the row",
    ),
    (
        row(documents=documents(("a", "oracle"), ("b", "oracle"))),
        "documents[1].type: a second oracle beside documents[0]",
    ),
    (
        row(teacher_answer="left out", teacher_anser="Yes."),
        "teacher_answer: missing; did you mean teacher_anser?",
    ),
    (
        row(documents=documents(("same", "oracle"), ("same ", "distractor"))),
        "documents[1].content: the same text as documents[0]; keep one",
    ),
]


def test_ten_planted_mistakes_get_ten_messages_with_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = []
    for bad, _ in PLANTED:
        lines += [json.dumps(row()), bad if isinstance(bad, str) else json.dumps(bad)]
    path.write_text("\n".join(lines) + "\n")
    good, problems = examine(path)
    assert len(good) == len(PLANTED) == len(problems) == 10
    for index, (problem, (_, expected)) in enumerate(zip(problems, PLANTED, strict=True)):
        assert problem.startswith(f"{path}:{2 * index + 2}: {expected}"), problem
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).splitlines() == problems


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (row(documents="text"), "documents: expected a list of documents, got 'text'"),
        (row(documents="left out"), "documents: missing; there is question, teacher_answer"),
        (row(documents={}, absent_answer="No."), "documents: expected a list of documents, got {}"),
        (
            row(documents=documents(("a", "orakel")), absent_answer="No."),
            "documents[0].type: expected oracle or distractor, got 'orakel'; did you mean oracle?",
        ),
        (row(documents=["text"]), "documents[0]: expected an object with content and type"),
        (row(documents=[{"content": "a"}]), "documents[0].type: missing; is it the oracle or"),
        (row(documents=[{"type": "oracle"}]), "documents[0].content: missing; there is type"),
        (row(teacher_answer="a\0b"), "teacher_answer: holds a NUL character; remove it"),
        (row(question="a\ud800"), "question: holds half a surrogate pair"),
        (row(absent_answer=3), "absent_answer: expected text, got 3"),
        (
            row(documents=documents(("a", "distractor")), absent_answer="No."),
            "absent_answer: no document is the oracle, so teacher_answer is already the answer",
        ),
    ],
)
def test_other_mistakes_are_named_too(bad: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(bad) + "\n")
    good, [problem] = examine(path)
    assert good == []
    assert problem.startswith(f"{path}:1: {expected}"), problem


def test_an_array_over_many_lines_has_its_mistakes_named_by_the_line_of_the_row(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(), row(question="")], indent=1))
    lines = path.read_text().splitlines()
    starts = [number for number, line in enumerate(lines, start=1) if line == " {"]
    good, [problem] = examine(path)
    assert [r.line for r in good] == starts[:1]
    assert problem.startswith(f"{path}:{starts[1]}: question: empty")


def test_rows_survive_their_json(tmp_path: Path) -> None:
    path = tmp_path / "again.jsonl"
    rows = sample_rows("medical")
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    assert read(path) == rows


@pytest.mark.parametrize("name", ["medical", "berkeley"])
def test_the_sample_has_no_mistake_and_nothing_to_note(name: str) -> None:
    findings = check(sample_path(name), load_format(name))
    assert (findings.mistakes, findings.notes) == ([], [])
    assert len(findings.rows) == 3


def test_the_smoke_rows_teach_what_students_are_scored_by() -> None:
    findings = check(REPOSITORY / "jobs" / "smoke" / "raft.jsonl", load_format("medical"))
    assert (findings.mistakes, findings.notes) == ([], [])


def test_targets_that_teach_badly_are_noted(tmp_path: Path) -> None:
    rows = [r.to_json() for r in sample_rows("medical")]
    rows[0]["teacher_answer"] = rows[0]["teacher_answer"].replace("CoT推理\n", "")
    rows[1]["teacher_answer"] = rows[1]["teacher_answer"].replace("不需要使用", "需要使用")
    rows[2]["absent_answer"] = rows[2]["absent_answer"].replace("文档6", "文档9")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    findings = check(path, load_format("medical"))
    assert findings.mistakes == []
    assert [note.removeprefix(f"{path}:")[:56] for note in findings.notes] == [
        "1: teacher_answer: is not structured as students are to ",
        "2: teacher_answer: 1 of 1 quotes are in no document it s",
        "3: absent_answer: cites 文档9, there are 6",
    ]
