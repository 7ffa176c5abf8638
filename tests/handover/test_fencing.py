"""Scenarios 9, 10 and 11: crash loops, losses that are no numbers, and legs that are too many."""

from __future__ import annotations

import datetime
import json
import signal
import time
from pathlib import Path

import pytest
from lab import Lab, Task, assert_identical, wait_for, wait_until
from zygote import Leg


def test_three_legs_without_durable_progress_stop_the_task_with_the_reason(lab: Lab) -> None:
    task = lab.task()
    # Something durable first: the rule is about legs that begin where others began.
    leg = lab.start(task)
    wait_for(leg, "stage finished .*stage=data")
    leg.kill()
    leg.wait()
    for _ in range(3):
        leg = lab.start(task)
        wait_for(leg, "stage started .*stage=train")
        leg.kill()
        assert leg.wait() == -signal.SIGKILL
    stopped = lab.run(task, expect=78)
    said = stopped.text.splitlines()[-1]
    assert "3 legs in a row left nothing durable behind" in said
    assert said.count("lost after") == 3, said
    assert "save_every" in said, "what to do must be said"
    # It stays stopped, and a person who submits again gets three new tries.
    lab.run(task, expect=78)
    lab.run(task, env={"BATON_SUBMISSION": "again"})
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_any_number_of_preemptions_with_progress_is_fine(lab: Lab) -> None:
    task = lab.task({"train.save_every_steps": "100", "train.max_steps": "20"})
    statuses = []
    for _ in range(60):
        leg = lab.start(task)
        while leg.poll() is None and not any(w in leg.text for w in ("resumed ", "starting ")):
            time.sleep(0.001)
        leg.kill(signal.SIGTERM)
        statuses.append(leg.wait())
        if statuses[-1] == 0:
            break
    assert statuses[-1] == 0
    assert set(statuses[:-1]) == {75}
    assert len(statuses) > 10, "each leg was to make a step or two"
    assert_identical(task, lab.reference(task))


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(lab: Lab) -> None:
    # In fp16 this learning rate overflows after the first checkpoint.
    task = lab.task({"train.precision": "fp16", "train.learning_rate": "10"})
    said = []
    for _ in range(2):
        leg = lab.run(task, expect=1)
        assert task.steps() == [2], "what is not a number must not be saved"
        said.append(leg.text.splitlines()[-1])
    assert "error: step 3: the loss is nan" in said[0]
    assert "on training samples [" in said[0]
    assert said[1] == said[0], "a resumed leg meets the same samples"
    steps = [line["step"] for line in task.metrics()]
    assert max(steps) <= 2
    assert "NonFiniteError: step 3" in task.legs()[-1]["reason"]


@pytest.mark.slow
def test_an_older_leg_that_wakes_up_saves_nothing_and_stops(lab: Lab) -> None:
    task = lab.task()
    older = lab.start(task)
    wait_for(older, " saved .* step=2 ")
    older.kill(signal.SIGSTOP)
    _node_vanishes(task)
    newer = lab.run(task)
    assert task.legs()[0]["state"] == "lost"
    files = _bytes_of(task.checkpoints)
    older.kill(signal.SIGCONT)
    assert older.wait() == 78, older.text[-2000:]
    assert "leg 2 has taken over from leg 1; this one stops" in older.text
    assert _bytes_of(task.checkpoints) == files
    assert newer.status == 0
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
@pytest.mark.parametrize(
    "older_at",
    [
        "mkdir .staging",
        "serialize .staging/optimizer.safetensors",
        "link train/checkpoints/step-000004/state.json",
        "link train/checkpoints/step-000004/manifest.json",
        "remove train/checkpoints/step-000002/manifest.json",
    ],
)
def test_an_older_leg_that_wakes_up_in_its_save_does_not_harm_the_newer_ones_save(
    lab: Lab, older_at: str
) -> None:
    task = lab.task()
    _, operations = lab.traced(lab.task())
    # The save of step 4, or its rotation at step 6.
    after = operations.index("link train/checkpoints/step-000002/manifest.json")
    number = next(
        n for n, line in enumerate(operations, 1) if n > after + 1 and _same(line, older_at)
    )
    older = _start_stopping(lab, task, number)
    _node_vanishes(task)
    # The newer one stands still in the middle of its own save when the older one wakes up.
    trace = task.store / "newer"
    newer = _start_stopping(lab, task, _in_a_save(lab, task), trace)
    older.kill(signal.SIGCONT)
    assert older.wait() == 78, older.text[-2000:]
    newer.kill(signal.SIGCONT)
    assert newer.wait() == 0, newer.text[-2000:]
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_of_two_runners_at_the_same_moment_one_works_and_one_is_told_why_not(lab: Lab) -> None:
    for _ in range(4):
        task = lab.task()
        legs = [lab.start(task), lab.start(task)]
        statuses = sorted(leg.wait() for leg in legs)
        assert statuses == [0, 78], [leg.text[-800:] for leg in legs]
        refused = next(leg for leg in legs if leg.status == 78)
        said = refused.text.splitlines()[-1]
        assert "is already working on this task" in said or "claimed leg 1" in said, said
        assert "Traceback" not in refused.text
        assert len(task.legs()) == 1
        assert_identical(task, lab.reference(task))


