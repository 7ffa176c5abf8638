"""Scenarios 1 and 7: SIGKILL at every file operation of a restore, a save and a rotation."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import Lab, Task, assert_identical, chunks

SHARES = 8
SETTINGS = {"train.max_steps": "6", "data.dev_rows": "4", "eval.max_samples": "2"}
# Neither changes what a kill leaves on disk: killing before one is killing after what precedes.
SILENT = ("fsync", "mkdir", "rmdir")


@pytest.fixture(scope="module")
def half_way(lab: Lab) -> Task:
    """A task whose leg was killed right after the checkpoint of step 4 was complete."""
    _, operations = lab.traced(lab.task(SETTINGS))
    complete = operations.index("link train/checkpoints/step-000004/manifest.json") + 1
    task = lab.task(SETTINGS)
    leg, _ = lab.traced(task, at=complete + 1)
    assert leg.status == -9
    assert task.steps() == [2, 4]
    return task


@pytest.fixture(scope="module")
def operations(lab: Lab, half_way: Task, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the next leg does to files, in order, up to the end of training."""
    task = half_way.copy_to(tmp_path_factory.mktemp("trace") / "store")
    leg, found = lab.traced(task)
    assert leg.status == 0, leg.text
    return found[: found.index("rename train/done.json") + 1]


def test_the_leg_under_fire_restores_saves_and_rotates(operations: list[str]) -> None:
    assert "rename .restored-0/state.json" in operations
    assert "link train/checkpoints/step-000006/manifest.json" in operations
    assert "remove train/checkpoints/step-000002/manifest.json" in operations
    # The order that makes a save atomic: every file before the manifest, removal the other way.
    saved = [o for o in operations if o.startswith("link train/checkpoints/step-000006/")]
    assert saved[-1].endswith("manifest.json")
    removed = [o for o in operations if o.startswith("remove train/checkpoints/step-000002/")]
    assert removed[0].endswith("manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_a_kill_at_any_file_operation_loses_nothing_that_was_saved(
    lab: Lab, half_way: Task, operations: list[str], share: int, tmp_path: Path
) -> None:
    loud = [n for n, line in enumerate(operations, 1) if line.split()[0] not in SILENT]
    reference = lab.reference(half_way)
    for number in chunks(loud, SHARES, share):
        line = operations[number - 1]
        task = half_way.copy_to(tmp_path / f"at-{number}")
        leg, _ = lab.traced(task, at=number)
        assert leg.status == -9, f"{line}: ended with {leg.status}\n{leg.text[-2000:]}"
        assert {4, 6} & set(task.steps()), f"{line}: no checkpoint left, {task.steps()}"
        again = lab.run(task)
        done = operations[: number - 1]
        is_saved = "link train/checkpoints/step-000006/manifest.json" in done
        is_restored = f"stage=train step={6 if is_saved else 4}/6" in again.text
        assert is_restored, f"{line}:\n{again.text}"
        assert "set aside" not in again.text
        assert_identical(task, reference)
        _assert_no_litter(task, line)


def _assert_no_litter(task: Task, after: str) -> None:
    folders = {path.name for path in task.checkpoints.iterdir()}
    whole = {f"step-{step:06d}" for step in task.steps()}
    assert folders == whole, f"{after}: incomplete checkpoints were left behind"
    assert not list(task.folder.glob(".staging*")), after
    assert not list(task.folder.glob(".restored*")), after
