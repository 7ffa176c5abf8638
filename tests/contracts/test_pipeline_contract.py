"""What every pipeline and every experiment of the project promises."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from baton.config.decode import decode, encode
from baton.pins import pins_of
from baton.pipelines import PIPELINES
from baton.plan import build_plan, select
from baton.record import Plan

REPOSITORY = Path(__file__).parents[2]
JOBS = REPOSITORY / "jobs"
EXPERIMENTS = sorted(p.relative_to(JOBS).with_suffix("").as_posix() for p in JOBS.rglob("*.yaml"))
SMOKE = [name for name in EXPERIMENTS if name.startswith("smoke/")]
STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HOME", str(REPOSITORY))


def plan_of(name: str) -> Plan:
    return build_plan(select(name).experiment, created="now")


# --- pipelines ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_called_as_in_the_table(name: str) -> None:
    assert PIPELINES[name]().name == name


@pytest.mark.parametrize("name", PIPELINES)
def test_the_stages_that_are_loaded_are_those_that_were_named(name: str) -> None:
    pipeline = PIPELINES[name]()
    stages = pipeline.load_stages()
    assert tuple(stage.name for stage in stages) == pipeline.stage_names
    assert len(set(pipeline.stage_names)) == len(stages) > 0
    for stage in stages:
        assert STAGE_NAME.fullmatch(stage.name), "a stage is a folder in the store"
        assert callable(stage.run)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_can_train_a_stretch_again_for_verify_resume(name: str) -> None:
    assert callable(PIPELINES[name]().load_retrain())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_can_answer_for_generate(name: str) -> None:
    assert callable(PIPELINES[name]().load_answer())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_configuration_is_frozen_and_takes_keywords_only(name: str) -> None:
    config = PIPELINES[name]().config
    assert config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(config))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_configuration_is_decoded_without_torch(name: str) -> None:
    program = (
        "import sys; from baton.pipelines import PIPELINES; from baton.config.decode import decode;"
        f"\ntry: decode(PIPELINES[{name!r}]().config, {{}})\nexcept Exception: pass\n"
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_has_an_experiment_and_a_smoke_of_it(name: str) -> None:
    used = {experiment: select(experiment).experiment.pipeline for experiment in EXPERIMENTS}
    assert name in {pipeline for experiment, pipeline in used.items() if experiment in SMOKE}
    assert name in {pipeline for experiment, pipeline in used.items() if experiment not in SMOKE}


# --- experiments ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_decodes_and_survives_its_json(name: str) -> None:
    plan = plan_of(name)
    assert Plan.from_json(plan.to_json(), where=name) == plan
    config = PIPELINES[plan.pipeline]().config
    for task in plan.tasks:
        assert encode(decode(config, task.config)) == task.config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tasks_of_an_experiment_can_be_named_one_by_one(name: str) -> None:
    for task in plan_of(name).tasks:
        assert select(f"{name}/{task.name}").task == task.name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_data_and_says_what_it_is_for(name: str) -> None:
    text = (JOBS / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert not re.search(r"(?m)(^|[\s:\[{,'\"])(/|~/|[A-Za-z]:\\)\w", text), "a path of a machine"
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}", text)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_does_not_trust_code_of_others(name: str) -> None:
    for task in plan_of(name).tasks:
        assert '"trust_remote_code": true' not in json.dumps(task.config)


@pytest.mark.parametrize("name", SMOKE)
def test_a_smoke_experiment_needs_no_network(name: str) -> None:
    plan = plan_of(name)
    config = PIPELINES[plan.pipeline]().config
    for task in plan.tasks:
        assert list(pins_of(decode(config, task.config))) == []


@pytest.mark.parametrize("name", SMOKE)
def test_a_smoke_experiment_has_the_tasks_of_the_real_one_under_another_digest(name: str) -> None:
    smoke, real = plan_of(name), plan_of(name.removeprefix("smoke/"))
    assert smoke.digest != real.digest
    assert smoke.pipeline == real.pipeline
    assert [task.name for task in smoke.tasks] == [task.name for task in real.tasks]


def test_no_two_experiments_have_the_same_digest() -> None:
    digests = [plan_of(name).digest for name in EXPERIMENTS]
    assert len(set(digests)) == len(digests)


def test_medical_qa_asks_the_six_questions_of_its_matrix() -> None:
    tasks = plan_of("medical_qa").tasks
    assert [(t.name, t.config["adapter"]["method"], t.config["data"]["rows"]) for t in tasks] == [
        (f"{method}_{rows // 1000}k", method, rows)
        for method in ("lora", "qlora")
        for rows in (20_000, 50_000, 100_000)
    ]


def test_the_project_has_no_experiment_per_size() -> None:
    plans = {name: plan_of(name) for name in EXPERIMENTS}
    pipelines = [plan.pipeline for name, plan in plans.items() if name not in SMOKE]
    assert len(pipelines) == len(set(pipelines)), "a size is an axis, not a second file"
    assert all(dataclasses.is_dataclass(PIPELINES[name]().config) for name in pipelines)
