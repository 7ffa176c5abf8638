"""Rows by a teacher or from rows of stage 1: verified, rejected, resumed, nothing asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import docx
import pytest
import teacher as far_end
from clara_lab import TEXTS
from click.testing import CliRunner

from baton.cli import cli
from baton.data.teacher import Teacher, TeacherConfig
from baton.errors import ConfigError, DataError
from baton.pipelines.clara.build import Recipe, build, build_from_rows
from baton.pipelines.clara.negatives import Fact, ask_rows
from baton.pipelines.clara.rows import read_ask, read_say
from baton.pipelines.clara.teach import Limits

REPOSITORY = Path(__file__).parents[3]
REAL = REPOSITORY.parent / "shared" / "data" / "clara_stage1_600.jsonl"
RECIPE = Recipe(top_k=2, candidates=4)
CHUNKS = [text.replace("; ", ". ") for text in TEXTS]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def make(tmp_path: Path):
    """Runs `build` against a server with a rule of its own."""
    servers = []

    def run(rule=far_end.clara, *, chunks=CHUNKS, recipe=RECIPE, refuses=None, out="rows"):
        server = far_end.Server(far_end.Teacher(rule, refuses=refuses))
        server.__enter__()
        servers.append(server)
        teacher = Teacher(
            TeacherConfig(url=server.url, model="m", attempts=2, timeout_seconds=5.0),
            tmp_path / "replies",
        )
        tally = build(chunks, teacher, recipe, tmp_path / out)
        return tally, tmp_path / out, server.teacher

    yield run
    for server in servers:
        server.__exit__()


def test_every_chunk_becomes_verified_rows_of_all_stages(make) -> None:
    tally, out, server = make()
    assert tally.failed == {}
    assert {k: tally.rows[k] for k in ("simple", "complex", "paraphrase")} == {
        "simple": 5,
        "complex": 5,
        "paraphrase": 5,
    }
    rows = read_say(out / "stage1.jsonl")
    assert [row.document for row in rows] == [text for text in CHUNKS for _ in range(3)]
    for row in rows:
        said = " ".join(row.answers)
        # What the first answer left out was asked for again, what is not there was taken out.
        for fact in far_end.re.split(r"(?<=[.])\s+", row.document):
            assert fact in said
        assert "the moon" not in row.answers
    assert set(server.asked.values()) == {1}
    for name, count in (("stage2", 2), ("stage3", 4)):
        asks = read_ask(out / f"{name}.jsonl", least=count, most=count)
        assert len(asks) == sum(len(row.questions) for row in rows)
        for ask in asks:
            [positive] = ask.positives
            assert ask.golds[0] in ask.documents[positive]
            assert len(set(ask.documents)) == count
    assert lines(out / "rejects.jsonl") == []


def test_what_stays_incomplete_is_rejected_with_the_reason_after_the_rounds(make) -> None:
    def rule(prompt: str) -> str:
        text = far_end.clara(prompt)
        if prompt.startswith("Below") and "Falstead" in prompt:
            return json.dumps({"missing": ["who lit it"], "wrong": []})
        return text

    tally, out, _ = make(rule, recipe=Recipe(top_k=2, candidates=4, limits=Limits(rounds=3)))
    assert tally.failed == {
        "simple incomplete": 1, "complex incomplete": 1, "paraphrase incomplete": 1
    }  # fmt: skip
    rejects = lines(out / "rejects.jsonl")
    assert {r["detail"] for r in rejects} == {"after 3 more rounds: who lit it"}
    assert all("Falstead" in r["document"] for r in rejects)
    assert not any("Falstead" in row.document for row in read_say(out / "stage1.jsonl"))


def test_replies_that_are_no_json_are_asked_for_again_then_rejected(make) -> None:
    seen: Counter[str] = Counter()

    def rule(prompt: str) -> str:
        seen[prompt] += 1
        if "Corwick" in prompt.partition("There")[0] and prompt.startswith("Write questions"):
            return "certainly! here you are" if seen[prompt] < 3 else far_end.clara(prompt)
        if "Belmore" in prompt and prompt.startswith("Write the document"):
            return "```json\n" + far_end.clara(prompt) + "\n```"
        if "Dunford" in prompt and prompt.startswith("Write the document"):
            return '{"text": "<MEM3>"}'
        return far_end.clara(prompt)

    tally, out, _ = make(rule)
    assert tally.failed == {"paraphrase unusable": 1}
    [reject] = lines(out / "rejects.jsonl")
    assert reject["detail"].startswith("a reserved word (<MEM3>) in ")
    assert sum(row.kind == "paraphrase" for row in read_say(out / "stage1.jsonl")) == 4


def test_a_refusal_costs_its_own_rows_alone(make) -> None:
    tally, out, _ = make(refuses="<DOCUMENT>\nCorwick")
    assert tally.failed == {f"{k} refused": 1 for k in ("simple", "complex", "paraphrase")}
    assert len(read_say(out / "stage1.jsonl")) == 12


def test_built_again_nothing_is_asked_and_the_bytes_are_the_same(make) -> None:
    _, first, _ = make()
    _, second, server = make(out="again")
    assert sum(server.asked.values()) == 0
    for name in ("stage1.jsonl", "stage2.jsonl", "stage3.jsonl", "rejects.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_too_few_chunks_are_said_before_anybody_is_asked(make) -> None:
    with pytest.raises(DataError, match="3 different chunks are too few for rows of 4 candidates"):
        make(chunks=CHUNKS[:3])


# --- negatives ----------------------------------------------------------------------------------


def test_random_negatives_follow_from_the_seed_and_positives_stand_anywhere() -> None:
    facts = [Fact(f"q{i}", "a", i % 5) for i in range(200)]

    def rows(seed: int) -> list[dict]:
        return list(ask_rows(facts, TEXTS, count=3, negatives="random", seed=seed))

    assert rows(1) == rows(1) != rows(2)
    places = Counter(row["pos_index"][0] for row in rows(1))
    assert set(places) == {0, 1, 2}
    others = Counter(text for row in rows(1) for text in row["docs"])
    assert set(others) == set(TEXTS)
    for fact, row in zip(facts, rows(1), strict=True):
        assert row["docs"][row["pos_index"][0]] == TEXTS[fact.document]
        assert len(set(row["docs"])) == 3


def test_nearest_negatives_are_the_most_alike() -> None:
    documents = ["red apples grow here", "green apples grow there", "ships sail", "ships sink",
                 "yellow apples grow nowhere"]  # fmt: skip
    [apples, ships] = ask_rows(
        [Fact("q", "a", 0), Fact("q", "a", 2)], documents, count=2, negatives="nearest", seed=0
    )
    assert "apples grow" in apples["docs"][1 - apples["pos_index"][0]]
    assert ships["docs"][1 - ships["pos_index"][0]] == "ships sink"


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.exists(), reason="the shared data is not beside the project")
@pytest.mark.parametrize("negatives", ["random", "nearest"])
def test_real_rows_of_stage_1_become_rows_of_stages_2_and_3(tmp_path: Path, negatives) -> None:
    rows = read_say(REAL)
    tally = build_from_rows(rows, Recipe(negatives=negatives), tmp_path)
    pairs = {(q, row.document) for row in rows for q in row.questions}
    assert tally.rows == {"stage2": len(pairs), "stage3": len(pairs)}
    asks = read_ask(tmp_path / "stage3.jsonl", least=20, most=20)
    by_question = {(row.question, row.documents[row.positives[0]]): row for row in asks}
    assert set(by_question) == pairs
    assert all(len(set(row.documents)) == 20 for row in asks)


# --- the command --------------------------------------------------------------------------------


def raw_folder(folder: Path) -> Path:
    """Text, Markdown, PDF and docx."""
    from test_documents import write_pdf

    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(CHUNKS), encoding="utf-8")
    (folder / "b.md").write_text("# Gars\n\nGars has a mill. It is old.", encoding="utf-8")
    write_pdf(folder / "c.pdf", [["Holwick was rebuilt in stone.", "Its bridge has nine arches."]])
    document = docx.Document()
    document.add_paragraph("Ivern keeps bees. Its honey is dark.")
    document.save(str(folder / "d.docx"))
    return folder


def command(raw: Path, out: Path, url: str, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "baton", "data", "clara", "build", str(raw), "--out", str(out),
        "--teacher-url", url, "--teacher-model", "m", "--chunk-chars", "120", "--top-k", "2",
        "--candidates", "4", "--timeout", "2", "--parallel", "2", *words,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_raw_folder_is_built_through_faults_and_kills_without_asking_twice(
    tmp_path: Path,
) -> None:
    sys.path.insert(0, str(REPOSITORY / "tests" / "unit" / "data"))
    raw = raw_folder(tmp_path / "raw")
    teacher = far_end.Teacher(
        far_end.clara, 5, silent_seconds=3.0, delay_seconds=0.05, log=tmp_path / "asked.jsonl"
    )
    with far_end.Server(teacher) as server:
        words = command(raw, tmp_path / "rows", server.url)
        killed = 0
        for _ in range(2):
            process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            until = time.monotonic() + 60
            before = len(teacher.answered)
            while len(teacher.answered) < before + 8 and time.monotonic() < until:
                time.sleep(0.05)
                if process.poll() is not None:
                    break
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
            process.wait()
            assert not (tmp_path / "rows" / "stage1.jsonl").exists() or killed == 0
        assert killed > 0
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        # A reply on its way at a kill may be asked for again: at most --parallel of them a kill.
        assert max(teacher.answered.values()) <= 2
        assert sum(count - 1 for count in teacher.answered.values()) <= 2 * killed
        rows = read_say(tmp_path / "rows" / "stage1.jsonl")
        texts = " ".join(row.document for row in rows)
        assert all(word in texts for word in ("Arden", "Gars", "Holwick", "Ivern"))
        asked = sum(teacher.asked.values())
        cache = ["--cache", str(tmp_path / "rows.replies")]
        again = command(raw, tmp_path / "again", server.url, *cache)
        assert subprocess.run(again, capture_output=True, check=False).returncode == 0
        assert sum(teacher.asked.values()) == asked
    for name in ("stage1.jsonl", "stage2.jsonl", "stage3.jsonl"):
        ours = (tmp_path / "rows" / name).read_bytes()
        assert ours == (tmp_path / "again" / name).read_bytes()


def baton(*words: str):
    return CliRunner().invoke(cli, ["data", "clara", *words])


def test_rows_are_made_of_rows_without_a_teacher(tmp_path: Path) -> None:
    smoke = REPOSITORY / "jobs" / "smoke" / "clara_stage1.jsonl"
    words = ["--out", str(tmp_path), "--top-k", "2", "--candidates", "4"]
    done = baton("build", "--from-stage1", str(smoke), *words)
    assert done.output == (
        f"wrote {tmp_path}: 160 rows of stage 2 and 160 of stage 3 from 40 documents\n"
    )
    checked = baton("check", str(tmp_path / "stage3.jsonl"), "--top-k", "4")
    assert checked.exit_code == 0
    assert "160 rows of stage 3: 4 to 4 documents a row, 0 rows without pos_index" in checked.output


def test_what_a_build_lacks_is_said(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    for words, message in (
        ([], "needs documents"),
        (["a.txt"], "needs --teacher-url"),
        (["a.txt", "--from-stage1", "rows"], "one or the other"),
        (["--from-stage1", "rows", "--top-k", "9", "--candidates", "5"], r"candidates \(5\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            raise baton("build", *out, *words).exception
