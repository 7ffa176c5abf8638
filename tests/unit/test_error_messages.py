"""What people read when something is wrong: the whole text, word by word.

A changed message shows up here as a diff. Every one must say what was wrong, what was found and
what to do, and end in the right status: 78 where running again cannot help, 2 for a command
that click does not understand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton.cli import main
from baton.config.document import Document
from baton.config.experiment import Experiment
from baton.errors import BatonError
from baton.handover import StopSignal
from baton.plan import build_plan
from baton.runner import TaskRunner, task_store

QA = """\
pipeline: medical_qa
matrix:
  adapter.method: [lora, qlora]
  data.rows: [20k, 50k]
model:
  source: huggingface
  name: some/model
data:
  hub: some/data
train:
  epochs: 3
"""


@dataclass(frozen=True)
class Said:
    """What a command printed as errors, and its exit status."""

    status: int
    lines: list[str]


Baton = Callable[..., Said]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the experiments `qa`, `other` and `smoke/qa`."""
    (tmp_path / "jobs" / "smoke").mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "local.yaml").write_text("launcher: local\n")
    (tmp_path / "launch" / "slurm-a100.yaml").write_text("launcher: local\n")
    (tmp_path / "jobs" / "qa.yaml").write_text(QA)
    (tmp_path / "jobs" / "other.yaml").write_text(QA.replace("qlora", "full"))
    (tmp_path / "jobs" / "smoke" / "qa.yaml").write_text(QA)
    monkeypatch.setenv("BATON_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def baton(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Baton:
    """Runs a command in this process; the project's folder reads HOME in what it says."""

    def call(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["baton", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        err = capsys.readouterr().err.replace(str(home), "HOME")
        assert "Traceback" not in err
        return Said(int(ended.value.code or 0), err.splitlines())

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(
            ["check", "qa", "--set", "train.epoch=1"],
            ["error: --set: train.epoch: unknown key; did you mean 'epochs'?"],
            id="unknown key",
        ),
        pytest.param(
            ["check", "qa", "--set", "train.epochs=three"],
            ["error: --set: train.epochs: expected a number, got the text 'three'"],
            id="wrong type",
        ),
        pytest.param(
            ["check", "qlora_10k"],
            [
                "error: no experiment or task 'qlora_10k' below HOME/jobs; did you mean qlora_50k"
                " or qlora_20k or lora_50k?"
            ],
            id="unknown name",
        ),
        pytest.param(
            ["check", "smoke/q"],
            ["error: no experiment or task 'smoke/q' below HOME/jobs; did you mean smoke/qa?"],
            id="unknown experiment",
        ),
        pytest.param(
            ["check", "qa/qlora_10k"],
            ["error: qa has no task 'qlora_10k'; did you mean qlora_50k or qlora_20k or lora_50k?"],
            id="unknown task",
        ),
        pytest.param(
            ["check", "lora_20k"],
            [
                "error: 'lora_20k' is a task of several experiments; say other/lora_20k or"
                " qa/lora_20k"
            ],
            id="ambiguous",
        ),
        pytest.param(
            ["plan", "qa", "--site", "slurm-a10"],
            ["error: no site 'slurm-a10' in HOME/launch; did you mean slurm-a100?"],
            id="unknown site",
        ),
        pytest.param(
            ["submit", "qa", "--drill", "qlora_20k@5"],
            [
                "error: --drill qlora_20k@5: expected TASK=SIGNAL@STEP with TERM, KILL, USR1, USR2"
                " or INT, e.g. lora_20k=TERM@5"
            ],
            id="bad drill",
        ),
        pytest.param(
            ["submit", "qa", "--drill", "full_20k=TERM@5"],
            [
                "error: --drill full_20k: not a task of this submission: lora_20k, lora_50k,"
                " qlora_20k, qlora_50k"
            ],
            id="drill of another task",
        ),
        pytest.param(
            ["check", "qa", "--set", "train.epochs"],
            ["error: --set train.epochs: expected key=value, e.g. train.epochs=1"],
            id="bad set",
        ),
        pytest.param(
            ["check", "qa", "--set", "train.epochs.x=1"],
            [
                "error: --set 'train.epochs.x': 'train.epochs' is not a mapping; set"
                " 'train.epochs' itself"
            ],
            id="set below a value",
        ),
        pytest.param(
            ["check", "qa", "--set", "pipeline=medical"],
            ["error: --set: pipeline: no pipeline 'medical'; did you mean medical_qa?"],
            id="unknown pipeline",
        ),
        pytest.param(
            ["check", "qa", "--set", "data.path=rows.csv"],
            [
                "error: HOME/jobs/qa.yaml:8: data: give either path or hub, got path='rows.csv' and"
                " hub='some/data'"
            ],
            id="rule across fields",
        ),
        pytest.param(
            ["check", "qa", "--set", "train.sharding=full"],
            [
                "error: HOME/jobs/qa.yaml:1: train.sharding: full cannot share out 4-bit weights;"
                " use adapter.method lora or full, got qlora"
            ],
            id="sharded 4-bit weights",
        ),
        pytest.param(
            ["check", "qa", "--set", "train.sharding=full", "--set", "train.precision=fp16"],
            [
                "error: HOME/jobs/qa.yaml:10: train: sharding: full needs precision bf16 or fp32,"
                " got fp16"
            ],
            id="sharded in fp16",
        ),
        pytest.param(
            ["check", "qa", "--set", "train.sharding=full", "--set", "train.optimizer=adafactor"],
            [
                "error: HOME/jobs/qa.yaml:10: train: sharding: full needs optimizer: adamw, got"
                " adafactor"
            ],
            id="sharded with another optimizer",
        ),
        pytest.param(
            ["check", "qa", "--set", "data.path=rows.csv", "--set", "data.hub="],
            ["error: --set: data.path: there is no file rows.csv (looked for from HOME)"],
            id="missing data file",
        ),
        pytest.param(
            ["check", "qa", "--set", "data.path=jobs", "--set", "data.hub="],
            ["error: --set: data.path: jobs is a folder; name a file"],
            id="data is a folder",
        ),
        pytest.param(["check", "no.yaml"], ["error: no.yaml: no such file"], id="missing file"),
        pytest.param(
            ["run", "no/plan.json", "--task", "x"],
            ["error: there is no plan no/plan.json"],
            id="missing plan",
        ),
        pytest.param(
            ["plan", "qa", "--store", "gs://bucket/x"],
            [
                "error: store 'gs://bucket/x': baton does not know gs://; name a folder,"
                " s3://bucket/prefix, hf://user/repository or hf://buckets/user/bucket"
            ],
            id="store of another kind",
        ),
        pytest.param(
            ["logs", "qa", "--store", "runs"],
            [
                "note: qa as it is now (DIGEST) was not submitted to HOME/runs",
                "error: logs is about one task; qa has: lora_20k, lora_50k, qlora_20k, qlora_50k",
            ],
            id="logs of several tasks",
        ),
        pytest.param(
            ["cancel", "qa", "--store", "runs"],
            [
                "note: qa as it is now (DIGEST) was not submitted to HOME/runs",
                "error: nothing to cancel: qa was not submitted to HOME/runs",
            ],
            id="cancel of nothing",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_to_do(
    baton: Baton, words: list[str], expected: list[str]
) -> None:
    said = baton(*words)
    digest = build_digest()
    assert [line.replace(digest, "DIGEST") for line in said.lines] == expected
    assert said.status == 78


def build_digest() -> str:
    from baton.plan import select

    return build_plan(select("qa").experiment, created="now").digest


def test_all_problems_of_a_file_come_at_once_in_its_order(home: Path, baton: Baton) -> None:
    (home / "jobs" / "bad.yaml").write_text(
        """\
pipeline: medical_qa
matrix: {data.rows: [1k, 2k]}
model: {source: huggingfac, nam: x/y}
data:
  hub: 3
  max_lenght: 5
  shares: [0.5, 0.5]
train:
  epochs: "3"
  batch_samples: 0
  learning_rate: fast
  precision: fp8
typo: 1
"""
    )
    said = baton("check", "bad")
    assert said.status == 78
    assert said.lines == [
        "error: HOME/jobs/bad.yaml:3: model.source: expected one of 'huggingface', 'modelscope',"
        " 'path', 'random', got the text 'huggingfac'; did you mean 'huggingface'?",
        "error: HOME/jobs/bad.yaml:5: data.hub: expected text, got the number 3; put it in quotes",
        "error: HOME/jobs/bad.yaml:6: data.max_lenght: unknown key; did you mean 'max_length'?",
        "error: HOME/jobs/bad.yaml:7: data.shares: expected a list of 3 items, got a list of 2"
        " items",
        "error: HOME/jobs/bad.yaml:9: train.epochs: expected a number, got the text '3'; remove the"
        " quotes",
        "error: HOME/jobs/bad.yaml:10: train.batch_samples: must be at least 1, got 0",
        "error: HOME/jobs/bad.yaml:11: train.learning_rate: expected a number, got the text 'fast'",
        "error: HOME/jobs/bad.yaml:12: train.precision: expected one of 'auto', 'bf16', 'fp16',"
        " 'fp32', got the text 'fp8'",
        "error: HOME/jobs/bad.yaml:13: typo: unknown key; known keys: model, data, adapter, train,"
        " eval",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["nope"],
        ["check"],
        ["check", "qa", "more"],
        ["submit", "qa", "--max-parallel", "0"],
        ["submit", "qa", "--max-parallel", "two"],
        ["run"],
        ["status", "qa", "--jsn"],
    ],
)
def test_a_command_that_is_none_ends_in_2_with_its_usage(baton: Baton, words: list[str]) -> None:
    said = baton(*words)
    assert said.status == 2
    assert said.lines[0].startswith("Usage: ")
    assert said.lines[-1].startswith("Error: ")


def test_without_a_jobs_folder_it_says_where_it_looked(home: Path, baton: Baton) -> None:
    (home / "jobs").rename(home / "work")
    said = baton("check", "qa")
    assert said.lines == ["error: BATON_HOME=HOME: there is no jobs/ folder in it"]
    assert said.status == 78


@pytest.mark.parametrize("command", ["plan", "submit", "status", "cancel"])
def test_a_store_that_is_a_file_is_no_store(home: Path, baton: Baton, command: str) -> None:
    (home / "file").write_text("")
    said = baton(command, "qa", "--store", "file")
    assert said.status == 78
    [line] = said.lines
    assert line.startswith("error: store 'file': ")


def test_an_empty_store_is_a_variable_that_is_not_set(baton: Baton) -> None:
    said = baton("plan", "qa", "--store", "")
    assert said.status == 78
    assert said.lines == ["error: store: the name is empty; name a folder (is a variable not set?)"]


@pytest.mark.parametrize("store", ["s3:/bucket", "S3:/bucket"])
def test_a_store_that_is_no_place_is_refused(baton: Baton, store: str) -> None:
    said = baton("plan", "qa", "--store", store)
    assert said.status == 78
    assert said.lines[0].startswith(f"error: store {store!r}: ")


@pytest.mark.parametrize("step", ["²", "-1", "1.5", "", "x", "1_0"])
def test_a_drill_needs_a_plain_step(baton: Baton, step: str) -> None:
    said = baton("submit", "qa", "--dry-run", "--drill", f"lora_20k=TERM@{step}")
    assert said.status == 78
    assert said.lines[0].startswith(f"error: --drill lora_20k=TERM@{step}: expected TASK=SIGNAL@")


# --- plans in a store -----------------------------------------------------------------------


def stored_plan(home: Path, change: Callable[[dict[str, Any]], Any] = lambda values: None) -> Path:
    """The plan of `qa`, as a submission would have frozen it."""
    from baton.plan import select

    plan = build_plan(select("qa").experiment, created="now")
    values = json.loads(plan.to_json())
    change(values)
    path = home / "runs" / "qa" / plan.digest / "plan.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values))
    return path


def test_a_plan_cut_off_is_answered_with_what_to_do(home: Path, baton: Baton) -> None:
    path = stored_plan(home)
    path.write_text(path.read_text()[:100])
    said = baton("status", "qa", "--store", "runs")
    assert said.status == 78
    [line] = said.lines
    assert line.startswith(f"error: HOME/runs/qa/{path.parent.name}/plan.json: not JSON (")
    assert line.endswith(
        "); it was damaged or cut off; move it away and submit again: it will be written anew"
    )


def test_a_plan_of_a_newer_baton_is_not_guessed_at(home: Path, baton: Baton) -> None:
    path = stored_plan(home, lambda values: values.update(schema=2))
    said = baton("submit", "qa", "--store", "runs")
    assert said.status == 78
    assert said.lines[0].startswith(
        f"error: HOME/runs/qa/{path.parent.name}/plan.json: written by a newer baton (schema 2,"
        " this one knows 1); upgrade baton to read it"
    )


def test_nobody_is_told_to_throw_away_the_plan_of_a_newer_baton(home: Path, baton: Baton) -> None:
    stored_plan(home, lambda values: values.update(schema=2))
    assert "move it away" not in baton("status", "qa", "--store", "runs").lines[0]


def test_a_plan_outside_of_a_store_does_not_choose_a_place_by_itself(
    home: Path, baton: Baton
) -> None:
    path = stored_plan(home)
    lone = home / "plan.json"
    path.rename(lone)
    done = run(str(lone), "--task", "lora_20k")
    assert done.status == 78
    [line] = done.lines
    assert line == (
        f"error: {lone} does not lie in a store (…/qa/{path.parent.name}/plan.json); name the store"
        " by --store"
    )


def run(*words: str, **environment: str) -> Said:
    """`baton run` in a process of its own: it takes over signals and logging."""
    done = subprocess.run(
        [sys.executable, "-m", "baton", "run", *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Said(done.returncode, done.stderr.splitlines())


def test_a_plan_that_no_longer_fits_is_refused_before_anything_is_claimed(home: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["tasks"][0]["config"]["adapter"]["method"] = "lara"

    path = stored_plan(home, change)
    said = run(str(path), "--task", "lora_20k")
    assert said.status == 78
    assert said.lines == [
        f"error: plan {path.parent.name}: adapter.method: expected one of 'lora', 'qlora', 'full',"
        " got the text 'lara'; did you mean 'lora'?"
    ]
    assert not (path.parent / "tasks").exists()


def test_the_second_runner_on_a_task_is_told_who_the_first_is(home: Path) -> None:
    from baton.identity import this_runner
    from baton.legs import Legs
    from baton.record import LegRecord, Plan

    path = stored_plan(home)
    plan = Plan.from_json(path.read_bytes(), where="plan.json")
    runner = this_runner()
    since = "2026-01-01T00:00:00.000+00:00"
    record = LegRecord(
        task="lora_20k", number=0, state="active", runner=runner, started=since, position=[0, 0, 0]
    )
    Legs(task_store(home / "runs", plan, "lora_20k"), "lora_20k", lambda: since).open(record)
    said = run(str(path), "--task", "lora_20k")
    assert said.status == 78
    [line] = said.lines
    assert line.startswith(
        f"error: qa/lora_20k: leg 1 is already working on this task (process {runner.pid} on"
        f" {runner.host}, since {since}); wait for it, or stop it with `baton cancel qa/lora_20k`"
    )


def test_run_refuses_a_store_of_another_kind(home: Path) -> None:
    path = stored_plan(home)
    said = run(str(path), "--task", "lora_20k", "--store", "gs://bucket/x")
    assert said.status == 78
    assert said.lines == [
        "error: store 'gs://bucket/x': baton does not know gs://; name a folder,"
        " s3://bucket/prefix, hf://user/repository or hf://buckets/user/bucket"
    ]


def test_a_grace_that_is_no_number_is_no_traceback(home: Path) -> None:
    path = stored_plan(home)
    said = run(str(path), "--task", "nope", BATON_GRACE_SECONDS="half a minute")
    assert said.status == 78


# --- inside a task --------------------------------------------------------------------------

MODEL = {
    "source": "random",
    "config": {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "tokenizer_vocab": 400,
}
ROWS = "ask,answer\n" + "".join(f"question number {i}?,the answer {i}\n" for i in range(40))
CHINESE = "ask,answer\n" + "".join(f"头痛怎么办呢{i},多喝水多休息{i}\n" for i in range(40))


def work_on(experiment: Experiment, root: Path) -> None:
    """Plan an experiment of one task and run a leg of it in this process."""
    plan = build_plan(experiment, created="now")
    task = plan.tasks[0]
    store = task_store(root, plan, task.name)
    TaskRunner(plan=plan, task=task, store=store, stop=StopSignal(), submission="s").run()


def fails(folder: Path, *, content: bytes = ROWS.encode(), **changes: dict[str, Any]) -> str:
    """What ends a task of this configuration; DATA is its file."""
    path = folder / "rows.csv"
    path.write_bytes(content)
    values: dict[str, Any] = {
        "pipeline": "medical_qa",
        "model": MODEL | changes.get("model", {}),
        "data": {"path": str(path), "columns": {"question": "ask", "answer": "answer"}}
        | {"max_length": 64}
        | changes.get("data", {}),
        "adapter": changes.get("adapter", {}),
        "train": {"max_steps": 1},
    }
    experiment = Experiment.read("e", Document("e.yaml", values, {}))
    with pytest.raises(BatonError) as caught:
        work_on(experiment, folder / "runs")
    assert caught.value.exit_status == 78
    return str(caught.value).replace(str(path), "DATA").replace(str(folder), "FOLDER")


def test_bytes_of_another_encoding_are_shown_with_their_place(tmp_path: Path) -> None:
    said = fails(tmp_path, content=CHINESE.encode("gb18030"), data={"encoding": "utf-8"})
    assert said == (
        "DATA: byte 15 (line 2) is 0xd4, which is not valid utf-8; declare encoding: gb18030; it"
        " decodes the whole file"
    )


def test_a_missing_column_is_answered_with_the_columns_there_are(tmp_path: Path) -> None:
    said = fails(tmp_path, data={"columns": {"question": "aks", "answer": "answer"}})
    assert said == (
        "DATA: there is no column 'aks' (did you mean 'ask'?); the columns are: ask, answer"
    )


def test_a_file_of_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    said = fails(tmp_path, content=b"ask,answer\n")
    assert said == "DATA: has a header but no rows; fetch or write it again"


def test_a_split_without_rows_counts_them(tmp_path: Path) -> None:
    said = fails(tmp_path, content="\n".join(ROWS.splitlines()[:5]).encode())
    assert said.startswith(
        "data.rows: 4 usable rows of 4 read split into 4 train, 0 dev and 0 test; none may be"
        " empty: bring at least 6 usable rows"
    )


def test_too_few_rows_for_a_subset_are_counted(tmp_path: Path) -> None:
    said = fails(tmp_path, data={"rows": 100})
    assert said == (
        "data.rows: the training subset asks for 100 rows, but there are 32: 40 usable rows of 40"
        " read, less 4 for dev and 4 for test; ask for at most 32, or bring at least 124 usable"
        " rows"
    )


def test_prompts_that_are_all_longer_than_the_context_are_no_training_data(tmp_path: Path) -> None:
    said = fails(tmp_path, data={"max_length": 8})
    assert "data.max_length" in said


def test_a_length_beyond_the_models_context_is_refused(tmp_path: Path) -> None:
    said = fails(tmp_path, data={"max_length": 512})
    assert "512" in said
    assert "256" in said
    assert "max_length" in said


def test_shares_that_leave_a_part_empty_are_refused(tmp_path: Path) -> None:
    assert "shares" in fails(tmp_path, data={"shares": [1.0, 0.0, 0.0]})


def test_targets_that_are_not_in_the_model_are_answered_with_its_layers(tmp_path: Path) -> None:
    said = fails(tmp_path, adapter={"targets": ["query", "key"]})
    assert said == (
        "adapter.targets: none of ['query', 'key'] is in this model; its linear layers are"
        " ['down_proj', 'gate_proj', 'k_proj', 'lm_head', 'o_proj', 'q_proj', 'up_proj', 'v_proj'],"
        " or use all-linear"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen9"},
        {"model_type": "vit"},
        {"hidden_size": "big"},
        {"hidden_size": -4},
        {"vocab_size": "many"},
        {"vocab_size": 10},
        {"hiden_size": 16},
    ],
    ids=lambda change: next(f"{key}={value}" for key, value in change.items()),
)
def test_a_random_model_that_cannot_be_built_says_which_key(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    said = fails(tmp_path, model={"config": MODEL["config"] | change})  # type: ignore[operator]
    assert "model" in said
    assert len(said) < 400, "nobody reads a list of five hundred models"


def test_a_random_model_without_a_type_says_so(tmp_path: Path) -> None:
    said = fails(tmp_path, model={"config": {}})
    assert said == "e.yaml:1: model: config.model_type is missing: name one, such as qwen2"


def test_modelscope_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.train.base import load_tokenizer
    from baton.train.config import HubModel

    # What the interpreter itself does for a package that is not there.
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(BatonError) as caught:
        load_tokenizer(HubModel(source="modelscope", name="a/b"), base_folder=tmp_path)
    assert str(caught.value) == (
        "`source: modelscope` needs the modelscope package: pip install modelscope"
    )
    assert caught.value.exit_status == 78


def test_a_model_folder_that_is_none_says_so(tmp_path: Path) -> None:
    from baton.train.base import load_tokenizer
    from baton.train.config import PathModel

    model = PathModel(source="path", path="no/such/folder")
    with pytest.raises(BatonError) as caught:
        load_tokenizer(model, base_folder=tmp_path)
    assert str(caught.value).startswith("model.path: no/such/folder is not a folder")
