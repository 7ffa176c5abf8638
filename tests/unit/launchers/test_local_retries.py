"""How often the local launcher starts a task again; a script stands in for `baton run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from baton.config.site import LocalSite
from baton.errors import ExitStatus
from baton.handover import StopSignal
from baton.launchers.base import Request
from baton.launchers.local import LocalLauncher
from baton.record import Plan, TaskPlan

# `PYTHON -m baton run PLAN --task TASK --store ROOT`: the leg's number-th word of the script says
# how it ends: an exit status, with `+` when something durable is left behind.
STUB = """\
#!{python}
import os, sys
from pathlib import Path
from baton.identity import this_runner
from baton.legs import Legs, utc_now
from baton.record import LegRecord, Plan, replace
from baton.runner import task_store
plan, task, root = sys.argv[4], sys.argv[6], sys.argv[8]
store = task_store(Path(root), Plan.from_json(Path(plan).read_bytes(), where=plan), task)
legs = Legs(store, task, utc_now)
before = [sum("+" in word for word in {script!r}[: len(legs.history())])]
record = legs.open(LegRecord(
    task=task, number=0, state="active", submission=os.environ["BATON_SUBMISSION"],
    runner=this_runner(), started=utc_now(), position=before))
word = {script!r}[record.number - 1]
state = {{"0": "finished", "75": "handed_over"}}.get(word.strip("+"), "failed")
after = [before[0] + word.count("+")]
legs.close(replace(record, state=state, ended=utc_now(), position_at_end=after))
sys.exit(int(word.strip("+")))
"""


class Told:
    """Remembers what the launcher tells."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def event(self, task: str, text: str) -> None:
        self.events.append(text)

    def progress(self, task: str, values: object) -> None:
        pass


def run(
    place: Path, script: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[ExitStatus, int, list[str]]:
    """How the task ended, after how many legs, and what was said."""
    stub = place / "python"
    stub.write_text(STUB.format(python=sys.executable, script=list(script)))
    stub.chmod(0o755)
    plan = Plan(
        experiment="trial",
        pipeline="medical_qa",
        digest="00000000",
        tasks=[TaskPlan(name="one", config={})],
        created="2026-01-01T00:00:00.000+00:00",
        baton_version="0",
    )
    path = place / "trial" / plan.digest / "plan.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(plan.to_json())
    monkeypatch.setattr(sys, "executable", str(stub))
    launcher = LocalLauncher(LocalSite(launcher="local", retries=1), StopSignal(), gpus=[])
    told = Told()
    request = Request(
        plan=plan, plan_path=path, store_root=place, store_url=str(place), tasks=["one"]
    )
    [status] = launcher.submit(request, told).values()
    return status, len(list(place.glob("trial/*/tasks/one/legs/*.json"))), told.events


def test_failures_in_a_row_use_the_retries_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, legs, said = run(tmp_path, ["1", "1", "0"], monkeypatch)
    assert (status, legs) == (ExitStatus.FAILED, 2)
    assert said[-1] == "failed (1); given up after 2 failures in a row"


def test_a_handover_with_progress_between_failures_makes_the_count_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, legs, _ = run(tmp_path, ["1", "75+", "1", "75+", "1", "0"], monkeypatch)
    assert (status, legs) == (ExitStatus.FINISHED, 6)


def test_a_handover_that_saved_nothing_does_not_make_the_count_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, legs, _ = run(tmp_path, ["1", "75", "1", "0"], monkeypatch)
    assert (status, legs) == (ExitStatus.FAILED, 3)
