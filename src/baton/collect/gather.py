"""One `Result` for each task of the plan: its eval record, or why there is none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from baton.collect.quick import read_eval_record, thinned
from baton.errors import BatonError, DamagedError, NameMissing, StoreError
from baton.eval.bootstrap import Floats
from baton.pipelines import PIPELINES
from baton.record import EvalRecord, LegRecord, Plan, TaskPlan
from baton.store.base import Store

# Of an experiment with thousands of tasks, a page shows the legs of the first ones only.
TASKS_WITH_LEGS = 200
# And a plot shows so many curves; those of further tasks are not even read.
TASKS_WITH_CURVES = 36

_NO_CURVE: Floats = np.empty((0, 2))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is known of one task. `record` is None for a task that is missing, then see `reason`.

    `legs` are the readable leg records, oldest first; of tasks far down a long plan only the
    newest, or none, was read. Curves have shape (points, 2): step, loss; `curves_read` is False
    for a task beyond the first `TASKS_WITH_CURVES` that have some.
    """

    task: TaskPlan
    state: str
    reason: str = ""
    record: EvalRecord | None = None
    legs: list[LegRecord] = field(default_factory=list)
    train_curve: Floats = field(default_factory=lambda: _NO_CURVE)
    dev_curve: Floats = field(default_factory=lambda: _NO_CURVE)
    curves_read: bool = True

    @property
    def name(self) -> str:
        return self.task.name


def gather(store: Store, plan: Plan, states: Mapping[str, str]) -> list[Result]:
    """Read every task of `plan`, in its order; nothing that one task holds stops the others.

    `states` is what the launcher knows, such as `queued`; without it the legs tell.
    """
    results = []
    curves = 0
    for index, task in enumerate(plan.tasks):
        result = _result(
            store,
            plan,
            task,
            states.get(task.name, ""),
            all_legs=index < TASKS_WITH_LEGS,
            curves=curves < TASKS_WITH_CURVES,
        )
        curves += len(result.train_curve) > 0 or len(result.dev_curve) > 0
        results.append(result)
    return results


def _result(
    store: Store, plan: Plan, task: TaskPlan, state: str, *, all_legs: bool, curves: bool
) -> Result:
    name = f"tasks/{task.name}/eval/eval.json"
    try:
        read = read_eval_record(store.read(name), where=name, curves=curves)
        _check_owner(read.record, plan, task, where=name)
    except NameMissing:
        return _unfinished(store, plan, task, state, all_legs=all_legs)
    except BatonError as error:  # damaged, out of reach, or of a newer baton
        legs, _ = _legs(store, task, newest_only=not all_legs)
        state = "damaged" if isinstance(error, DamagedError) else "unreadable"
        return Result(task=task, state=state, reason=_one_line(str(error)), legs=legs)
    return Result(
        task=task,
        state=state or "finished",
        record=read.record,
        legs=_legs(store, task, newest_only=False)[0] if all_legs else [],
        train_curve=read.train_curve,
        dev_curve=read.dev_curve,
        curves_read=curves,
    )


def _check_owner(record: EvalRecord, plan: Plan, task: TaskPlan, *, where: str) -> None:
    # Somebody copied a folder: its numbers would stand under the wrong name.
    for what, found, expected in (
        ("experiment", record.experiment, plan.experiment),
        ("digest", record.digest, plan.digest),
        ("task", record.task, task.name),
    ):
        if found != expected:
            raise DamagedError(
                f"{where}: belongs to {what} {found!r}, not {expected!r}; run the task again"
            )


def _unfinished(store: Store, plan: Plan, task: TaskPlan, state: str, *, all_legs: bool) -> Result:
    legs, problem = _legs(store, task, newest_only=not all_legs)
    train, dev = _partial_curves(store, plan, task) if legs else (_NO_CURVE, _NO_CURVE)
    found, reason = _state_of(legs, train, dev)
    return Result(
        task=task,
        state=state or ("unknown" if problem and not legs else found),
        reason="; ".join(filter(None, ("" if problem and not legs else reason, problem))),
        legs=legs,
        train_curve=thinned(train),
        dev_curve=dev,
    )


def _state_of(legs: list[LegRecord], train: Floats, dev: Floats) -> tuple[str, str]:
    """State and reason of a task without an eval record, from its newest leg."""
    if not legs:
        return "not started", "not started: no leg has worked on it"
    leg = legs[-1]
    steps = [int(curve[-1, 0]) for curve in (train, dev) if len(curve)]
    known = [step for step in (leg.to_step, leg.from_step) if step is not None]
    step = max(steps) if steps else known[0] if known else None
    at = f", step {step}" if step is not None else ""
    stage = f", stage {leg.stage}" if leg.stage else ""
    why = _one_line(leg.reason) or "no reason was recorded"
    match leg.state:
        case "active":
            return "running", f"running leg {leg.number}{stage}{at}"
        case "handed_over":
            return "handed over", f"waiting for the leg after {leg.number}{stage}{at}: {why}"
        case "finished":
            return "no record", f"leg {leg.number} finished and there is no eval record"
        case _:
            return leg.state, f"{leg.state} in leg {leg.number}{stage}{at}: {why}"


def _legs(store: Store, task: TaskPlan, *, newest_only: bool) -> tuple[list[LegRecord], str]:
    """The readable legs, oldest first, and what is wrong with the others."""
    folder = f"tasks/{task.name}/legs"
    legs, problems = [], []
    try:
        numbered = {
            int(stem): name
            for name in store.names(folder)
            if (stem := name.removeprefix(f"{folder}/").removesuffix(".json")).isdecimal()
        }
    except StoreError as error:
        return [], _one_line(str(error))
    for number in sorted(numbered)[-1:] if newest_only else sorted(numbered):
        try:
            legs.append(LegRecord.from_json(store.read(numbered[number]), where=numbered[number]))
        except BatonError as error:
            problems.append(_one_line(str(error)))
    return legs, "; ".join(problems)


def _partial_curves(store: Store, plan: Plan, task: TaskPlan) -> tuple[Floats, Floats]:
    """Train and dev loss of a task still at work, from its metrics file, as far as it reads."""
    train, dev = [], []
    lines: list[bytes] = []
    known = plan.pipeline in PIPELINES
    for stage in reversed(PIPELINES[plan.pipeline]().training_stages if known else ("train",)):
        with contextlib.suppress(StoreError):
            lines = store.read(f"tasks/{task.name}/{stage}/metrics.jsonl").splitlines()
            break
    for text in lines:
        try:
            line = json.loads(text)
            if "loss" in line:
                train.append((float(line["step"]), float(line["loss"])))
            if "dev_loss" in line:
                dev.append((float(line["step"]), float(line["dev_loss"])))
        except (ValueError, TypeError, KeyError):
            continue  # the last line of a file that is being written may be half a line
    finite = [np.array(curve, dtype=np.float64).reshape(-1, 2) for curve in (train, dev)]
    return tuple(curve[np.isfinite(curve).all(axis=1)] for curve in finite)  # type: ignore[return-value]


def _one_line(text: str) -> str:
    return " ".join(text.split())
