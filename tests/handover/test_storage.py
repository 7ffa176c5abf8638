"""Scenario 13: full, limited and read-only disks: a clear error, and nothing saved is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Task, assert_identical, wait_for

SETTINGS = {"train.max_steps": "6", "data.dev_rows": "4", "eval.max_samples": "2"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which can be filled and made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting needs rights that this user has not")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def half_way(lab: Lab, store: Path) -> Task:
    """A task in `store` with a checkpoint of step 2 and no leg at work."""
    task = lab.task(SETTINGS, store=store)
    leg = lab.start(task)
    wait_for(leg, " saved .* step=2 ")
    leg.kill()
    leg.wait()
    assert 2 in task.steps()
    return task


def assert_clear(text: str, *words: str) -> None:
    """The last line says what was wrong; nobody has to read a traceback."""
    said = text.splitlines()[-1]
    assert said.startswith("error: "), text[-1500:]
    for word in words:
        assert word in said, said


@pytest.mark.slow
def test_a_full_disk_ends_the_leg_clearly_and_leaves_what_was_saved(
    lab: Lab, small_disk: Path
) -> None:
    task = half_way(lab, small_disk / "store")
    steps = task.steps()
    # Nearly full: the leg starts, and the disk is full somewhere in its next save.
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler = small_disk / "filler"
    for kept_free in (4096, 40_000, 120_000):
        filler.write_bytes(b"x" * max(0, free - kept_free))
        leg = lab.run(task, expect=1)
        assert_clear(leg.text, "disk is full")
        assert task.steps() == steps
        filler.unlink()
    lab.run(task, env={"BATON_SUBMISSION": "again"})
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_a_read_only_store_is_named_and_nothing_is_lost(lab: Lab, small_disk: Path) -> None:
    task = half_way(lab, small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        leg = lab.run(task, expect=1)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert_clear(leg.text, "read-only")
    lab.run(task)
    assert_identical(task, lab.reference(task))


def test_a_quota_ends_the_leg_clearly_and_leaves_what_was_saved(lab: Lab, tmp_path: Path) -> None:
    task = half_way(lab, tmp_path / "store")
    steps = task.steps()
    largest = max(path.stat().st_size for path in task.checkpoint(2).rglob("*") if path.is_file())
    leg = lab.run(task, expect=1, hook=("limit_file_size", {"bytes_": largest - 1}))
    assert_clear(leg.text)
    assert task.steps() == steps
    lab.run(task)
    assert_identical(task, lab.reference(task))
