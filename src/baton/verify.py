"""Does a resumed run compute what the first one computed? Train a stretch again and compare."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from baton.config.decode import decode
from baton.errors import ConfigError
from baton.handover import StopSignal
from baton.identity import this_runner
from baton.legs import utc_now
from baton.pipelines import PIPELINES, Pipeline
from baton.record import LegRecord, Manifest, Plan, TaskPlan
from baton.runner import task_store
from baton.stage import Leg, Peers
from baton.store.checkpoint import Checkpoints
from baton.store.local import LocalStore


@dataclass(frozen=True)
class Verdict:
    """Whether the bytes were the same, and a sentence that says so."""

    identical: bool
    text: str


def verify(plan: Plan, task: TaskPlan, root: Path, stop: StopSignal) -> Verdict:
    """Resume from the last checkpoint but one, train to the last, compare every file.

    The task's own folder is only read. Every process that the environment names must call this.

    Raises:
        ConfigError: there are not two checkpoints yet, or they are of more or fewer processes.
    """
    from baton.train.ranks import Ranks
    from baton.train.state import MEASURED_FILES

    ranks = Ranks.join()
    try:
        return _verify(plan, task, root, stop, ranks, MEASURED_FILES)
    finally:
        ranks.leave()


def _verify(
    plan: Plan,
    task: TaskPlan,
    root: Path,
    stop: StopSignal,
    peers: Peers,
    measured: frozenset[str],
) -> Verdict:
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
        leg = _leg(plan, task, stage, store, stop, decode(pipeline.config, task.config), peers)
        verdicts.append(_verify_stage(pipeline, leg, saved[stage][-2:], measured))
    text = "\n".join(verdict.text for verdict in verdicts)
    return Verdict(all(verdict.identical for verdict in verdicts), text)


def _verify_stage(
    pipeline: Pipeline, leg: Leg, stretch: list[int], measured: frozenset[str]
) -> Verdict:
    """Train from one checkpoint of the leg's stage to another, in a folder of its own."""
    store, stage = leg.store, leg.record.stage
    original = _checkpoints(store, stage)
    first, last = stretch
    _require_as_many(leg, original.name(last, "state.json"))
    with _scratch(leg) as folder:
        copy = LocalStore(folder)
        if leg.is_first:
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
        leg.peers.broadcast(None)  # all is there
        pipeline.load_retrain()(replace(leg, store=copy), last)
        odd = []
        if leg.is_first:
            again = _checkpoints(copy, stage).manifest(last)
            odd = _differences(original.manifest(last), again, measured)
        odd = leg.peers.broadcast(odd)
    what = f"{leg.task.name}: {stage}, steps {first} to {last}"
    if odd:
        return Verdict(False, f"{what}: not bit-identical, these files differ: {', '.join(odd)}")
    return Verdict(True, f"{what}: bit-identical")


@contextlib.contextmanager
def _scratch(leg: Leg) -> Iterator[Path]:
    """A folder for all processes of a leg, in the task's own."""
    with contextlib.ExitStack() as around:
        made = None
        if leg.is_first:
            made = around.enter_context(
                tempfile.TemporaryDirectory(dir=leg.folder, prefix=".verify-")
            )
        yield Path(leg.peers.broadcast(made))


def _require_as_many(leg: Leg, state: str) -> None:
    """Raises `ConfigError` unless a checkpoint was made by as many processes as there are now.

    With another number sums are taken in another order.
    """
    environment = json.loads(leg.store.read(state)).get("environment", {})
    count = int(environment.get("processes", leg.peers.size))
    if count != leg.peers.size:
        raise ConfigError(
            f"{leg.task.name} was trained by {count} processes, this is {leg.peers.size};"
            f" use: baton verify-resume --processes {count}"
        )


def _differences(a: Manifest, b: Manifest, measured: frozenset[str]) -> list[str]:
    old = {f.name: f.sha256 for f in a.files if f.name not in measured}
    new = {f.name: f.sha256 for f in b.files if f.name not in measured}
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _checkpoints(store: LocalStore, stage: str) -> Checkpoints:
    return Checkpoints(store, f"{stage}/checkpoints", 0, lambda: None, utc_now)


def _leg(
    plan: Plan,
    task: TaskPlan,
    stage: str,
    store: LocalStore,
    stop: StopSignal,
    config: object,
    peers: Peers,
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
        peers=peers,
        check_fence=lambda: None,
        now=utc_now,
    )
