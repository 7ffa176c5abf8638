"""What is in a store, whether it is whole, and what nobody needs any more."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import BatonError, DamagedError
from baton.record import FileEntry, FileList, LegRecord
from baton.store.archive import BLOBS, Archive, blob_name, is_blob
from baton.store.base import Remote, Wanted
from baton.store.checkpoint import MANIFEST, verify_file
from baton.store.task_names import FILES

_VERSION = re.compile(r"(.+/[0-9a-f]{8})/(plan\.json|blobs/.+|tasks/.+)")
_TASK = re.compile(r"tasks/([^/]+)/(.+)")
_STEP = re.compile(r"(tasks/[^/]+/.+/checkpoints)/step-(\d{6,})/(.+)")


@dataclass
class TaskContents:
    """What a store has of one task."""

    name: str
    stages_done: list[str] = field(default_factory=list)
    legs: int = 0
    steps: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class VersionContents:
    """What a store has of one version of an experiment; sizes in bytes."""

    name: str
    tasks: dict[str, TaskContents] = field(default_factory=dict)
    bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)


def versions_in(store: Remote) -> list[str]:
    """`<experiment>/<digest>` of every version, from one listing, a page in memory at a time."""
    found = (_VERSION.fullmatch(listed.name) for listed in store.listing())
    return sorted({match[1] for match in found if match})


def contents(store: Remote, version: str) -> VersionContents:
    """What there is of a version, by names and sizes alone."""
    found = VersionContents(version)
    for listed in store.below(version).listing():
        found.sizes[listed.name] = listed.size
        found.bytes += listed.size
        match = _TASK.fullmatch(listed.name)
        if not match:
            continue
        task = found.tasks.setdefault(match[1], TaskContents(match[1]))
        if re.fullmatch(r"[^/]+/done\.json", match[2]):
            task.stages_done.append(match[2].partition("/")[0])
        elif re.fullmatch(r"legs/\d+\.json", match[2]):
            task.legs += 1
        elif (step := _STEP.fullmatch(listed.name)) and step[3] == MANIFEST:
            task.steps.setdefault(step[1], []).append(int(step[2]))
    return found


@dataclass(frozen=True)
class Finding:
    """A checkpoint or a set of files that was looked at; `problem` is empty if it is whole."""

    what: str
    files: int
    bytes: int
    problem: str = ""


def verify(store: Remote, version: str, *, quick: bool = False) -> Iterator[Finding]:
    """Look at every checkpoint and every large file of a version.

    Every byte is read and compared with its SHA-256, one checkpoint on disk at a time; `quick`
    compares names and sizes only.
    """
    place, found = store.below(version), contents(store, version)
    for task in found.tasks.values():
        for prefix, steps in task.steps.items():
            for step in sorted(steps):
                yield _checkpoint(Archive(place, prefix), step, found.sizes, quick=quick)
        if f"tasks/{task.name}/{FILES}" in found.sizes:
            yield _files(place, task.name, found.sizes, quick=quick)


def _checkpoint(archive: Archive, step: int, sizes: dict[str, int], *, quick: bool) -> Finding:
    what = archive.checkpoints.name(step)
    try:
        entries = archive.checkpoints.manifest(step).files
        total = sum(entry.size for entry in entries)
        if quick:
            _compare({archive.place(step, entry): entry for entry in entries}, sizes)
        else:
            with tempfile.TemporaryDirectory(prefix="baton-verify-") as folder:
                archive.fetch(step, Path(folder))
    except BatonError as error:
        return Finding(what, 0, 0, str(error))
    return Finding(what, len(entries), total)


def _files(place: Remote, task: str, sizes: dict[str, int], *, quick: bool) -> Finding:
    what = f"tasks/{task}/{FILES}"
    try:
        entries = FileList.from_json(place.read(what), where=what).files
        if quick:
            _compare({blob_name(entry.sha256): entry for entry in entries}, sizes)
        else:
            with tempfile.TemporaryDirectory(prefix="baton-verify-") as folder:
                for entry in entries:
                    _fetch_one(place, entry, Path(folder, entry.sha256))
    except BatonError as error:
        return Finding(what, 0, 0, str(error))
    return Finding(what, len(entries), sum(entry.size for entry in entries))


def _fetch_one(place: Remote, entry: FileEntry, target: Path) -> None:
    wanted = Wanted(
        name=blob_name(entry.sha256), size=entry.size, sha256=entry.sha256, target=target
    )
    place.fetch([wanted])
    verify_file(target, entry, entry.name)
    target.unlink()


def _compare(places: dict[str, FileEntry], sizes: dict[str, int]) -> None:
    for place, entry in places.items():
        if place not in sizes:
            raise DamagedError(f"{entry.name} is missing")
        if sizes[place] != entry.size:
            raise DamagedError(
                f"{entry.name} is {sizes[place]:,} bytes, manifest says {entry.size:,}"
            )


@dataclass(frozen=True)
class Garbage:
    """Names that nothing refers to, or why that cannot be said of a version now."""

    names: list[str]
    bytes: int
    left_alone: str = ""


def garbage(store: Remote, version: str) -> Garbage:
    """What could be deleted: blobs without a manifest, and checkpoints without one.

    A version with a leg at work is left alone: what it is sending has no manifest yet.
    """
    place, found = store.below(version), contents(store, version)
    for name in found.sizes:
        if re.fullmatch(r"tasks/[^/]+/legs/\d+\.json", name):
            leg = LegRecord.from_json(place.read(name), where=name)
            if leg.state == "active":
                why = f"{leg.task}: leg {leg.number} is active (on {leg.runner.host})"
                return Garbage([], 0, why)
    needed: set[str] = set()
    complete: set[str] = set()
    for task in found.tasks.values():
        for prefix, steps in task.steps.items():
            archive = Archive(place, prefix)
            for step in steps:
                complete.add(archive.checkpoints.name(step))
                for entry in archive.checkpoints.manifest(step).files:
                    if is_blob(place, entry.size):
                        needed.add(blob_name(entry.sha256))
        name = f"tasks/{task.name}/{FILES}"
        if name in found.sizes:
            entries = FileList.from_json(place.read(name), where=name).files
            needed |= {blob_name(entry.sha256) for entry in entries}
    names = [
        name
        for name in found.sizes
        if (name.startswith(f"{BLOBS}/") and name not in needed)
        or ((inside := _STEP.fullmatch(name)) and f"{inside[1]}/step-{inside[2]}" not in complete)
    ]
    return Garbage(sorted(names), sum(found.sizes[name] for name in names))
