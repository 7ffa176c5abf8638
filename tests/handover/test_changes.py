"""Scenario 14: what may not change between legs is refused by name; what may is said."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from lab import REPOSITORY, Lab, Task, assert_identical, wait_for

CSV = REPOSITORY / "jobs" / "smoke" / "medical_qa.csv"


def interrupted(lab: Lab, settings: dict[str, str]) -> Task:
    task = lab.task(settings)
    leg = lab.start(task)
    wait_for(leg, " step=3/10 ")
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75
    return task


@pytest.mark.slow
def test_another_base_model_is_refused_by_name_unless_allowed(lab: Lab) -> None:
    task = interrupted(lab, {})
    other = lab.reference(lab.task({"model.seed": "7"}))
    shutil.copyfile(
        other.folder / "base" / "model.safetensors", task.folder / "base" / "model.safetensors"
    )
    steps = task.steps()
    leg = lab.run(task, expect=78)
    said = [line for line in leg.text.splitlines() if line.startswith("error: ")]
    assert f"changed since the checkpoint of step {steps[-1]}: base: " in said[0]
    assert " -> " in said[0]
    assert "--allow-changed" in said[1]
    assert task.steps() == steps
    allowed = lab.run(task, "--allow-changed", "base")
    assert f"changed since step {steps[-1]}: base: " in allowed.text


@pytest.mark.slow
def test_other_data_are_refused_by_name_unless_allowed(lab: Lab, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    shutil.copyfile(CSV, csv)
    task = interrupted(lab, {"data.path": str(csv)})
    lines = csv.read_text(encoding="utf-8").splitlines(keepends=True)
    csv.write_text("".join([lines[0], *lines[:0:-1]]), encoding="utf-8")
    # Somebody clears the prepared data, so that they are made again from the changed file.
    shutil.rmtree(task.folder / "data")
    steps = task.steps()
    leg = lab.run(task, expect=78)
    said = [line for line in leg.text.splitlines() if line.startswith("error: ")]
    assert said, leg.text[-1500:]
    assert "data" in said[0]
    assert any("--allow-changed" in line for line in said), said
    assert task.steps() == steps
    allowed = lab.run(task, "--allow-changed", "data", env={"BATON_SUBMISSION": "again"})
    assert "changed since" in allowed.text


def test_an_input_file_that_changed_before_it_was_read_is_not_used_silently(
    lab: Lab, tmp_path: Path
) -> None:
    csv = tmp_path / "rows.csv"
    shutil.copyfile(CSV, csv)
    task = lab.task({"data.path": str(csv)})
    leg = lab.start(task)
    wait_for(leg, "stage started .*stage=data")
    leg.kill()
    leg.wait()
    if (task.folder / "data" / "done.json").exists():
        pytest.skip("the data stage was faster than the signal")
    lines = csv.read_text(encoding="utf-8").splitlines(keepends=True)
    csv.write_text("".join(lines[:-40]), encoding="utf-8")
    again = lab.run(task, expect=78)
    said = again.text.splitlines()[-1]
    assert said.startswith("error: "), again.text[-1500:]
    assert str(csv) in again.text


def test_another_number_of_threads_does_not_change_the_bytes(lab: Lab) -> None:
    task = interrupted(lab, {})
    lab.run(task, hook=("use_threads", {"count": 2}))
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_fewer_processes_than_before_keep_batch_and_order(lab: Lab) -> None:
    task = lab.task()
    pair = lab.start_pair(task)
    wait_for(pair[0], " step=3/10 ")
    pair[0].kill(signal.SIGTERM)
    assert [leg.wait() for leg in pair] == [75, 75]
    leg = lab.run(task)
    assert "processes: 2 -> 1" in leg.text
    whole = lab.reference(task)
    # Token counts of every step tell which samples were in it.
    mine, others = task.metrics(), whole.metrics()
    for key in ("step", "samples", "tokens", "epoch", "learning_rate"):
        assert [m.get(key) for m in mine] == [o.get(key) for o in others], key
    assert mine[-1]["dev_loss"] == pytest.approx(others[-1]["dev_loss"], rel=0.02)
