"""What pulling a task from a store does to the files that are here."""

from __future__ import annotations

import time
from pathlib import Path

from far import Far
from lab import Lab

from baton.pipelines import PIPELINES

STAGES = PIPELINES["medical_qa"]().stage_names


def test_a_log_that_a_launcher_has_open_is_joined_in_place(
    lab: Lab, s3: Far, tmp_path: Path
) -> None:
    mirror = s3.mirror(lab.task(url=s3.url()), tmp_path / "here")
    # The store is further than this machine.
    mirror.remote.write("data/done.json", b"{}")
    mirror.remote.write("log.txt", b"leg 1 began\nleg 1 ended\n")
    path = mirror.local.path("log.txt")
    path.parent.mkdir(parents=True)
    with open(path, "a", encoding="utf-8") as launcher:
        launcher.write("leg 2 began\n")
        launcher.flush()
        mirror.pull(STAGES)
        launcher.write("leg 2 ended\n")
    assert path.read_text() == "leg 1 began\nleg 1 ended\nleg 2 began\nleg 2 ended\n"
    mirror.pull(STAGES)
    assert path.read_text().count("leg 1 began") == 1


def test_small_files_come_several_at_a_time(lab: Lab, s3: Far, tmp_path: Path) -> None:
    mirror = s3.mirror(lab.task(url=s3.url()), tmp_path / "here")
    names = [f"eval/shards/{number:03d}.jsonl" for number in range(32)]
    for name in [*names, "data/done.json"]:
        mirror.remote.write(name, name.encode())
    slow = s3.proxy.rule(action="delay", method="GET", path="/shards/", seconds=0.5, times=32)
    started = time.monotonic()
    mirror.pull(STAGES)
    # One after the other they would take 16 s.
    assert time.monotonic() - started < 12
    assert slow.hits == 32
    assert [mirror.local.read(name).decode() for name in names] == names
