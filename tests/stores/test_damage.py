"""Every file of the newest checkpoint damaged in every way: in a bucket and on the Hub."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace

import pytest
from far import Far
from lab import Lab, Task, assert_identical, wait_for

SETTINGS = {"train.max_steps": "100", "data.dev_rows": "4", "eval.max_samples": "2"}
WAYS = ("truncated", "emptied", "flipped", "removed")
FILES = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "optimizer.safetensors",
    "state.json",
    "timing.json",
    "manifest.json",
)


@pytest.fixture(scope="module")
def saved_twice(lab: Lab, server: Far) -> Task:
    """A task whose store has at least two checkpoints, and no leg at work."""
    task = lab.task(SETTINGS, url=server.url())
    leg = lab.start(task)
    wait_for(leg, r"stored .* step=\d+ ")
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75, leg.text[-2000:]
    assert len(server.steps(task)) >= 2
    return task


def changed(data: bytes, how: str) -> bytes | None:
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    return {
        "truncated": data[:middle],
        "emptied": b"",
        "flipped": flipped,
        "removed": None,
    }[how]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_used(
    lab: Lab, far: Far, saved_twice: Task, file: str, how: str
) -> None:
    task = saved_twice
    newest = far.steps(task)[-1]
    older = far.steps(task)[-2]
    key = far.keys(task, newest)[file]
    data = far.read(task, key)
    manifest_key = far.keys(task, newest)["manifest.json"]
    manifest = far.read(task, manifest_key)
    broken = changed(data, how)
    far.damage(task, key, broken)
    # A fresh machine looks for the newest checkpoint that is whole.
    empty = lab.task(SETTINGS, url=task.url)
    empty.plan.write_bytes(task.plan.read_bytes())
    empty = replace(empty, name=task.name)
    try:
        leg = lab.start(empty, env={"BATON_SUBMISSION": f"{how} {file}"})
        wait_for(leg, r" (resumed|starting) task=")
        leg.kill()
        leg.wait()
        text = leg.text
        is_flipped_manifest = (file, how) == ("manifest.json", "flipped")
        harmless = is_flipped_manifest and _still_true(broken or b"")
        if not harmless:
            assert re.search(rf"resumed .* step={older}/100", text), text[-2500:]
            if (file, how) != ("manifest.json", "removed"):
                said = [ln for ln in text.splitlines() if f"using step-{older:06d} instead" in ln]
                assert len(said) == 1, f"it must be said, once:\n{text}"
                assert f"step-{newest:06d}" in said[0]
                # A manifest that asks for other bytes looks as if those of a file were wrong.
                named = file.rpartition("/")[2] in said[0]
                assert named or is_flipped_manifest, f"which file? {said[0]}"
    finally:
        far.damage(task, key, data)
        far.damage(task, manifest_key, manifest)


def _still_true(manifest: bytes) -> bool:
    """Did the flipped bit of a manifest hit a place that promises nothing, such as its date?"""
    try:
        found = json.loads(manifest)
    except ValueError:
        return False
    names = {entry.get("name") for entry in found.get("files", [])}
    return names == set(FILES) - {"manifest.json"}


def test_after_all_that_the_run_still_ends_with_the_same_bytes(
    lab: Lab, far: Far, saved_twice: Task, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = lab.task(SETTINGS, url=saved_twice.url)
    empty.plan.write_bytes(saved_twice.plan.read_bytes())
    empty = replace(empty, name=saved_twice.name)
    lab.run(empty)
    end = far.on_empty_machine(empty, tmp_path_factory.mktemp("end"))
    assert_identical(end, lab.reference(saved_twice))
