"""Six thousand real questions in GB18030, trained on from four lines of YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2].parent / "shared" / "data"
CSV = DATA / "medical_qa_6000.gb18030.csv"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not beside this repository"),
]


def test_a_real_file_trains_from_four_lines_of_yaml(short_pair: Any, model_yaml: str) -> None:
    Path(short_pair.experiment).write_text(
        f"""{model_yaml}
matrix: {{data.rows: [200, 1k]}}
data:
  path: {CSV}
  encoding: gb18030
  columns: {{question: [title, ask], answer: answer}}
train: {{max_steps: 4, save_every_steps: 2}}
""",
        encoding="utf-8",
    )
    ended = short_pair("submit")
    assert ended.status == 0, ended.out + ended.err
    reports = {
        task: json.loads((short_pair.folder / "tasks" / task / "data" / "report.json").read_bytes())
        for task in ("200", "1k")
    }
    assert {task: report["rows"]["train"] for task, report in reports.items()} == {
        "200": 200,
        "1k": 1000,
    }
    small, large = (report["rows"] for report in reports.values())
    assert (small["dev"], small["test"], small["pool"]) == (
        large["dev"],
        large["test"],
        large["pool"],
    )
    assert reports["200"]["quality"]["read"] == 6000
    assert reports["200"]["sha256"]["test.jsonl"] == reports["1k"]["sha256"]["test.jsonl"]
    path = short_pair.folder / "tasks" / "200" / "data" / "test.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert any("\u4e00" <= char <= "\u9fff" for char in first["question"])


def test_more_rows_than_the_file_has_is_an_error_that_counts_them(
    short_pair: Any, model_yaml: str
) -> None:
    Path(short_pair.experiment).write_text(
        f"""{model_yaml}
data: {{path: {CSV}, columns: {{question: ask, answer: answer}}, rows: 20k}}
""",
        encoding="utf-8",
    )
    ended = short_pair("submit")
    assert ended.status == 78, ended.out
    assert "the training subset asks for 20,000 rows, but there are" in ended.out
    assert "of 6,000 read" in ended.out
    assert ended.out.count("started") == 1
