"""One version of an experiment, copied from a store to another, whatever kinds they are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from baton.errors import NameTaken
from baton.record import FileEntry, FileList
from baton.store.archive import BLOBS, Archive, blob_name, is_blob
from baton.store.base import Batch, Remote, Wanted
from baton.store.checkpoint import sha256_of
from baton.store.inventory import VersionContents, contents
from baton.store.task_names import FILES


def copy_version(source: Remote, target: Remote, version: str, said: Callable[[str], None]) -> None:
    """Copy plan, records and checkpoints; what is there already is not sent again.

    Every checkpoint is verified on the way. Stage markers come last, so that a copy that was
    cut off is one of an unfinished task, and can be gone on with.

    Raises:
        DamagedError: something in `source` is not whole; what came before it was copied.
    """
    here, there = source.below(version), target.below(version)
    found = contents(source, version)
    for task in found.tasks.values():
        for prefix, steps in task.steps.items():
            _copy_checkpoints(Archive(here, prefix), Archive(there, prefix), sorted(steps), said)
    _copy_files(here, there, found)
    said(f"{version}: plan and records of {len(found.tasks)} tasks")


def _copy_checkpoints(
    source: Archive, target: Archive, steps: list[int], said: Callable[[str], None]
) -> None:
    there = target.steps()
    for step in steps:
        if step in there:
            continue
        with tempfile.TemporaryDirectory(prefix="baton-copy-") as folder:
            manifest, data = source.fetch(step, Path(folder))
            try:
                target.store.commit(target.sending(step, Path(folder), manifest, data))
            except NameTaken:
                continue  # somebody else copies the same
        said(f"{source.checkpoints.name(step)}: {len(manifest.files)} files")


def _copy_files(source: Remote, target: Remote, found: VersionContents) -> None:
    with tempfile.TemporaryDirectory(prefix="baton-copy-") as name:
        folder = Path(name)
        for task in found.tasks:
            prefix = f"tasks/{task}"
            files = {
                item: _brought(source, item, folder)
                for item in found.sizes
                if item.startswith(f"{prefix}/")
                and "/checkpoints/step-" not in item
                and item != f"{prefix}/{FILES}"
            }
            if f"{prefix}/{FILES}" in found.sizes:
                where = f"{prefix}/{FILES}"
                for entry in FileList.from_json(source.read(where), where=where).files:
                    files[f"{prefix}/{entry.name}"] = _brought_blob(source, entry, folder)
            target.commit(_batch(target, prefix, files))
        if "plan.json" in found.sizes:
            target.write("plan.json", source.read("plan.json"))


def _batch(target: Remote, prefix: str, files: dict[str, Path]) -> Batch:
    blobs: dict[str, Path] = {}
    writes: dict[str, bytes | Path] = {}
    last: dict[str, bytes | Path] = {}
    entries = []
    for name, path in files.items():
        size = path.stat().st_size
        if is_blob(target, size) and not name.endswith((".txt", ".jsonl")):
            sha256 = sha256_of(path)
            blobs[blob_name(sha256)] = path
            inside = name.removeprefix(f"{prefix}/")
            entries.append(FileEntry(name=inside, size=size, sha256=sha256))
        else:
            (last if name.endswith("/done.json") else writes)[name] = path
    if entries:
        writes[f"{prefix}/{FILES}"] = FileList(files=entries).to_json()
    return Batch(message=f"copy of {prefix}", blobs=blobs, writes=writes, last=last)


def _brought(source: Remote, name: str, folder: Path) -> Path:
    target = folder / name
    source.download(name, target)
    return target


def _brought_blob(source: Remote, entry: FileEntry, folder: Path) -> Path:
    target = folder / BLOBS / entry.sha256
    if not target.exists():
        source.fetch(
            [
                Wanted(
                    name=blob_name(entry.sha256),
                    size=entry.size,
                    sha256=entry.sha256,
                    target=target,
                )
            ]
        )
    return target
