"""Does a resumed run compute what the first one computed? Train a stretch again and compare."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from baton.config.decode import decode
from baton.errors import ConfigError
from baton.handover import StopSignal
from baton.legs import this_runner, utc_now
from baton.pipelines import PIPELINES, Pipeline
from baton.record import LegRecord, Manifest, Plan, TaskPlan
from baton.runner import task_store
from baton.stage import Alone, Leg
from baton.store.checkpoint import Checkpoints
from baton.store.local import LocalStore


@dataclass(frozen=True)
class Verdict:
    """Whether the bytes were the same, and a sentence that says so."""

    identical: bool
    text: str


def verify(plan: Plan, task: TaskPlan, root: Path, stop: StopSignal) -> Verdict:
    """Resume from the last checkpoint but one, train to the last, compare every file.

    The task's own folder is only read.

    Raises:
        ConfigError: there are not two checkpoints yet.
    """
    from baton.train.state import MEASURED_FILES

    pipeline = PIPELINES[plan.pipeline]()
    store = task_store(root, plan, task.name)
    saved = {stage: _checkpoints(store, stage).steps() for stage in pipeline.training_stages}
    enough = [stage for stage, steps in saved.items() if len(steps) > 1]
    if not enough:
        raise ConfigError(
            f"{task.name} has {max(map(len, saved.values()))} checkpoints; verify-resume needs two"
            " of one stage (train further, or lower save_every_steps)"
        )
    verdicts = []
    for stage in enough:
        leg = _leg(plan, task, stage, store, stop, decode(pipeline.config, task.config))
        verdicts.append(_verify_stage(pipeline, leg, saved[stage][-2:], MEASURED_FILES))
    text = "\n".join(verdict.text for verdict in verdicts)
    return Verdict(all(verdict.identical for verdict in verdicts), text)


def _verify_stage(
    pipeline: Pipeline, leg: Leg, stretch: list[int], measured: frozenset[str]
) -> Verdict:
    """Train from one checkpoint of the leg's stage to another, in a folder of its own."""
    store, stage = leg.store, leg.record.stage
    original = _checkpoints(store, stage)
    first, last = stretch
    with tempfile.TemporaryDirectory(dir=store.root, prefix=".verify-") as scratch:
        copy = LocalStore(Path(scratch))
        # A stage may go on from what earlier ones trained.
        earlier = pipeline.stage_names[: pipeline.stage_names.index(stage)]
        for name in ("base", *earlier):
            if (store.root / name).exists():
                (copy.root / name).symlink_to(store.root / name)
        beside = [
            name for name in store.names(stage) if not name.startswith(f"{stage}/checkpoints")
        ]
        for file in [*beside, *store.names(original.name(first))]:
            copy.path(file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.path(file), copy.path(file))
        pipeline.load_retrain()(replace(leg, store=copy), last)
        again = _checkpoints(copy, stage).manifest(last)
    odd = _differences(original.manifest(last), again, measured)
    what = f"{leg.task.name}: {stage}, steps {first} to {last}"
    if odd:
        return Verdict(False, f"{what}: not bit-identical, these files differ: {', '.join(odd)}")
    return Verdict(True, f"{what}: bit-identical")


def _differences(a: Manifest, b: Manifest, measured: frozenset[str]) -> list[str]:
    old = {f.name: f.sha256 for f in a.files if f.name not in measured}
    new = {f.name: f.sha256 for f in b.files if f.name not in measured}
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _checkpoints(store: LocalStore, stage: str) -> Checkpoints:
    return Checkpoints(store, f"{stage}/checkpoints", 0, lambda: None, utc_now)


def _leg(
    plan: Plan, task: TaskPlan, stage: str, store: LocalStore, stop: StopSignal, config: object
) -> Leg:
    record = LegRecord(
        task=task.name,
        number=0,
        state="active",
        stage=stage,
        runner=this_runner(),
        started=utc_now(),
        position=[],
    )
    return Leg(
        plan=plan,
        task=task,
        config=config,
        record=record,
        store=store,
        stop=stop,
        peers=Alone(),
        check_fence=lambda: None,
        now=utc_now,
    )
