"""Rows from documents by a teacher: what is kept, what is dropped, and what a kill costs."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import teacher as far_end

from baton.data.chunks import distinct_chunks
from baton.data.documents import Document
from baton.data.teacher import Teacher, TeacherConfig
from baton.errors import DataError
from baton.pipelines.raft.build import Recipe, build
from baton.pipelines.raft.check import check
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.rows import read

REPOSITORY = Path(__file__).parents[3]
REAL = REPOSITORY.parent / "shared" / "data" / "raft_torchhub_train.jsonl"
BERKELEY, MEDICAL = load_format("berkeley"), load_format("medical")
WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "granite", "harbour", "island")
CHUNKS = [
    f"Chapter {n} is about {word} and about {WORDS[n - 3]}, which are found in place {n * 7}."
    for n, word in enumerate(WORDS)
]


@pytest.fixture
def make(tmp_path: Path):
    """Runs `build` against a server with a rule of its own."""
    servers = []

    def run(rule, *, chunks=CHUNKS, format=BERKELEY, refuses=None, **recipe):
        name = "rows.jsonl"
        server = far_end.Server(far_end.Teacher(rule, refuses=refuses))
        server.__enter__()
        servers.append(server)
        teacher = Teacher(
            TeacherConfig(url=server.url, model="m", attempts=2, timeout_seconds=5.0),
            tmp_path / f"{name}.replies",
        )
        out = tmp_path / name
        tally = build(chunks, teacher, format, Recipe(**recipe), out)
        lines = Path(f"{out}.rejects.jsonl").read_text(encoding="utf-8").splitlines()
        rejects = [json.loads(line) for line in lines]
        return tally, read(out) if tally.rows else [], rejects, server.teacher

    yield run
    for server in servers:
        server.__exit__()


def is_for_questions(prompt: str) -> bool:
    return prompt.startswith("Write ")


def test_rows_have_oracle_distractors_and_both_answers(make, tmp_path: Path) -> None:
    tally, rows, rejects, server = make(far_end.berkeley, questions=2, distractors=3)
    assert (tally.chunks, tally.rows, rejects) == (9, 18, [])
    assert set(server.asked.values()) == {1}
    assert sum(server.asked.values()) == 9 + 2 * 18
    for number, row in enumerate(rows):
        assert row.documents[row.oracle] == CHUNKS[number // 2]
        assert len(set(row.documents)) == 5
        assert set(row.documents) <= set(CHUNKS)
        assert BERKELEY.quotes_of(row.answer)[0] in CHUNKS[number // 2]
        assert BERKELEY.admits_absence(row.absent_answer)
    assert len({row.oracle for row in rows}) > 3, "the oracle is not always in the same place"
    assert check(tmp_path / "rows.jsonl", BERKELEY).mistakes == []


def test_chunks_of_several_documents_are_taken_once() -> None:
    documents = [Document("a", "Same text.\n\nOther  text."), Document("b", "Same   text.")]
    assert distinct_chunks(documents, max_chars=15) == ["Same text.", "Other  text."]


def test_a_chunk_without_questions_makes_no_rows_and_is_not_asked_for_ever(make) -> None:
    def rule(prompt: str) -> str:
        if is_for_questions(prompt) and ("Chapter 2" in prompt or "Chapter 5" in prompt):
            return "NONE" if "Chapter 2" in prompt else " \n- \n"
        return far_end.berkeley(prompt)

    tally, rows, _, server = make(rule, questions=1, tries=3)
    assert (tally.chunks_without_questions, tally.rows, len(rows)) == (2, 7, 7)
    # One question to the first; the other said nothing usable, so it was asked three times.
    assert sum(server.asked.values()) == 8 + 3 + 2 * 7
    again, _, _, other = make(rule, questions=1, tries=3)
    assert (again.rows, sum(other.asked.values())) == (7, 0)


def test_a_teacher_without_a_single_question_ends_with_no_row(make) -> None:
    tally, _, _, server = make(lambda prompt: "NONE")
    assert (tally.chunks_without_questions, tally.rows) == (9, 0)
    assert sum(server.asked.values()) == 9


@pytest.mark.parametrize(
    ("spoil", "reason", "detail"),
    [
        (
            lambda text: text.replace("Chapter", "Section"),
            "unfaithful",
            "a quote is in no document",
        ),
        (
            lambda text: text.replace("<ANSWER>:", "Answer:"),
            "unstructured",
            "headings or the final",
        ),
        (lambda text: "", "empty", "the answer is empty"),
    ],
)
def test_answers_that_would_teach_badly_are_asked_for_again_then_dropped(
    spoil, reason, detail, make
) -> None:
    def rule(prompt: str) -> str:
        text = far_end.berkeley(prompt)
        is_bad = not is_for_questions(prompt) and CHUNKS[4] in prompt.split("Question:")[0]
        return spoil(text) if is_bad and "may not answer" not in prompt else text

    tally, rows, rejects, _ = make(rule, questions=1, distractors=2, tries=3)
    assert tally.dropped == {reason: 1}
    assert [(r["chunk"], r["reason"]) for r in rejects] == [(4, reason)]
    assert rejects[0]["detail"].startswith(detail)
    assert rejects[0]["question"].startswith("What is said of")
    assert len(rows) == 8
    assert all(CHUNKS[4] != row.documents[row.oracle] for row in rows)


def test_a_request_that_is_refused_costs_its_own_row_alone(make) -> None:
    first = f"<DOCUMENT>{CHUNKS[3]}</DOCUMENT>\n\nQuestion:"
    tally, rows, [reject], _ = make(far_end.berkeley, questions=1, refuses=first)
    assert (tally.rows, len(rows), tally.dropped) == (8, 8, {"refused": 1})
    assert (reject["chunk"], reject["reason"]) == (3, "refused")
    assert "this request is refused" in reject["detail"]


def test_questions_are_stripped_of_numbers_and_repetitions(make) -> None:
    def rule(prompt: str) -> str:
        if is_for_questions(prompt):
            return "1. What is 2 and 3?\n- What is 2 and 3?\nQ2: Why?\n\n3) 5 of what?\n4. More?"
        return far_end.berkeley(prompt)

    _, rows, _, _ = make(rule, chunks=CHUNKS[:7], questions=3)
    assert [row.question for row in rows[:3]] == ["What is 2 and 3?", "Why?", "5 of what?"]


def test_citations_of_the_absent_answer_count_the_oracle_too(make) -> None:
    def rule(prompt: str) -> str:
        if "患者可能提出" in prompt:
            return "这里说了什么?"
        documents = re.findall(r"\[文档(\d+)\]\n(.+)", prompt)
        number, text = documents[-1]
        is_absent = "可能不能回答问题" in prompt
        body = "文档中没有足够的证据。" if is_absent else ""
        parts = {"证据引用": f"{body}[文档{number}]:“{text}”", "CoT推理": "1. 看文档。"}
        return "\n".join(f"{h}\n{parts.get(h, '无。')}" for h in MEDICAL.headings)

    _, rows, rejects, _ = make(rule, format=MEDICAL, questions=1, distractors=3)
    assert (len(rows), rejects) == (9, [])
    for row in rows:
        for answer, without in ((row.answer, None), (row.absent_answer, row.oracle)):
            [number] = MEDICAL.cited(answer)
            assert number - 1 != without
            [quote] = MEDICAL.quotes_of(answer)
            assert quote == row.documents[number - 1]


def test_too_few_chunks_for_a_row_are_said(make) -> None:
    with pytest.raises(DataError) as caught:
        make(far_end.berkeley, chunks=CHUNKS[:5], distractors=4)
    assert str(caught.value).startswith("5 different chunks are too few: a row shows 6 documents")


# --- killed -------------------------------------------------------------------------------------


def command(out: Path, url: str, documents: list[str], *words: str) -> list[str]:
    return [
        sys.executable, "-m", "baton", "data", "raft", "build", *documents, "--out", str(out),
        "--teacher-url", url, "--teacher-model", "m", "--format", "berkeley", "--timeout", "1",
        "--chunk-chars", "1500", "--questions", "1", "--parallel", "4", *words,
    ]  # fmt: skip


def documents_of(folder: Path) -> list[str]:
    """Real API documents where they are, Markdown, text and a PDF."""
    from test_documents import write_pdf

    folder.mkdir()
    (folder / "plain.txt").write_text("\n\n".join(CHUNKS), encoding="utf-8")
    write_pdf(folder / "guide.pdf", [[f"{chunk[:60]}" for chunk in CHUNKS[:4]]])
    # Enough for some kills also where the real ones are not.
    rows = [
        {"api_data": {"name": f"{word}{number}", "text": f"Call {word}({number}) first. " * 20}}
        for word in WORDS
        for number in range(5)
    ]
    (folder / "api.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [str(folder / name) for name in ("plain.txt", "guide.pdf", "api.jsonl")]
    found.append(str(REPOSITORY / "docs" / "handover.md"))
    if REAL.exists():
        head = REAL.read_text(encoding="utf-8").splitlines()[:150]
        (folder / "torchhub.jsonl").write_text("\n".join(head), encoding="utf-8")
        found.append(str(folder / "torchhub.jsonl"))
    return found


@pytest.mark.slow
def test_a_build_killed_at_random_asks_nothing_twice_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "unit" / "data"))
    documents = documents_of(tmp_path / "in")
    words = ("--field", "api_data")
    environment = os.environ | {"OPENAI_API_KEY": "canary-token"}
    calm = far_end.Teacher(far_end.berkeley)
    with far_end.Server(calm) as server:
        whole = tmp_path / "whole.jsonl"
        done = subprocess.run(
            command(whole, server.url, documents, *words),
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read(whole)) > 20

    # The same, with faults of every kind, killed again and again.
    rough = far_end.Teacher(
        far_end.berkeley, faults_one_in=9, silent_seconds=1.5, delay_seconds=0.01
    )
    out = tmp_path / "killed.jsonl"
    rng, kills = random.Random(5), 0
    with far_end.Server(rough) as server:
        words_now = command(out, server.url, documents, *words)
        while True:
            process = subprocess.Popen(
                words_now, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment,
            )  # fmt: skip
            before = sum(rough.answered.values())
            due = before + rng.randrange(5, 25)
            while process.poll() is None and (kills >= 4 or sum(rough.answered.values()) < due):
                time.sleep(0.005)
            if process.poll() is not None:
                break
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            process.communicate()
            kills += 1
            assert not out.exists()
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    assert kills >= 3
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.rejects.jsonl").read_bytes() == Path(f"{whole}.rejects.jsonl").read_bytes()
    # Only what was on its way at a kill can have been asked for again.
    twice = Counter({request: n - 1 for request, n in rough.answered.items() if n > 1})
    assert sum(twice.values()) <= kills * 4
    again = far_end.Teacher(far_end.berkeley)
    with far_end.Server(again) as server:
        out.unlink()
        subprocess.run(command(out, server.url, documents, *words), check=True, env=environment)
    assert not again.asked, "everything was in the cache"
    assert out.read_bytes() == whole.read_bytes()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"canary-token" not in path.read_bytes()
