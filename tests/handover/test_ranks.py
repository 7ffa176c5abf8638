"""Scenario 6 with two processes: they stop at the same step, whoever was signalled and when."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from lab import Lab, Task, assert_identical, wait_for
from zygote import Leg

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Task:
    """The reference: two processes, not interrupted."""
    task = lab.task()
    lab.finish_pair(task)
    return task


def assert_handed_over(pair: list[Leg], task: Task) -> None:
    statuses = [leg.wait() for leg in pair]
    assert statuses == [75, 75], pair[0].text[-2000:] + pair[1].text[-2000:]
    record = task.legs()[-1]
    assert record["state"] == "handed_over"
    assert record["processes"] == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [3, 8])
def test_one_signalled_process_stops_both_at_the_same_step(
    lab: Lab, whole: Task, rank: int, step: int
) -> None:
    # Step 8 is saved and evaluated: the signal comes in the middle of that.
    task = lab.task()
    pair = lab.start_pair(task)
    wait_for(pair[0], rf" step={step}/10 ")
    pair[rank].kill(signal.SIGTERM)
    assert_handed_over(pair, task)
    lab.finish_pair(task)
    assert_identical(task, whole)


def test_both_signalled_with_a_skew_and_several_times_stop_together(lab: Lab, whole: Task) -> None:
    task = lab.task()
    pair = lab.start_pair(task)
    wait_for(pair[0], " step=4/10 ")
    pair[1].kill(signal.SIGTERM)
    pair[1].kill(signal.SIGUSR2)
    wait_for(pair[0], " step=5/10 |leg ended")
    pair[0].kill(signal.SIGTERM)
    pair[1].kill(signal.SIGTERM)
    assert_handed_over(pair, task)
    lab.finish_pair(task)
    assert_identical(task, whole)


@pytest.mark.parametrize("phase", ["data", "save", "evaluation", "answers"])
def test_a_signal_to_the_second_process_in_any_phase_stops_both(
    lab: Lab, whole: Task, phase: str
) -> None:
    pattern = {
        "data": "stage started .*stage=data",
        "save": " step=2/10 ",
        "evaluation": " saved .* step=4 ",
        "answers": "stage started .*stage=eval",
    }[phase]
    task = lab.task()
    pair = lab.start_pair(task)
    wait_for(pair[0], pattern)
    pair[1].kill(signal.SIGTERM)
    assert_handed_over(pair, task)
    lab.finish_pair(task)
    assert_identical(task, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_takes_the_other_with_it_and_the_next_leg_resumes(
    lab: Lab, whole: Task, rank: int
) -> None:
    task = lab.task()
    pair = lab.start_pair(task)
    wait_for(pair[0], " step=5/10 ")
    pair[rank].kill(signal.SIGKILL)
    assert pair[rank].wait() == -signal.SIGKILL
    # Without a launcher: the survivor notices the closed connection by itself.
    assert pair[1 - rank].wait(timeout=60) not in (0, 75)
    assert task.steps()[-1] == 4
    lab.finish_pair(task)
    assert_identical(task, whole)


def test_a_refused_leg_of_two_processes_does_not_leave_one_waiting(
    lab: Lab, tmp_path: Path
) -> None:
    task = lab.task()
    first = lab.start(task)
    wait_for(first, " step=2/10 ")
    first.kill(signal.SIGSTOP)
    pair = lab.start_pair(task)
    assert [leg.wait(timeout=60) for leg in pair] == [78, 78]
    first.kill(signal.SIGKILL)
    first.wait()
