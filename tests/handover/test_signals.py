"""Scenarios 6, 7 and 8: signals at any moment, alone or several, and what the exit status says."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import REPOSITORY, Lab, Task, assert_identical, wait_for
from zygote import ONE_THREAD

USER_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize("number", USER_SIGNALS, ids=lambda n: n.name)
def test_each_stop_signal_ends_a_leg_with_75_and_nothing_lost(
    lab: Lab, number: signal.Signals
) -> None:
    task = lab.task()
    leg = lab.start(task)
    wait_for(leg, " step=3/10 ")
    leg.kill(number)
    assert leg.wait() == 75
    record = task.legs()[-1]
    assert (record["state"], record["exit_status"], record["signal"]) == (
        "handed_over",
        75,
        number.name,
    )
    assert record["to_step"] == record["durable_step"] == task.steps()[-1]
    assert 0 <= record["signal_to_durable_seconds"] < 30
    assert record["position_at_end"] > record["position"]
    assert not (task.folder / "train" / "done.json").exists()
    lab.finish(task)
    assert_identical(task, lab.reference(task))


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGUSR2),
        (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT),
    ],
    ids=lambda several: "+".join(n.name for n in several),
)
def test_several_signals_at_once_are_one_handover(
    lab: Lab, numbers: tuple[signal.Signals, ...]
) -> None:
    task = lab.task()
    leg = lab.start(task)
    wait_for(leg, " step=3/10 ")
    for number in numbers:
        leg.kill(number)
    assert leg.wait() == 75, leg.text[-1500:]
    assert "Traceback" not in leg.text
    lab.finish(task)
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_a_signal_at_every_moment_of_a_save_still_hands_over(lab: Lab, tmp_path: Path) -> None:
    settings = {"train.max_steps": "6", "data.dev_rows": "4", "eval.max_samples": "2"}
    _, operations = lab.traced(lab.task(settings))
    first = next(n for n, line in enumerate(operations) if line.startswith("mkdir .staging"))
    last = operations.index("link train/checkpoints/step-000002/manifest.json") + 4
    half = lab.task(settings)
    for number in range(first + 1, last, 4):
        task = half.copy_to(tmp_path / str(number))
        # From there on a signal before every file operation: a storm of them inside one save.
        leg, _ = lab.traced(task, at=number, number=int(signal.SIGTERM), every=number % 8 == 0)
        assert leg.status == 75, f"{operations[number - 1]}:\n{leg.text[-1500:]}"
        lab.finish(task)
        assert_identical(task, lab.reference(half))


@pytest.mark.slow
def test_a_second_signal_after_a_second_abandons_the_step_but_not_the_work(lab: Lab) -> None:
    # Many micro-batches of one sample: a step takes long enough to be interrupted in it.
    task = lab.task(
        {
            "train.batch_samples": "160",
            "train.tokens_per_micro_batch": "1",
            "train.save_every_steps": "1",
            "train.epochs": "8",
        }
    )
    leg = lab.start(task)
    wait_for(leg, " saved .* step=1 ")
    leg.kill(signal.SIGTERM)
    time.sleep(0.05)
    # What insists is time itself, so there is no event to wait for; the step stands still.
    leg.kill(signal.SIGSTOP)
    time.sleep(1.1)
    leg.kill(signal.SIGTERM)
    leg.kill(signal.SIGCONT)
    assert leg.wait() == 75
    assert task.steps() == [1], "the second step was to be abandoned"
    lab.finish(task)
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_while_data_are_prepared_or_the_model_loads_harms_nothing(
    lab: Lab, number: signal.Signals
) -> None:
    for pattern in ("stage started .*stage=data", "first rows", "stage started .*stage=train"):
        task = lab.task()
        leg = lab.start(task)
        wait_for(leg, pattern)
        leg.kill(number)
        assert leg.wait() == (75 if number == signal.SIGTERM else -signal.SIGKILL)
        lab.finish(task)
        assert_identical(task, lab.reference(task))


def test_a_save_longer_than_the_grace_leaves_the_previous_checkpoint(lab: Lab) -> None:
    _, operations = lab.traced(lab.task())
    saving = operations.index("link train/checkpoints/step-000004/optimizer.safetensors") + 1
    task = lab.task()
    # The leg stands still in the middle of its save; then the grace is over.
    leg = lab.start(
        task,
        hook=(
            "strike",
            {
                "trace": str(task.store / "operations"),
                "below": str(task.folder),
                "at": saving,
                "number": int(signal.SIGSTOP),
            },
        ),
    )
    _wait_stopped(leg.pid)
    leg.kill(signal.SIGTERM)
    leg.kill(signal.SIGKILL)
    assert leg.wait() == -signal.SIGKILL
    assert task.steps() == [2]
    again = lab.run(task)
    assert "leg=2 stage=train step=2/10" in again.text
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_a_signal_during_imports_or_model_load_of_a_real_process_hands_over(lab: Lab) -> None:
    task = lab.task()
    moments: list[tuple[str, Callable[[int], bool]]] = [
        # Signals are taken before anything slow is imported, so the first of these is early.
        ("torch is being loaded", lambda pid: "libtorch" in _maps(pid)),
        ("the model is being loaded", lambda pid: "stage=train" in _log(task)),
    ]
    for what, is_now in moments:
        process = _real_leg(task)
        for _ in _patience():
            if is_now(process.pid) or process.poll() is not None:
                break
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
        assert status == 75, f"{what}: {status}\n{_log(task)[-2000:]}"
        assert task.legs()[-1]["state"] == "handed_over"
        assert task.legs()[-1]["position_at_end"] >= task.legs()[-1]["position"]
    lab.finish(task)
    assert_identical(task, lab.reference(task))


def _real_leg(task: Task) -> subprocess.Popen[bytes]:
    words = ["run", str(task.plan), "--task", task.name, "--store", str(task.store)]
    with open(task.store / "real.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "baton", *words],
            cwd=REPOSITORY,
            env=os.environ | ONE_THREAD | {"BATON_SUBMISSION": "lab"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _log(task: Task) -> str:
    # Only what the newest leg said: earlier ones reached the same places.
    text = (task.store / "real.txt").read_text(errors="replace")
    return text.rpartition("leg ended")[2]


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def _patience(seconds: float = 90.0) -> itertools.takewhile:
    until = time.monotonic() + seconds
    return itertools.takewhile(
        lambda _: time.sleep(0.002) or time.monotonic() < until, itertools.count()
    )


def _wait_stopped(pid: int) -> None:
    for _ in _patience():
        # The state stands after the name, which may hold spaces, in parentheses.
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
    raise AssertionError(f"process {pid} did not stop")
