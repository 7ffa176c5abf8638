"""Rows as people write them, and everything that may be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from baton.cli import cli
from baton.errors import DataError
from baton.pipelines.clara.rows import examine_ask, examine_say, read_ask, read_say

SAY = {"data_type": "qa", "question": ["q1", "q2"], "answers": ["a1", "a2"], "docs": ["d"]}
ASK = {"question": "q", "docs": ["d0", "d1", "d2"], "gold_answer": "a", "pos_index": [1]}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["gold_answer", "answer", "answers", "golden_answers"])
@pytest.mark.parametrize("gold", ["yes", ["yes", "indeed"]])
def test_golds_stand_under_any_of_four_names(tmp_path: Path, key, gold) -> None:
    row = {k: v for k, v in ASK.items() if k != "gold_answer"} | {key: gold}
    [found] = read_ask(written(tmp_path / "r.jsonl", row), least=3)
    assert found.golds == (("yes",) if isinstance(gold, str) else ("yes", "indeed"))
    assert found.positives == (1,)


def test_rows_without_positives_are_rows(tmp_path: Path) -> None:
    row = {k: v for k, v in ASK.items() if k != "pos_index"}
    [found] = read_ask(written(tmp_path / "r.jsonl", row), least=1)
    assert found.positives is None


def test_a_paraphrase_needs_no_question(tmp_path: Path) -> None:
    row = {"data_type": "paraphrase", "answers": ["said otherwise"], "docs": ["d"]}
    [found] = read_say(written(tmp_path / "r.jsonl", row))
    assert (found.kind, found.questions, found.answers) == ("paraphrase", (), ("said otherwise",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_type": "summary"}, "data_type: expected qa or paraphrase, got 'summary'"),
        ({"docs": ["a", "b"]}, "docs: stage 1 takes one document a row, got 2"),
        ({"docs": "a"}, "docs: expected a list of texts, got 'a'"),
        ({"answers": ["a"]}, "answers: 1 answers to 2 questions; each needs one"),
        ({"question": ["q", ""]}, "question[1]: empty; fill it in, or remove the row"),
        ({"question": ["q", 3]}, "question[1]: expected text, got 3"),
        ({"docs": ["x <MEM0> y"]}, "docs[0]: holds <MEM0>, which is a token of this method;"
         " write it otherwise"),
        ({"docs": ["\ud83d"]}, "docs[0]: holds half a surrogate pair; write the character whole"),
    ],
)  # fmt: skip
def test_mistakes_of_stage_1_rows_are_named(tmp_path: Path, changes, message) -> None:
    path = written(tmp_path / "r.jsonl", SAY, SAY | changes)
    rows, problems = examine_say(path)
    assert problems == [f"{path}:2: {message}"]
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"docs": ["a"], "pos_index": [0]}, "docs: 1 documents are fewer than top_k (2); add"
         " documents, or lower top_k"),
        ({"docs": [*"abcde"]}, "docs: 5 documents, this stage takes exactly top_k (4)"),
        ({"pos_index": [3]}, "pos_index: there is no document 3; docs has 0 to 2"),
        ({"pos_index": [1, 1]}, "pos_index: names a document twice: [1, 1]"),
        ({"pos_index": 1}, "pos_index: expected a list of positions in docs, got 1"),
        ({"gold_answer": None}, "gold_answer: missing; did you mean gold_answer?"),
        ({"question": ["q"]}, "question: expected text, got ['q']"),
    ],
)  # fmt: skip
def test_mistakes_of_other_rows_are_named(tmp_path: Path, changes, message) -> None:
    path = written(tmp_path / "r.jsonl", ASK, ASK | changes)
    assert examine_ask(path, least=2, most=4)[1] == [f"{path}:2: {message}"]


def test_lines_that_are_no_rows_are_named_and_reading_ends(tmp_path: Path) -> None:
    (path := tmp_path / "r.jsonl").write_text(json.dumps(SAY) + "\n{oops\n[1]\n")
    with pytest.raises(DataError) as caught:
        read_say(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:2: row: not JSON (")
    assert second == (
        f"{path}:3: row: a JSON list, expected an object with data_type, question, answers, docs"
    )


def test_the_command_names_mistakes_and_notes_and_ends_in_78(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", ASK, ASK | {"docs": ["d" * 2000, "b", "c"]}, {"docs": 3})
    done = CliRunner().invoke(cli, ["data", "clara", "check", str(path), "--top-k", "2"])
    assert done.exit_code == 78
    assert f"error: {path}:3: question: missing" in done.output
    assert f"{path}:2: a document of 2,000 characters is more than 256 tokens" in done.output
    assert "2 rows are fewer than the 50 that the guide recommends for stage 3" in done.output
    assert f"{path}: 2 rows of stage 3: 3 to 3 documents a row" in done.output


def test_a_tenth_is_held_out_and_nothing_lost(tmp_path: Path) -> None:
    rows = [ASK | {"question": f"q{n}"} for n in range(60)]
    path = written(tmp_path / "r.jsonl", *rows)
    done = CliRunner().invoke(cli, ["data", "clara", "split", str(path), "--out", str(tmp_path)])
    assert done.output == f"wrote {tmp_path}: 54 rows to train on, 6 held out\n"
    parts = [read_ask(tmp_path / f"{name}.jsonl", least=3) for name in ("train", "held_out")]
    assert sorted(row.question for part in parts for row in part) == sorted(
        row["question"] for row in rows
    )