def test_a_second_runner_is_refused_while_the_first_works(lab: Lab) -> None:
    task = lab.task()
    first = lab.start(task)
    wait_for(first, " step=2/10 ")
    first.kill(signal.SIGSTOP)
    second = lab.run(task, expect=78)
    said = second.text.splitlines()[-1]
    assert f"process {first.pid} " in said
    assert "baton cancel" in said
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert_identical(task, lab.reference(task))


def _node_vanishes(task: Task) -> None:
    """Make the leg at work look as after a lost node: another boot, silent for two minutes.

    What a network partition does: the leg still exists, and nobody can see it.
    """
    path = sorted(task.folder.glob("legs/*.json"))[-1]
    record = json.loads(path.read_bytes())
    record["runner"]["boot"] = "the boot of a node that does not answer"
    record["runner"]["host"] = "elsewhere"
    record["started"] = _earlier(record["started"])
    path.write_text(json.dumps(record))
    progress = task.folder / "progress.json"
    values = json.loads(progress.read_bytes())
    values["time"] = _earlier(values["time"])
    progress.write_text(json.dumps(values))


def _earlier(moment: str) -> str:
    then = datetime.datetime.fromisoformat(moment) - datetime.timedelta(seconds=120)
    return then.isoformat(timespec="milliseconds")


def _start_stopping(lab: Lab, task: Task, at: int, trace: Path | None = None) -> Leg:
    """Start a leg and return once it has stopped itself at a file operation."""
    trace = trace or task.store / "older"
    leg = lab.start(
        task,
        hook=(
            "strike",
            {
                "trace": str(trace),
                "below": str(task.folder),
                "at": at,
                "number": int(signal.SIGSTOP),
            },
        ),
    )
    stat = Path(f"/proc/{leg.pid}/stat")
    wait_until(
        leg,
        lambda: stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "T",
        f"it stopped at operation {at}",
    )
    return leg


def _in_a_save(lab: Lab, task: Task) -> int:
    """The operation in the middle of the next leg's first save, found in a copy of the store."""
    copy = task.copy_to(task.store.with_name(f"{task.store.name}-copy"))
    leg, operations = lab.traced(copy)
    assert leg.status == 0, leg.text[-2000:]
    return next(
        n
        for n, line in enumerate(operations, 1)
        if line.startswith("serialize .staging") and "optimizer" in line
    )


def _same(line: str, wanted: str) -> bool:
    """Is it this operation? The folder of a save may carry the number of its leg."""
    kind, _, path = line.partition(" ")
    expected, _, name = wanted.partition(" ")
    if name.startswith(".staging"):
        folder, _, rest = path.partition("/")
        return kind == expected and folder.startswith(".staging") and rest == name.partition("/")[2]
    return line == wanted


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
