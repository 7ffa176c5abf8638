"""Who works on a task: claims, fences, lost legs, crash loops."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from baton.config.site import LocalSite
from baton.errors import DamagedError, ExitStatus, FencedError, NoProgressError
from baton.handover import StopSignal
from baton.identity import this_runner
from baton.launchers.base import Request
from baton.launchers.local import LocalLauncher
from baton.legs import HEARTBEAT_TIMEOUT_SECONDS, Legs
from baton.record import LegRecord, Plan, Runner, TaskPlan, dump_json, replace
from baton.status import status_of
from baton.store.local import LocalStore

EPOCH = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
HERE = this_runner()
GONE = replace(HERE, started_ticks=HERE.started_ticks - 1)
ELSEWHERE = Runner(host="node7", pid=4711, started_ticks=1, boot="other", pid_namespace="other")


class Clock:
    """ISO times that tests move."""

    seconds = 0.0

    def __call__(self) -> str:
        return (EPOCH + datetime.timedelta(seconds=self.seconds)).isoformat(timespec="milliseconds")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def legs(tmp_path: Path, clock: Clock) -> Legs:
    return Legs(LocalStore(tmp_path / "t"), "t", clock)


def record(legs: Legs, *, runner: Runner = HERE, submission: str = "s", step: int = 0) -> LegRecord:
    return LegRecord(
        task="t",
        number=0,
        state="active",
        submission=submission,
        runner=runner,
        started=legs.now(),
        position=[1, step, 0],
    )


def ended(leg: LegRecord, state: str, reason: str, clock: Clock, *, after: float) -> LegRecord:
    clock.seconds += after
    return replace(leg, state=state, ended=clock(), reason=reason, position_at_end=leg.position)


def test_legs_are_numbered_from_one(legs: Legs, clock: Clock) -> None:
    for number in (1, 2, 3):
        leg = legs.open(record(legs, step=number))
        assert leg.number == number
        legs.close(ended(leg, "handed_over", "", clock, after=1))
    assert [leg.number for leg in legs.history()] == [1, 2, 3]


def test_a_task_at_work_here_is_not_taken_twice(legs: Legs) -> None:
    legs.open(record(legs))
    with pytest.raises(FencedError) as caught:
        legs.open(record(legs, submission="other"))
    assert f"t: leg 1 is already working on this task (process {os.getpid()} on " in str(
        caught.value
    )
    assert [leg.state for leg in legs.history()] == ["active"]


def test_a_leg_whose_process_is_gone_is_lost_and_the_next_goes_on(legs: Legs) -> None:
    legs.open(record(legs, runner=GONE))
    leg = legs.open(record(legs, step=40))
    assert leg.number == 2
    lost = legs.history()[0]
    assert (lost.state, lost.position_at_end) == ("lost", [1, 40, 0])
    assert lost.reason == "ended without a word: killed, or its node was lost"


def test_a_process_number_used_again_is_another_process(legs: Legs) -> None:
    leg = legs.open(record(legs, runner=replace(HERE, started_ticks=5)))
    assert not legs.is_alive(leg, HERE)


def test_a_zombie_is_not_at_work(legs: Legs) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    ticks = int(psutil.Process(process.pid).create_time() * 100)
    leg = replace(record(legs), runner=replace(HERE, pid=process.pid, started_ticks=ticks))
    assert not legs.is_alive(leg, HERE)
    process.wait()


def test_a_living_process_is_at_work(legs: Legs) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ticks = int(psutil.Process(process.pid).create_time() * 100)
        leg = replace(record(legs), runner=replace(HERE, pid=process.pid, started_ticks=ticks))
        assert legs.is_alive(leg, HERE)


def test_a_leg_elsewhere_counts_as_lost_after_its_last_sign_of_life(
    legs: Legs, clock: Clock
) -> None:
    leg = legs.open(record(legs, runner=ELSEWHERE))
    clock.seconds = HEARTBEAT_TIMEOUT_SECONDS - 1
    assert legs.is_alive(leg, HERE)
    (legs.store.root / "progress.json").write_bytes(dump_json({"time": clock()}))
    clock.seconds = 2 * HEARTBEAT_TIMEOUT_SECONDS - 2
    assert legs.is_alive(leg, HERE)
    clock.seconds = 2 * HEARTBEAT_TIMEOUT_SECONDS
    assert not legs.is_alive(leg, HERE)
    assert legs.open(record(legs)).number == 2


def test_a_requeued_slurm_job_does_not_wait_for_its_own_older_leg(legs: Legs) -> None:
    legs.open(record(legs, runner=ELSEWHERE, submission="slurm:7_1"))
    assert legs.open(record(legs, submission="slurm:7_1")).number == 2


def test_another_slurm_job_does_wait(legs: Legs) -> None:
    legs.open(record(legs, runner=ELSEWHERE, submission="slurm:7_1"))
    with pytest.raises(FencedError):
        legs.open(record(legs, submission="slurm:8_1"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}"])
def test_a_progress_report_cut_off_by_a_power_cut_does_not_stop_the_next_leg(
    legs: Legs, clock: Clock, data: bytes
) -> None:
    legs.open(record(legs, runner=ELSEWHERE))
    (legs.store.root / "progress.json").write_bytes(data)
    clock.seconds = HEARTBEAT_TIMEOUT_SECONDS + 1
    assert legs.open(record(legs)).number == 2


@pytest.mark.parametrize("name", [".nfs0001", "notes.txt", "001.json~", "notes.json"])
def test_a_stray_file_among_the_legs_is_not_a_leg(legs: Legs, name: str) -> None:
    leg = legs.open(record(legs))
    (legs.store.root / "legs" / name).write_text("")
    legs.check_fence(leg.number)
    assert [each.number for each in legs.history()] == [1]


def test_a_thousand_legs_are_counted_as_numbers(legs: Legs) -> None:
    for number in (999, 1000):
        legs.close(replace(record(legs), number=number, state="handed_over"))
    assert legs.history()[-1].number == 1000
    assert legs.open(record(legs, step=9)).number == 1001


def test_an_older_leg_is_fenced_off_by_a_newer(legs: Legs) -> None:
    old = legs.open(record(legs, runner=GONE))
    legs.check_fence(old.number)
    legs.open(record(legs))
    with pytest.raises(FencedError) as caught:
        legs.check_fence(old.number)
    assert str(caught.value) == "t: leg 2 has taken over from leg 1; this one stops"


def test_of_many_runners_that_claim_at_once_one_works(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from baton.errors import FencedError
from baton.identity import this_runner
from baton.legs import Legs, utc_now
from baton.record import LegRecord
from baton.store.local import LocalStore
legs = Legs(LocalStore(Path(sys.argv[1])), "t", utc_now)
record = LegRecord(task="t", number=0, state="active", runner=this_runner(), started=utc_now(),
                   position=[])
print("ready", flush=True)
sys.stdin.readline()
try:
    print(legs.open(record).number, flush=True)
except FencedError:
    print("fenced", flush=True)
sys.stdin.readline()  # alive until all have tried
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "t")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(8)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
    outcomes = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
    for racer in racers:
        racer.communicate("\n", timeout=30)
    assert sorted(outcomes) == ["1"] + ["fenced"] * 7


# --- crash loops ----------------------------------------------------------------------------


def test_three_legs_without_durable_progress_end_the_task_with_the_reasons(
    legs: Legs, clock: Clock
) -> None:
    for reason in ("SIGTERM asked to stop", "killed", "killed"):
        leg = legs.open(record(legs))
        legs.close(ended(leg, "handed_over", reason, clock, after=1800))
    with pytest.raises(NoProgressError) as caught:
        legs.open(record(legs))
    assert str(caught.value) == (
        "t: 3 legs in a row left nothing durable behind (leg 1 handed_over after 1800 s: SIGTERM"
        " asked to stop; leg 2 handed_over after 1800 s: killed; leg 3 handed_over after 1800 s:"
        " killed). Mend the cause, give the legs more time, or save more often"
        " (train.save_every_steps); then submit again"
    )
    assert caught.value.exit_status == ExitStatus.STOP
    assert len(legs.history()) == 3


def test_fifty_preemptions_with_progress_are_no_crash_loop(legs: Legs, clock: Clock) -> None:
    for step in range(50):
        leg = legs.open(record(legs, step=step))
        legs.close(ended(leg, "handed_over", "SIGTERM asked to stop", clock, after=60))
    assert legs.open(record(legs, step=50)).number == 51


def test_a_new_submission_gets_its_three_legs_again(legs: Legs, clock: Clock) -> None:
    for _ in range(3):
        legs.close(ended(legs.open(record(legs)), "failed", "x", clock, after=1))
    assert legs.open(record(legs, submission="new")).number == 4


def test_three_lost_legs_in_a_row_are_a_crash_loop_too(legs: Legs) -> None:
    for _ in range(3):
        legs.open(record(legs, runner=GONE))
    with pytest.raises(NoProgressError) as caught:
        legs.open(record(legs))
    assert "leg 3 is active" not in str(caught.value)


# --- cancelling and looking -----------------------------------------------------------------


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with baton."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


PLAN = Plan(
    experiment="e",
    pipeline="medical_qa",
    digest="d",
    tasks=[TaskPlan(name="t", config={})],
    created="c",
    baton_version="v",
)


class Events:
    """Remembers what a launcher told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def event(self, task: str, text: str) -> None:
        self.seen.append(f"{task}: {text}")

    def progress(self, task: str, values: object) -> None:
        pass


