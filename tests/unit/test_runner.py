"""One leg works through its stages: what a stage leaves behind for the next."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import runner
from baton.handover import StopSignal
from baton.pipelines import PIPELINES
from baton.plan import build_plan, select
from baton.runner import TaskRunner, task_store
from baton.stage import Leg, Outcome, Stage


@pytest.fixture
def _nothing_collected_by_chance() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Model:
    """Holds itself, as models with hooks do."""

    def __init__(self) -> None:
        self.hook = self.forward

    def forward(self) -> None: ...


@pytest.mark.usefixtures("_nothing_collected_by_chance")
def test_a_stage_finds_the_memory_of_the_one_before_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Model]] = []
    alive: list[int] = []

    def trains(leg: Leg) -> Outcome:
        alive.append(sum(model() is not None for model in models))
        models.append(weakref.ref(Model()))
        return Outcome.FINISHED

    monkeypatch.setenv("BATON_HOME", str(Path(__file__).parents[2]))
    plan = build_plan(select("smoke/questions_gen", []).experiment, created="now")
    real = PIPELINES[plan.pipeline]()
    stages = tuple(Stage(name=name, run=trains) for name in real.stage_names)
    fake = dataclasses.replace(real, load_stages=lambda: stages)
    monkeypatch.setitem(runner.PIPELINES, plan.pipeline, lambda: fake)
    task = plan.tasks[0]
    store = task_store(tmp_path, plan, task.name)
    TaskRunner(plan=plan, task=task, store=store, stop=StopSignal(), submission="s").run()
    assert alive == [0] * len(stages)
    assert len(stages) > 2
