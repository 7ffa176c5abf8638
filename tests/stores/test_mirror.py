"""What pulling a task from a store does to the files that are here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from far import Far
from lab import Lab, first_leg

from baton.pipelines import PIPELINES
from baton.store.archive import blob_name, is_blob
from baton.store.base import Batch
from baton.store.checkpoint import sha256_of
from baton.store.local import LocalStore
from baton.store.mirror import Mirror

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


LARGE = b"large" * 300_000


@pytest.mark.parametrize("content", [b"three lines\n", LARGE], ids=["small", "large"])
def test_what_another_machine_wrote_over_is_written_again(
    lab: Lab, far: Far, tmp_path: Path, content: bytes
) -> None:
    """Of two histories that end at the same place, the store must not mix the files."""
    task = lab.task(url=far.url())
    first, second = (far.mirror(task, tmp_path / name) for name in ("first", "second"))
    leg = first_leg(task.name)
    assert content != LARGE or is_blob(first.version, len(content)) or far.kind == "hub"

    def work(mirror: Mirror, number: int, **files: bytes) -> None:
        lease = replace(leg, number=number)
        mirror.commit(Batch(message="begins"), lease)
        mirror.pull(STAGES, leg=number)
        for name, data in files.items():
            mirror.local.write(f"data/{name}", data)
        mirror.send(mirror.changes(), lease)

    work(first, 1, it=content, other=b"the same")
    # It did the same, and was lost half-way: some bytes are missing, others have the same length.
    work(second, 2, it=content[:-7], other=b"not same")
    first.pull(STAGES)
    work(first, 3, **{"done.json": b"{}"})
    fresh = far.mirror(task, tmp_path / "empty")
    fresh.pull(STAGES)
    assert fresh.local.read("data/it") == content
    assert fresh.local.read("data/other") == b"the same"


def test_a_leg_on_the_same_machine_sends_nothing_twice(lab: Lab, s3: Far, tmp_path: Path) -> None:
    task = lab.task(url=s3.url())
    mirror = s3.mirror(task, tmp_path / "here")
    leg = first_leg(task.name)
    mirror.commit(Batch(message="begins"), leg)
    mirror.pull(STAGES, leg=1)
    mirror.local.write("data/it", b"it")
    mirror.send(mirror.changes(), leg)
    mirror.commit(Batch(message="begins"), replace(leg, number=2))
    again = s3.mirror(task, tmp_path / "here")
    again.pull(STAGES, leg=2)
    assert again.changes().is_empty


def test_compiled_code_comes_to_an_empty_machine(lab: Lab, far: Far, tmp_path: Path) -> None:
    first = far.mirror(lab.task(url=far.url()), tmp_path / "first")
    fresh = replace_machine(first, tmp_path / "empty")
    send_compiled(first)
    fresh.pull(STAGES)
    assert fresh.local.read("compiled/torch.bin") == LARGE


@pytest.mark.parametrize("how", ["flipped", "removed"])
def test_damaged_compiled_code_keeps_no_leg_from_starting(
    lab: Lab, s3: Far, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = s3.mirror(lab.task(url=s3.url()), tmp_path / "first")
    fresh = replace_machine(first, tmp_path / "empty")
    send_compiled(first)
    blob = blob_name(sha256_of(first.local.path("compiled/torch.bin")))
    if how == "removed":
        first.version.delete(blob)
    else:
        first.version.write(blob, b"L" + LARGE[1:])
    fresh.pull(STAGES)
    assert fresh.local.read("data/done.json") == b"{}"
    assert "compiled/torch.bin" not in set(fresh.local.names())
    assert caplog.text.count("compiled code of earlier legs is not used") == 1


def replace_machine(mirror: Mirror, folder: Path) -> Mirror:
    """The same task as another machine sees it."""
    return Mirror(LocalStore(folder), mirror.version, mirror.task)


def send_compiled(mirror: Mirror) -> None:
    """A leg's compiled code goes to the store, as any finished file does, with a stage."""
    leg = first_leg(mirror.task)
    mirror.commit(Batch(message="begins"), leg)
    mirror.local.write("compiled/torch.bin", LARGE)
    mirror.local.write("data/done.json", b"{}")
    mirror.send(mirror.changes(), leg)