@pytest.mark.parametrize(
    "change", [{"started_ticks": 1}, {"boot": "other"}, {"pid_namespace": "other"}]
)
def test_cancel_signals_nobody_who_happens_to_have_the_number(
    tmp_path: Path, bystander: subprocess.Popen[bytes], change: dict[str, object]
) -> None:
    ticks = int(psutil.Process(bystander.pid).create_time() * 100)
    runner = replace(HERE, pid=bystander.pid, started_ticks=ticks)
    store = LocalStore(tmp_path / "e" / "d" / "tasks" / "t")
    legs = Legs(store, "t", Clock())
    legs.open(replace(record(legs), runner=replace(runner, **change)))
    request = Request(
        plan=PLAN,
        plan_path=tmp_path / "plan.json",
        store_root=tmp_path,
        store_url=str(tmp_path),
        tasks=["t"],
    )
    LocalLauncher(LocalSite(launcher="local"), StopSignal()).cancel(request, Events())
    with pytest.raises(subprocess.TimeoutExpired):
        bystander.wait(timeout=0.5)


def test_status_calls_a_leg_lost_when_its_process_is_gone(tmp_path: Path) -> None:
    legs = Legs(LocalStore(tmp_path / "e" / "d" / "tasks" / "t"), "t", Clock())
    legs.open(record(legs, runner=GONE))
    status = status_of(tmp_path, PLAN, ("data", "train", "eval"), "t")
    assert (status.state, status.legs) == ("lost", 1)
    assert status.reason == "the leg ended without a word; submit again to go on"


def test_a_task_whose_results_were_removed_is_not_called_finished(tmp_path: Path) -> None:
    legs = Legs(LocalStore(tmp_path / "e" / "d" / "tasks" / "t"), "t", Clock())
    legs.close(replace(legs.open(record(legs)), state="finished"))
    status = status_of(tmp_path, PLAN, ("data", "train", "eval"), "t")
    assert status.state == "incomplete"
    assert status.reason == "files of a finished stage are gone; submit again to make them anew"


def test_a_damaged_record_is_named_with_what_to_do(legs: Legs) -> None:
    legs.open(record(legs))
    path = legs.store.path("legs/001.json")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DamagedError, match=r"legs/001\.json: not JSON.*move it away and submit"):
        legs.open(record(legs))
    path.unlink()
    assert legs.open(record(legs)).number == 1
