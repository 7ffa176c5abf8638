"""In which order checkpoints that wait reach a store, so that every one there has its best."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from far import Far
from lab import Lab, first_leg

from baton.handover import StopSignal
from baton.legs import utc_now
from baton.plan import Plan
from baton.stage import Alone, Leg
from baton.store.checkpoint import Checkpoints, Retention
from baton.store.local import LocalStore
from baton.store.mirror import Mirror
from baton.store.open import open_remote
from baton.store.upload import Uploader

PREFIX = "train/checkpoints"
STAGES = ("data", "train", "eval")


@pytest.fixture
def mirror(s3: Far, tmp_path: Path) -> Mirror:
    return Mirror(LocalStore(tmp_path / "here"), open_remote(s3.url()), "task")


def save(mirror: Mirror, folder: Path, *steps: int) -> None:
    checkpoints = Checkpoints(mirror.local, PREFIX, 1, lambda: None, utc_now)
    for step in steps:
        staging = folder / f"staging-{step}"
        staging.mkdir(parents=True)
        (staging / "model.safetensors").write_bytes(os.urandom(9_000))
        checkpoints.save(step, staging)


def send(mirror: Mirror, s3: Far, retention: Retention | None) -> list[int]:
    """What an uploader sends; the steps in the order in which they were complete in the store."""
    record = first_leg("task")
    s3.proxy.log.clear()
    uploader = Uploader(mirror=mirror, stages=STAGES, record=lambda: record)
    if retention is not None:
        uploader.saved(PREFIX, retention)
    uploader.start()
    until = time.monotonic() + 30
    assert uploader.finish(deadline=lambda: until) == []
    uploader.close()
    asked = [path for method, path, _ in s3.proxy.log if method == "PUT"]
    found = (re.search(r"step-(\d+)/manifest\.json", path) for path in asked)
    return [int(match[1]) for match in found if match]


def test_the_best_is_there_before_any_newer_one(s3: Far, mirror: Mirror, tmp_path: Path) -> None:
    save(mirror, tmp_path, 2, 4, 6, 8)
    # Of those that waited, the newest is enough.
    assert send(mirror, s3, Retention(keep_last=2, best=4)) == [4, 8]


def test_a_leg_that_finds_unsent_ones_sends_the_oldest_first(
    s3: Far, mirror: Mirror, tmp_path: Path
) -> None:
    save(mirror, tmp_path, 2, 4, 6)
    assert send(mirror, s3, None) == [2, 4, 6]


def test_without_a_best_the_newest_is_enough(s3: Far, mirror: Mirror, tmp_path: Path) -> None:
    save(mirror, tmp_path, 2, 4, 6)
    assert send(mirror, s3, Retention(keep_last=2)) == [6]


def test_a_leg_does_not_send_what_the_store_is_past(
    s3: Far, mirror: Mirror, tmp_path: Path
) -> None:
    """A machine that had the task long ago still has checkpoints that were let go since."""
    save(mirror, tmp_path, 6, 8)
    assert send(mirror, s3, None) == [6, 8]
    save(mirror, tmp_path, 2, 4)
    assert send(mirror, s3, None) == []


def test_a_leg_that_ends_training_sends_nothing_that_is_let_go_on_arrival(
    s3: Far, mirror: Mirror, tmp_path: Path
) -> None:
    """Otherwise each of two old ones takes the other's place in the store, for ever."""
    retention = Retention(keep_last=2, best=6)
    save(mirror, tmp_path, 6, 8)
    assert send(mirror, s3, retention) == [6, 8]
    save(mirror, tmp_path, 2, 4)
    mirror.local.write("train/done.json", b"{}")
    assert send(mirror, s3, retention) == []
    assert "train/done.json" in mirror.stored_names()


def test_no_marker_is_there_before_those_of_earlier_stages(
    s3: Far, mirror: Mirror, tmp_path: Path
) -> None:
    """Another machine would do the earlier stage again beneath a later one that is done."""
    save(mirror, tmp_path, 2, 4, 6)
    for stage in STAGES:
        mirror.local.write(f"{stage}/done.json", b"{}")
    assert send(mirror, s3, None) == [2, 4, 6]
    written = [path for method, path, _ in s3.proxy.log if method == "PUT"]
    order = [match[1] for path in written if (match := re.search(r"(\w+)/done\.json", path))]
    assert order == list(STAGES)
    manifests = [place for place, path in enumerate(written) if path.endswith("manifest.json")]
    markers = {
        stage: place
        for place, path in enumerate(written)
        for stage in STAGES
        if path.endswith(f"{stage}/done.json")
    }
    assert markers["data"] < manifests[0]
    assert markers["eval"] > markers["train"] > manifests[-1]


def test_a_legs_durable_step_is_that_of_the_stage_it_trains(
    lab: Lab, s3: Far, tmp_path: Path
) -> None:
    """Checkpoints of a stage that is finished may arrive while the next one trains."""
    task = lab.task(url=s3.url())
    mirror = s3.mirror(task, tmp_path / "here")
    plan = Plan.from_json(task.plan.read_bytes(), where="plan")
    record = first_leg(task.name)
    leg = Leg(
        plan=plan,
        task=plan.tasks[0],
        config=None,
        record=record,
        store=mirror.local,
        stop=StopSignal(grace_seconds=1),
        peers=Alone(),
        check_fence=lambda: None,
        mirror=mirror,
        now=utc_now,
    )
    leg.uploader = Uploader(
        mirror=mirror, stages=STAGES, record=lambda: leg.record, durable=leg.stored
    )
    leg.stored("sft/checkpoints", 8)
    assert leg.record.durable_step == 8, "before it saves anything, what it finds here to send"
    leg.saved("distill/checkpoints", 4, Retention(keep_last=2))
    assert leg.record.durable_step is None
    leg.stored("sft/checkpoints", 9)
    assert leg.record.durable_step is None
    leg.stored("distill/checkpoints", 4)
    assert leg.record.durable_step == 4
