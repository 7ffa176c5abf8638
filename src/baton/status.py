"""Where every task of a plan stands, from its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from baton.identity import this_runner
from baton.legs import Legs, utc_now
from baton.pipelines import PIPELINES
from baton.record import LegRecord, Plan
from baton.runner import done_marker, task_store
from baton.stage import read_progress
from baton.store.mirror_index import durable_step, is_mirror
from baton.store.task_names import CANCELLED


@dataclass(frozen=True, kw_only=True)
class JobLeg:
    """One run of a task's job, as the scheduler remembers it; times are UTC.

    `leg` and `durable_step` are those of our own record, None where a leg left none.
    """

    job: str
    state: str
    why: str
    nodes: str
    started: str
    ended: str
    seconds: int
    gpus: int
    leg: int | None = None
    durable_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskStatus:
    """One line of `baton status`. `None` is not known (yet).

    What only a scheduler knows comes last, and is empty where there is none.
    """

    task: str
    state: str
    legs: int
    stage: str
    step: int | None
    total: int | None
    unit: str
    tokens_per_s: float | None
    eta_seconds: float | None
    local_step: int | None
    durable_step: int | None
    reason: str
    job: str = ""
    gpu_hours: float | None = None
    job_legs: list[JobLeg] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def status_of(root: Path, plan: Plan, stages: Sequence[str], task: str) -> TaskStatus:
    """Join markers, leg records and the last progress report of a task."""
    store = task_store(root, plan, task)
    legs = Legs(store, f"{plan.experiment}/{task}", utc_now)
    history = legs.history()
    newest = history[-1] if history else None
    progress = read_progress(store.root)
    done = [stage for stage in stages if store.path(done_marker(stage)).exists()]
    state, reason = _state(legs, newest, done)
    if len(done) == len(stages):
        state, reason = "finished", ""
    if state != "finished" and store.path(CANCELLED).exists() and state != "running":
        state = "cancelled"
    is_running = state == "running"
    training = PIPELINES[plan.pipeline]().training_stages
    return TaskStatus(
        task=task,
        state=state,
        legs=len(history),
        stage=str(progress.get("stage", "")) if newest else "",
        step=progress.get("step"),
        total=progress.get("total"),
        unit=str(progress.get("unit", "steps")),
        tokens_per_s=progress.get("tokens_per_s") if is_running else None,
        eta_seconds=progress.get("eta_seconds") if is_running else None,
        local_step=_newest_step(store.root, training),
        durable_step=_durable(store.root, training),
        reason=reason,
    )


def may_speak(root: Path, plan: Plan, task: str) -> bool:
    """Does the process of a task's newest leg live on this machine, whatever its record says?

    A leg's last words come after its record has its end.
    """
    here = this_runner()
    legs = Legs(task_store(root, plan, task), f"{plan.experiment}/{task}", utc_now)
    newest = legs.newest()
    if newest is None or not newest.runner.is_visible_from(here):
        return False
    return legs.is_alive(newest, here)


def _state(legs: Legs, newest: LegRecord | None, done: Sequence[str]) -> tuple[str, str]:
    """State and reason of a task whose stages are not all `done`."""
    if newest is None:
        return "not started", ""
    if newest.state == "active":
        if legs.is_alive(newest, this_runner()):
            return "running", ""
        return "lost", "the leg ended without a word; submit again to go on"
    if newest.state == "finished":
        if newest.stage in done:
            return "stage done", f"{newest.stage} is done, the next stage has not started"
        return "incomplete", "files of a finished stage are gone; submit again to make them anew"
    return newest.state.replace("_", " "), newest.reason


def _durable(folder: Path, stages: Sequence[str]) -> int | None:
    """The newest step in the store, which is this folder unless it copies a remote one."""
    if is_mirror(folder):
        steps = (durable_step(folder, f"{stage}/checkpoints") for stage in reversed(stages))
        return next((step for step in steps if step is not None), None)
    return _newest_step(folder, stages)


def _newest_step(folder: Path, stages: Sequence[str]) -> int | None:
    """The newest complete step of the last of `stages` that has one."""
    for stage in reversed(stages):
        manifests = folder.glob(f"{stage}/checkpoints/step-*/manifest.json")
        steps = [int(path.parent.name.removeprefix("step-")) for path in manifests]
        if steps:
            return max(steps)
    return None
