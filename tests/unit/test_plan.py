"""From a name on the command line to a frozen plan."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import frozen
from baton.config.document import Document
from baton.config.experiment import Experiment, apply_set
from baton.config.yaml import load_yaml
from baton.errors import ConfigError, DamagedError
from baton.plan import build_plan, fingerprint, select
from baton.record import Plan

NOW = "2026-01-02T03:04:05.678+00:00"
TASK = """\
pipeline: medical_qa
matrix:
  adapter.method: [lora, qlora]
  data.rows: [20k, 50k]
model: {source: huggingface, name: some/model}
data: {hub: some/data}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two experiments and a smoke one whose tasks have the same names."""
    (tmp_path / "jobs" / "smoke").mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    (tmp_path / "jobs" / "qa.yaml").write_text(TASK)
    (tmp_path / "jobs" / "smoke" / "qa.yaml").write_text(TASK)
    other = TASK.replace("[lora, qlora]", "[lora, full]").replace("50k", "90k")
    (tmp_path / "jobs" / "other.yaml").write_text(other)
    monkeypatch.setenv("BATON_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan_of(text: str, folder: Path, *settings: str) -> Plan:
    path = folder / "e.yaml"
    path.write_text(text, encoding="utf-8")
    return build_plan(Experiment.read("e", apply_set(load_yaml(path), settings)), created=NOW)


# --- select ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "experiment", "task"),
    [
        ("qa", "qa", None),
        ("smoke/qa", "smoke/qa", None),
        ("qa/lora_20k", "qa", "lora_20k"),
        ("smoke/qa/qlora_50k", "smoke/qa", "qlora_50k"),
        ("qlora_50k", "qa", "qlora_50k"),
        ("full_90k", "other", "full_90k"),
        ("jobs/qa.yaml", "qa", None),
        ("./jobs/smoke/qa.yaml", "smoke/qa", None),
        ("jobs/qa.yaml/lora_20k", "qa", "lora_20k"),
    ],
)
@pytest.mark.usefixtures("home")
def test_a_name_means_an_experiment_or_one_task(name: str, experiment: str, task: str) -> None:
    selection = select(name)
    assert (selection.experiment.name, selection.task) == (experiment, task)


@pytest.mark.usefixtures("home")
def test_a_name_may_be_of_a_task_that_only_set_makes() -> None:
    assert select("qlora_7", ["matrix.data.rows=[7]"]).task == "qlora_7"


def test_a_file_outside_of_jobs_is_called_by_its_stem(home: Path) -> None:
    (home / "mine.yaml").write_text(TASK)
    assert select(str(home / "mine.yaml")).experiment.name == "mine"


@pytest.mark.parametrize(
    "name", ["", "/", "..", "../jobs/qa", "qa/", "/qa", "QA", "jobs", "qa/x/y"]
)
@pytest.mark.usefixtures("home")
def test_odd_names_are_no_names(name: str) -> None:
    with pytest.raises(ConfigError):
        select(name)


# --- plans ----------------------------------------------------------------------------------


def test_every_point_becomes_a_task_with_its_whole_configuration(tmp_path: Path) -> None:
    plan = plan_of(TASK, tmp_path)
    assert [task.name for task in plan.tasks] == ["lora_20k", "lora_50k", "qlora_20k", "qlora_50k"]
    assert plan.task("qlora_20k").labels == {"method": "qlora", "rows": "20k"}
    assert plan.task("qlora_20k").config["data"]["rows"] == 20_000
    assert plan.task("qlora_20k").config["train"]["learning_rate"] == 1e-4


def test_a_plan_survives_its_json(tmp_path: Path) -> None:
    plan = plan_of(TASK, tmp_path)
    again = Plan.from_json(plan.to_json(), where="plan.json")
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_a_mistake_in_every_task_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(TASK, tmp_path, "train.epoch=3", "train.seed=x")
    assert caught.value.problems == [
        "--set: train.epoch: unknown key; did you mean 'epochs'?",
        "--set: train.seed: expected a whole number, got the text 'x'",
    ]


def test_a_mistake_in_one_task_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(TASK, tmp_path, "matrix.data.rows=[1k, 0, many]")
    assert caught.value.problems == [
        "--set: data.rows: must be at least 1, got 0",
        "--set: data.rows: expected a count such as 20000, 20k or 1.5M (at least 1), got the text"
        " 'many'",
    ]


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    matrix = "{x: {a_b: {train.seed: 1}, a: {train.seed: 2}}, y: {c: {train.epochs: 1}, b_c: {}}}"
    with pytest.raises(ConfigError) as caught:
        plan_of(TASK, tmp_path, f"matrix={matrix}")
    assert "two tasks would be called 'a_b_c'" in str(caught.value)


def test_a_thousand_tasks_are_planned_in_two_seconds(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(250)))
    # Processor time: what else this machine does is no part of the promise.
    started = time.process_time()
    plan = plan_of(TASK, tmp_path, f"matrix.train.seed=[{seeds}]")
    seconds = time.process_time() - started
    again = Plan.from_json(plan.to_json(), where="plan.json")
    assert len(again.tasks) == 1000
    assert seconds < 2.0


# --- the digest -----------------------------------------------------------------------------


def test_the_digest_is_the_same_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from baton.plan import *; "
        "from baton.config.experiment import Experiment; from baton.config.yaml import load_yaml; "
        "e = Experiment.read('e', load_yaml(Path(sys.argv[1]))); "
        "print(build_plan(e, created='then').digest)"
    )
    here = plan_of(TASK, tmp_path).digest
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "e.yaml")],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == here


def test_the_digest_does_not_depend_on_the_order_or_the_look_of_the_file(tmp_path: Path) -> None:
    other = """
