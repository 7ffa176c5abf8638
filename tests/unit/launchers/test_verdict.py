"""What the end of a leg means, whoever watched it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ExitStatus
from baton.handover import StopSignal
from baton.identity import this_runner
from baton.launchers.base import Request
from baton.launchers.verdict import Verdicts
from baton.legs import Legs, utc_now
from baton.record import LegRecord, Plan, TaskPlan, dump_json
from baton.runner import CANCELLED, task_store


class Heard:
    """A view that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, task: str, text: str) -> None:
        self.lines.append(f"{task}: {text}")

    def progress(self, task: str, values: Mapping[str, Any]) -> None:
        pass


class Case:
    """A task `a` of a store of its own, judged by `Verdicts` with one retry."""

    def __init__(self, root: Path) -> None:
        plan = Plan(
            experiment="qa",
            pipeline="medical_qa",
            digest="12345678",
            tasks=[TaskPlan(name="a", config={})],
            created=utc_now(),
            baton_version="0",
        )
        request = Request(
            plan=plan,
            plan_path=root / "plan.json",
            store_root=root,
            store_url=str(root),
            tasks=["a"],
        )
        self.store = task_store(root, plan, "a")
        self.heard, self.stop = Heard(), StopSignal()
        self.verdicts = Verdicts(request, self.stop, 1, self.heard)

    def leg(self, number: int) -> LegRecord:
        record = LegRecord(
            task="a",
            number=number,
            state="handed_over",
            runner=this_runner(),
            started=utc_now(),
            position=[0, 0, 0],
            position_at_end=[1, 40, 0],
            durable_step=40,
            reason="SIGTERM asked to stop",
        )
        Legs(self.store, "a", utc_now).close(record)
        return record

    def of(self, status: int, **more: Any) -> ExitStatus | None:
        return self.verdicts.of("a", status, **({"before": None} | more))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_what_is_over_is_over(case: Case) -> None:
    assert case.of(0) is ExitStatus.FINISHED
    assert case.of(78) is ExitStatus.STOP
    case.store.write(CANCELLED, dump_json({}))
    assert case.of(75) is ExitStatus.STOP
    assert [line.split(": ")[1] for line in case.heard.lines] == [
        "finished",
        "stopped",
        "cancelled",
    ]


def test_handovers_go_on_for_ever_and_forgive_failures(case: Case) -> None:
    case.leg(1)
    for _ in range(5):
        assert case.of(1) is None
        assert case.of(75) is None
    assert case.heard.lines[1] == "a: handed over, step 40 is durable: SIGTERM asked to stop"


def test_failures_in_a_row_are_bounded(case: Case) -> None:
    (case.store.root).mkdir(parents=True)
    (case.store.root / "log.txt").write_text("error: no such thing\n", encoding="utf-8")
    assert case.of(1) is None
    assert case.of(3) is ExitStatus.FAILED
    assert case.heard.lines == [
        "a: failed (1): no such thing; starting again",
        "a: failed (3): no such thing; given up after 2 failures in a row",
    ]


def test_a_kill_counts_only_if_its_leg_left_no_record_or_memory_was_short(case: Case) -> None:
    first = case.leg(1)
    for _ in range(5):
        assert case.of(-9) is None, "somebody's doing"
    assert case.of(-9, before=first) is None
    assert case.of(-9, before=first) is ExitStatus.FAILED, "it never lived to leave a record"
    other = case.verdicts
    other.failures.clear()
    assert case.of(-9, why="out of memory") is None
    assert case.of(-9, why="out of memory") is ExitStatus.FAILED


def test_a_launcher_that_stops_starts_nothing_again(case: Case) -> None:
    case.stop._handle(15, None)
    assert case.of(75) is ExitStatus.HANDED_OVER
    assert case.of(-9) is ExitStatus.HANDED_OVER
