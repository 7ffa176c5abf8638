"""Scenarios 2, 12 and 19: damaged checkpoints, scrambled clocks and what kills leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from lab import Lab, Task, assert_identical, damage

SETTINGS = {"train.max_steps": "6", "data.dev_rows": "4", "eval.max_samples": "2"}
FILES = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "optimizer.safetensors",
    "state.json",
    "timing.json",
    "manifest.json",
)
WAYS = ("truncated", "emptied", "flipped", "removed")


@pytest.fixture(scope="module")
def saved_twice(lab: Lab) -> Task:
    """A task with checkpoints of step 2 and 4 and no leg at work."""
    _, operations = lab.traced(lab.task(SETTINGS))
    complete = operations.index("link train/checkpoints/step-000004/manifest.json") + 1
    task = lab.task(SETTINGS)
    lab.traced(task, at=complete + 1)
    assert task.steps() == [2, 4]
    return task


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_used(
    lab: Lab, saved_twice: Task, file: str, tmp_path: Path
) -> None:
    files = {
        path.relative_to(saved_twice.checkpoint(4)).as_posix()
        for path in saved_twice.checkpoint(4).rglob("*")
        if path.is_file()
    }
    assert files == set(FILES), "the matrix must cover every file of a checkpoint"
    for how in WAYS:
        task = saved_twice.copy_to(tmp_path / how)
        damage(task.checkpoint(4) / file, how)
        harmless = file == "manifest.json" and how == "flipped" and _still_true(task)
        leg = lab.run(task)
        if (file, how) == ("manifest.json", "removed"):
            # Without a manifest it never was a checkpoint: an unfinished save, swept away.
            assert "resumed task=lora_tiny leg=2 stage=train step=2/6" in leg.text, leg.text
        elif not harmless:
            assert "resumed task=lora_tiny leg=2 stage=train step=2/6" in leg.text, leg.text
            said = [line for line in leg.text.splitlines() if "using step-000002 instead" in line]
            assert len(said) == 1, f"{how}: it must be said, once:\n{leg.text}"
            assert "step-000004" in said[0]
            assert file.rpartition("/")[2] in said[0], f"{how}: which file? {said[0]}"
        assert_identical(task, lab.reference(task))


def _still_true(task: Task) -> bool:
    """Did the flipped bit of a manifest hit a place that promises nothing, such as its date?"""
    try:
        manifest = json.loads((task.checkpoint(4) / "manifest.json").read_bytes())
    except ValueError:
        return False
    found = {entry.get("name") for entry in manifest.get("files", [])}
    return found == set(FILES) - {"manifest.json"}


@pytest.mark.slow
def test_with_every_checkpoint_damaged_the_run_starts_again_and_says_so(
    lab: Lab, saved_twice: Task, tmp_path: Path
) -> None:
    task = saved_twice.copy_to(tmp_path / "store")
    for step in (2, 4):
        damage(task.checkpoint(step) / "optimizer.safetensors", "flipped")
    leg = lab.run(task)
    assert "using step-000002 instead" in leg.text
    assert "starting from step 0" in leg.text
    assert_identical(task, lab.reference(task))


def test_the_newest_checkpoint_is_the_one_of_the_highest_step_whatever_clocks_say(
    lab: Lab, saved_twice: Task, tmp_path: Path
) -> None:
    task = saved_twice.copy_to(tmp_path / "store")
    for path in task.checkpoint(2).rglob("*"):
        os.utime(path, (4e9, 4e9))
    for path in task.checkpoint(4).rglob("*"):
        os.utime(path, (1, 1))
    leg = lab.run(task)
    assert "resumed task=lora_tiny leg=2 stage=train step=4/6" in leg.text
    # Rotation went by step as well: the last two are kept.
    assert task.steps() == [4, 6]
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_rotation_keeps_the_best_checkpoint_however_old_it_is(lab: Lab) -> None:
    # Eight rows learned by heart: the dev loss rises after step 8.
    settings = {
        "matrix.adapter.method": "[full]",
        "matrix.data.rows": "{tiny: 8}",
        "train.max_steps": "16",
        "train.learning_rate": "0.1",
        "train.schedule": "constant",
        "train.warmup_steps": "0",
        "train.eval_every_steps": "2",
    }
    task = lab.task(settings)
    reference = lab.reference(task)
    history = json.loads((reference.folder / "train" / "dev_history.json").read_bytes())
    best = int(min(history, key=lambda row: row[1])[0])
    assert best < 12, f"this run should get worse: {history}"
    assert reference.steps() == [best, 14, 16]
    for step in (best - 2, best + 4):
        leg = lab.start(task)
        while not any(s >= step for s in task.steps()) and leg.poll() is None:
            pass
        leg.kill()
        leg.wait()
        for path in task.checkpoints.rglob("*"):
            os.utime(path, (1, 1))
    lab.finish(task)
    assert best in task.steps()
    assert_identical(task, reference)


def test_what_earlier_kills_left_behind_does_not_matter(
    lab: Lab, saved_twice: Task, tmp_path: Path
) -> None:
    task = saved_twice.copy_to(tmp_path / "store")
    rubbish = (
        ".staging/state.json",
        ".staging/adapter/adapter_model.safetensors",
        ".staging/left-over.bin",
        ".restored-0/state.json",
        ".restored-0/old.bin",
        ".best-0/optimizer.safetensors",
        ".incoming/12345-abcdef",
        ".progress.json.12345",
        "train/metrics.jsonl.part",
        "data/.train.tokens",
        "train/checkpoints/step-000006/optimizer.safetensors",
        "train/checkpoints/step-000006/left-over.bin",
        "train/checkpoints/step-000005/adapter/adapter_model.safetensors",
    )
    for name in rubbish:
        path = task.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"rubbish of an earlier kill")
    lab.run(task)
    assert_identical(task, lab.reference(task))
    names = {path.name for path in task.checkpoints.rglob("*")}
    assert "left-over.bin" not in names
    assert not task.checkpoint(5).exists()
