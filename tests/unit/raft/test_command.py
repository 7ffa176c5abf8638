"""`baton data raft` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import teacher as far_end
from click.testing import CliRunner, Result

from baton.cli import cli
from baton.errors import ConfigError, DataError, ExitStatus, TeacherError
from baton.pipelines.raft.rows import read


def baton(*words: str) -> Result:
    return CliRunner().invoke(cli, ["data", "raft", *words])


@pytest.mark.parametrize("name", ["medical", "berkeley"])
def test_the_sample_validates(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written = baton("sample", "--format", name, "--out", str(path))
    assert written.output == f"wrote {path}: 3 rows of the format {name}\n"
    checked = baton("check", str(path), "--format", name)
    assert checked.exit_code == 0
    assert checked.output == (
        f"{path}: 3 rows: 3 with an oracle, 3 of these with an absent_answer too; 6.0 documents a"
        " row\n"
    )
    assert baton("sample", "--format", name).output == path.read_text()


def test_mistakes_are_printed_one_a_line_and_end_in_78(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    baton("sample", "--out", str(path))
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace('"question"', '"qestion"').replace('"oracle"', '"orakel"')
    path.write_text("\n".join(lines))
    checked = baton("check", str(path))
    assert checked.exit_code == ExitStatus.STOP
    assert checked.stderr.splitlines()[:2] == [
        f"error: {path}:2: question: missing; did you mean qestion?",
        f"error: {path}:2: documents[0].type: expected oracle or distractor, got 'orakel'; did you"
        " mean oracle?",
    ]
    assert checked.stdout.splitlines()[-1].endswith("mistakes; nothing can be trained on this file")


def test_unknown_formats_are_answered_with_the_nearest(tmp_path: Path) -> None:
    for words in (["check", "x.jsonl"], ["sample"]):
        done = baton(*words, "--format", "medcal")
        assert isinstance(done.exception, ConfigError)
        assert "medical" in str(done.exception)


def test_a_build_says_what_it_asked_and_what_it_cost(tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    words = ["amber", "basalt", "cedar", "delta", "ember", "fjord", "granite", "harbour"]
    guide.write_text("\n\n".join(f"{w} is found in {w} valley, said to be nice." for w in words))
    out = tmp_path / "rows.jsonl"
    with far_end.Server(far_end.Teacher(far_end.berkeley)) as server:
        command = [
            "build", str(guide), "--out", str(out), "--teacher-url", server.url,
            "--teacher-model", "m", "--format", "berkeley", "--chunk-chars", "60",
            "--questions", "1", "--price-in", "1", "--price-out", "1",
        ]  # fmt: skip
        done = baton(*command)
        assert done.exception is None, done.exception
        lines = done.stdout.splitlines()
        assert lines[0] == "8 different chunks of at most 60 characters"
        assert lines[1] == (
            f"wrote {out}: 8 rows from 8 chunks (0 without a question); dropped: none"
        )
        assert lines[2].startswith("asked 24 times (0 retries), 0 replies were there already;")
        assert float(lines[2].rpartition("cost ")[2]) > 0
        again = baton(*command).stdout.splitlines()[2]
        assert again.startswith(
            "asked 0 times (0 retries), 24 replies were there already; 0 tokens"
        )
    assert len(read(out)) == 8


def test_a_build_without_a_single_row_fails_and_says_where_to_look(tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text("\n\n".join(f"word {n} " * 9 for n in range(9)))
    with far_end.Server(far_end.Teacher(lambda prompt: "NONE")) as server:
        done = baton(
            "build", str(guide), "--out", str(tmp_path / "r.jsonl"), "--teacher-url", server.url,
            "--teacher-model", "m", "--chunk-chars", "80",
        )  # fmt: skip
    assert isinstance(done.exception, DataError)
    assert "9 chunks (9 without a question)" in done.stdout
    assert str(done.exception).endswith(
        f"no row could be made; see {tmp_path}/r.jsonl.rejects.jsonl"
    )


def test_a_teacher_that_is_not_there_fails_with_a_status_that_may_be_tried_again(
    tmp_path: Path,
) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text("\n\n".join(f"word {n} " * 9 for n in range(9)))
    words = ["build", str(guide), "--out", str(tmp_path / "r.jsonl"), "--teacher-model", "m"]
    gone = baton(
        *words, "--teacher-url", "http://127.0.0.1:9/v1", "--attempts", "1", "--chunk-chars", "80"
    )
    assert isinstance(gone.exception, TeacherError)
    assert gone.exception.exit_status == ExitStatus.FAILED
    assert not list(tmp_path.glob("*.jsonl*"))
    odd = baton(*words, "--teacher-url", "localhost")
    assert isinstance(odd.exception, ConfigError)
    assert json.dumps(str(odd.exception)).startswith('"the teacher: url must begin with')
