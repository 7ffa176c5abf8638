"""`baton data t5` and the data stage: every row kept or accounted for, tokens made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from baton.cli import cli
from baton.errors import DataError
from baton.handover import StopSignal
from baton.pipelines.t5_pretrain import data as stage
from baton.pipelines.t5_pretrain.model import PairModel
from baton.stage import Outcome

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
real_data = [
    pytest.mark.real_data,
    pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside this repository"),
]


def baton_data(*words: object) -> str:
    done = CliRunner().invoke(cli, ["data", "t5", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.output)


def pairs_in(*paths: Path) -> list[dict[str, str]]:
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def rejects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").open(encoding="utf-8")]


ROWS = [{"q": f"问题 {n}", "more": f"第{n}句", "a": f"答案 {n}"} for n in range(300)]


def written(folder: Path, kind: str) -> Path:
    """The same rows, two of them broken, in some format."""
    path = folder / f"rows.{kind.split('-')[0]}"
    bad = [{"q": "no answer", "more": "", "a": None}, {"q": " ", "more": "", "a": "no question"}]
    if kind == "csv-gb18030":
        lines = ["q,more,a", *(",".join(row.values()) for row in ROWS)]
        lines += ["one,two", '" ",,no question']
        path.write_text("\r\n".join(lines), encoding="gb18030")
    elif kind == "json":
        path.write_text(json.dumps([*ROWS, *bad], ensure_ascii=False), encoding="utf-8")
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in [*ROWS, *bad])
        path.write_text(text, encoding="utf-16")
    return path


@pytest.mark.parametrize("kind", ["csv-gb18030", "json", "jsonl"])
def test_any_format_becomes_two_parquet_files_and_the_rejects(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--prompt", "q+more", "--response", "a", "--valid-share", "0.1", "--out", out]
    said = baton_data("prepare", written(tmp_path, kind), *options)
    train, valid = pairs_in(out / "train.parquet"), pairs_in(out / "valid.parquet")
    assert 10 < len(valid) < 60
    key = {row["prompt"]: row["response"] for row in train + valid}
    assert key == {f"{row['q']}\n{row['more']}": row["a"] for row in ROWS}
    assert len(train) + len(valid) == 300
    second = "broken_row" if kind == "csv-gb18030" else "null_value"
    assert [(r["row"], r["reason"]) for r in rejects(out)] == [(301, second), (302, "empty_prompt")]
    report = json.loads((out / "report.json").read_bytes())
    assert report["rows"] == {"train": len(train), "valid": len(valid)}
    assert report["quality"]["read"] == 302
    assert "shape: 302 rows x 3 columns" in said
    assert f"nulls: prompt 0, response {1 if second == 'null_value' else 0}" in said
    assert f"train {len(train)}, valid {len(valid)}" in said


def test_the_same_seed_holds_the_same_prompts_out(tmp_path: Path) -> None:
    path = written(tmp_path, "json")
    held_out = []
    for number, seed in enumerate((1, 1, 2)):
        options = ["--prompt", "q", "--response", "a", "--valid-share", "0.2", "--seed", seed]
        baton_data("prepare", path, *options, "--out", tmp_path / str(number))
        held_out.append(pairs_in(tmp_path / str(number) / "valid.parquet"))
    assert held_out[0] == held_out[1] != held_out[2]


def test_quality_reads_everything_and_writes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl")
    said = baton_data("quality", path, "--prompt", "q", "--response", "a")
    assert "read 302 rows (utf-16-le; columns q, more, a)" in said
    assert "prompt: min 4 · " in said
    assert "first rows: prompt: 问题 0 | response: 答案 0" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name]


def test_a_file_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path, out = written(tmp_path, "json"), tmp_path / "out"
    options = ["--prompt", "q", "--response", "a", "--out", str(out)]
    baton_data("prepare", path, *options)
    before = {each.name: each.read_bytes() for each in out.iterdir()}
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    done = CliRunner().invoke(cli, ["data", "t5", "prepare", str(path), *options])
    assert "the JSON array breaks after" in str(done.exception)
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before


# --- the data stage -----------------------------------------------------------------------------


def test_a_data_stage_handed_over_and_killed_ends_in_the_same_bytes(
    many: Path, task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = task(many), task(many)
    assert whole.prepare() is Outcome.FINISHED
    monkeypatch.setattr(stage, "_KEEP_EVERY_SAMPLES", 500)
    cut.stop._handle(15, None)
    assert cut.prepare() is Outcome.HANDED_OVER
    cut.stop = StopSignal()
    kept = sorted((cut.root / "data" / "shards").iterdir())
    assert [path.stem for path in kept] == ["000000000512"]

    class Killed(BaseException):
        pass

    class KilledLater(StopSignal):
        asked = 0

        @property
        def is_set(self) -> bool:
            self.asked += 1
            # Asked for every row that is passed by, then after each batch.
            if self.asked == 512 + 2:
                raise Killed
            return False

    cut.stop = KilledLater()
    with pytest.raises(Killed):
        cut.prepare()
    cut.stop = StopSignal()
    assert len(list((cut.root / "data" / "shards").iterdir())) == 2
    assert cut.prepare() is Outcome.FINISHED
    assert cut.files() == whole.files()
    assert not (cut.root / "data" / "shards").exists()
    reports = [json.loads((t.root / "data" / "report.json").read_bytes()) for t in (whole, cut)]
    assert reports[0] == reports[1]
    assert reports[0]["tokens"]["train"]["samples"] + reports[0]["rows"]["valid"] == 9000


def test_a_kill_after_the_last_row_encodes_nothing_again(
    many: Path, task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = task(many), task(many)
    assert whole.prepare() is Outcome.FINISHED

    class Killed(BaseException):
        pass

    def killed(path: Path) -> str:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, "sha256_of", killed)
        with pytest.raises(Killed):
            cut.prepare()
    before = (cut.root / "data" / "train.tokens").stat().st_mtime_ns
    assert cut.prepare() is Outcome.FINISHED
    assert (cut.root / "data" / "train.tokens").stat().st_mtime_ns == before
    assert cut.files() == whole.files()


def test_token_files_that_are_gone_are_made_anew(
    many: Path, task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = task(many), task(many)
    assert whole.prepare() is Outcome.FINISHED
    cut.stop._handle(15, None)
    assert cut.prepare() is Outcome.HANDED_OVER
    (cut.root / "data" / ".train.tokens").unlink()
    cut.stop = StopSignal()
    assert cut.prepare() is Outcome.FINISHED
    assert cut.files() == whole.files()


def test_validation_pairs_may_be_a_file_of_their_own(
    many: Path, task: Callable[..., Any], tmp_path: Path
) -> None:
    valid = tmp_path / "valid.jsonl"
    rows = [{"q": "one", "a": "1"}, {"q": "", "a": "2"}, {"q": "three", "a": "3"}]
    valid.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    one = task(many, data={"valid": str(valid), "rows": 1000})
    assert one.prepare() is Outcome.FINISHED
    report = json.loads((one.root / "data" / "report.json").read_bytes())
    assert report["rows"] == {"train": 1000, "valid": 2}
    assert [pair.prompt for pair in stage.read_valid(one.root)] == ["one", "three"]
    [left_out] = (one.root / "data" / "rejects_valid.jsonl").read_text().splitlines()
    assert json.loads(left_out)["reason"] == "empty_prompt"


def test_a_tokenizer_of_ones_own_is_kept_with_the_task(
    many: Path, task: Callable[..., Any], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    baton_data("tokenizer", many, "--prompt", "q", "--response", "a", "--vocab", 290, "--out", own)
    one = task(many, data={"rows": 50}, tokenizer={"source": "path", "path": str(own)})
    assert one.prepare() is Outcome.FINISHED
    shutil.rmtree(own)
    assert len(PairModel.of(one.leg()).tokenizer()) == 290
    missing = task(many, tokenizer={"source": "path", "path": str(own)})
    with pytest.raises(DataError) as caught:
        missing.prepare()
    assert str(caught.value).startswith(f"tokenizer.path: {own} is not a folder; make one with")


# --- real files ---------------------------------------------------------------------------------

REAL = {
    "chat_train_3k.parquet": ("prompt", "response", 3000, "utf-8"),
    "chat_valid_1k.parquet": ("prompt", "response", 1000, "utf-8"),
    "medical_qa_6000.gb18030.csv": ("title+ask", "answer", 6000, "gb18030"),
    "math_gsm8k_train.jsonl": ("question", "answer", 7473, "utf-8"),
}


@pytest.fixture(params=[pytest.param(name, marks=real_data) for name in REAL])
def real(request: pytest.FixtureRequest) -> tuple[Path, str, str, int, str]:
    return (SHARED / request.param, *REAL[request.param])


def test_real_files_are_prepared_with_every_row_accounted_for(
    real: tuple[Path, str, str, int, str], tmp_path: Path
) -> None:
    path, prompt, response, count, encoding = real
    options = ["--prompt", prompt, "--response", response]
    said = baton_data("prepare", path, *options, "--out", tmp_path)
    kept = pairs_in(tmp_path / "train.parquet", tmp_path / "valid.parquet")
    assert len(kept) + len(rejects(tmp_path)) == count
    assert len(kept) > 0.99 * count
    assert f"read {count:,} rows ({encoding}; " in said


@pytest.mark.real_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside this repository")
def test_a_tokenizer_of_the_guides_size_is_trained_on_real_pairs(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    said = baton_data("tokenizer", SHARED / "chat_train_3k.parquet", "--out", tmp_path / "tok")
    assert "29,298 tokens" in said
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert len(tokenizer) == 29_298
    text = "高血压患者日常饮食需要注意什么？"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