data:   # a comment
  hub: 'some/data'
train: {epochs: 3, learning_rate: 0.0001}
model: {name: some/model, source: huggingface}
matrix: {adapter.method: [lora, qlora], data.rows: [20k, 50k]}
pipeline: medical_qa
"""
    assert plan_of(other, tmp_path).digest == plan_of(TASK, tmp_path).digest


@given(
    st.sampled_from(
        [
            "train.epochs=4",
            "train.seed=1",
            "data.seed=1",
            "model.revision=v2",
            "data.hub=some/other",
            "data.dev_rows=5",
            "adapter.r=9",
            "eval.max_samples=3",
            "eval.generate.sampling={seed: 1}",
            "matrix.data.rows=[20k]",
            "matrix.data.rows={20k: 20k, 50k: 50001}",
        ]
    )
)
def test_every_change_of_the_configuration_changes_the_digest(setting: str) -> None:
    base = {
        "pipeline": "medical_qa",
        "matrix": {"adapter.method": ["lora", "qlora"], "data.rows": ["20k", "50k"]},
        "model": {"source": "huggingface", "name": "some/model"},
        "data": {"hub": "some/data"},
    }
    document = Document("e.yaml", base, {})
    changed = apply_set(document, [setting])
    plans = [build_plan(Experiment.read("e", d), created=NOW) for d in (document, changed)]
    assert plans[0].digest != plans[1].digest


def test_the_digest_does_not_depend_on_when_or_under_which_name(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(TASK)
    plans = [
        build_plan(Experiment.read(name, load_yaml(path)), created=created)
        for name, created in (("a", NOW), ("b", "later"))
    ]
    assert plans[0].digest == plans[1].digest


def local(folder: Path, data: bytes) -> Plan:
    (folder / "rows.csv").write_bytes(data)
    text = TASK.replace("{hub: some/data}", f"{{path: {folder / 'rows.csv'}}}")
    return plan_of(text, folder)


def test_one_other_byte_in_the_data_is_another_digest(tmp_path: Path) -> None:
    first, second = local(tmp_path, b"a,b\n1,2\n"), local(tmp_path, b"a,b\n1,3\n")
    assert first.digest != second.digest
    assert first.fingerprints.keys() == second.fingerprints.keys() == {str(tmp_path / "rows.csv")}
    assert local(tmp_path, b"a,b\n1,2\n").digest == first.digest


def test_touching_the_data_is_no_change(tmp_path: Path) -> None:
    import os

    first = local(tmp_path, b"a,b\n1,2\n").digest
    os.utime(tmp_path / "rows.csv", (1, 1))
    path = tmp_path / "e.yaml"
    assert build_plan(Experiment.read("e", load_yaml(path)), created=NOW).digest == first


def test_a_large_file_is_known_by_pieces_of_it(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    size = 80 * 2**20
    with open(path, "wb") as file:
        file.truncate(size)
    started = time.process_time()
    seen = {fingerprint(str(path))}
    assert time.process_time() - started < 1.0
    for place in (0, size - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(fingerprint(str(path)))
    with open(path, "ab") as file:
        file.write(b"\0")
    seen.add(fingerprint(str(path)))
    assert len(seen) == 4


# --- reading plans that are not ours --------------------------------------------------------


def test_a_plan_without_a_task_of_that_name_says_which_there_are(tmp_path: Path) -> None:
    plan = plan_of(TASK, tmp_path)
    with pytest.raises(ConfigError) as caught:
        plan.task("lora")
    assert str(caught.value) == (
        f"no task 'lora' in e/{plan.digest}; it has: lora_20k, lora_50k, qlora_20k, qlora_50k"
    )


@given(cut=st.integers(1, 400))
def test_a_plan_cut_short_is_damaged_and_never_half_read(cut: int) -> None:
    document = Document(
        "e.yaml",
        {
            "pipeline": "medical_qa",
            "model": {"source": "huggingface", "name": "m"},
            "data": {"hub": "d"},
        },
        {},
    )
    data = build_plan(Experiment.read("e", document), created=NOW).to_json()
    with pytest.raises(DamagedError):
        Plan.from_json(data[: -1 - cut], where="plan.json")


def test_a_plan_is_readable_json_with_the_notice_first(tmp_path: Path) -> None:
    values = json.loads(plan_of(TASK, tmp_path).to_json())
    assert list(values)[:2] == ["notice", "schema"]
    assert values["created"] == NOW


def test_a_plan_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(ConfigError, match=r"reading the plan .*plan\.json: Is a directory"):
        frozen.read(tmp_path / "plan.json")
