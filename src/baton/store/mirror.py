"""A task's folder on this machine, and the same task in a remote store."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from baton.errors import DamagedError, FencedError, NameMissing
from baton.record import FileEntry, FileList, LegRecord, Manifest, dump_json
from baton.store.archive import Archive, blob_name, is_blob
from baton.store.base import Batch, Remote, Wanted, is_name
from baton.store.checkpoint import MANIFEST, Checkpoints, sha256_of, verify_file
from baton.store.local import LocalStore

# Files that only grow while a leg works: sent under their own names, again and again.
_GROWING = re.compile(r"log\.txt|(.*/)?metrics\.jsonl|(.*/)?tensorboard/.*")
_CHECKPOINTS = re.compile(r"(.+/checkpoints)/step-(\d{6,})/(.+)")
_LEG = re.compile(r"legs/(\d{3,})\.json")
_DONE = re.compile(r"([^/]+)/done\.json")
PROGRESS, LOG, FILES = "progress.json", "log.txt", "files.json"
CANCELLED = "cancelled.json"
INDEX, _LOCK, _FETCHED, _SENDING = ".mirror.json", ".mirror.lock", ".fetched", ".sending"


def position_of(names: Collection[str], stages: Sequence[str]) -> list[int]:
    """What is durable of a task: stages done, and of the next one the newest step and shards.

    Grows with every bit of progress; two legs that start at the same position have nothing
    between them.
    """
    done = sum(f"{stage}/done.json" in names for stage in stages)
    stage = next((s for s in stages if f"{s}/done.json" not in names), None)
    if stage is None:
        return [done, 0, 0]
    steps = newest_steps(names)
    shards = sum(1 for name in names if re.fullmatch(rf"{re.escape(stage)}/shards/[^/]+", name))
    return [done, steps.get(f"{stage}/checkpoints", 0), shards]


def newest_steps(names: Collection[str]) -> dict[str, int]:
    """The newest complete step below each folder of checkpoints."""
    newest: dict[str, int] = {}
    for name in names:
        found = _CHECKPOINTS.fullmatch(name)
        if found and found[3] == MANIFEST:
            newest[found[1]] = max(int(found[2]), newest.get(found[1], 0))
    return newest


@dataclass(frozen=True)
class _Known:
    """A file as it was when it was last the same on both sides; a large one with its content."""

    size: int
    mtime_ns: int
    sha256: str = ""

    def is_like(self, other: _Known) -> bool:
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


@dataclass(frozen=True)
class Changes:
    """What differs between a folder and its store: files to send, and names to delete there."""

    changed: Mapping[str, _Known]
    gone: Collection[str]

    @property
    def is_empty(self) -> bool:
        return not (self.changed or self.gone)

    def without_markers(self, stages: Collection[str]) -> Changes:
        """All but the markers of these stages."""
        held_back = {f"{stage}/done.json" for stage in stages}
        changed = {n: known for n, known in self.changed.items() if n not in held_back}
        return Changes(changed, self.gone)

    def finished_stages(self) -> list[str]:
        """Stages whose marker the store does not have yet."""
        return [found[1] for name in self.changed if (found := _DONE.fullmatch(name))]


class Mirror:
    """Brings a task from `remote` to `local` and back.

    `remote` is the place of an experiment's version; the task lies below `tasks/<task>` there.
    Names are the same on both sides, except that large finished files and those of checkpoints
    lie in `blobs/` under their content's name where the store does not see to that itself;
    `files.json` says which.
    """

    def __init__(self, local: LocalStore, remote: Remote, task: str) -> None:
        self.local = local
        self.version = remote
        self.prefix = f"tasks/{task}"
        self.remote = remote.below(self.prefix)
        self.task = task
        self.durable: dict[str, int] = {}
        self._index: dict[str, _Known] = {}
        self._read_index()
        self._manifests: dict[str, Manifest] = {}

    # --- bringing things here -----------------------------------------------------------

    def pull(self, stages: Sequence[str], *, with_blobs: bool = True) -> None:
        """Bring what the store has and this folder lacks; checkpoints come when asked for.

        Of two histories the one whose position is further on wins; legs and the log are
        joined. Stage markers come last, so that what they promise is here.
        """
        listed = {item.name: item.size for item in self.remote.listing()}
        self._pull_legs(listed)
        here = set(self.local.names())
        files = self._remote_files(listed)
        plain = [name for name in listed if _is_mirrored(name)]
        wanted = list(files.values())
        if position_of(here, stages) >= position_of(listed, stages):
            plain = []
            wanted = [entry for entry in wanted if entry.name not in here]
        if not with_blobs:
            wanted = [entry for entry in wanted if entry.name.endswith(".json")]
        self._bring_blobs(wanted)
        for name in sorted(plain, key=lambda name: bool(_DONE.fullmatch(name))):
            self._bring(name)
        if LOG in listed:
            self._join_log()
        if PROGRESS in listed and PROGRESS not in here:
            self._bring(PROGRESS)
        self._note(listed)
        self.write_index()

    def refresh(self, stages: Sequence[str]) -> None:
        """As `pull`, for people: records only, and never beneath a leg that is at work here."""
        with self.hold() as is_held:
            if is_held:
                self.pull(stages, with_blobs=False)
                with contextlib.suppress(NameMissing):
                    self._bring(PROGRESS)

    @contextlib.contextmanager
    def hold(self, *, wait_seconds: float = 0.0) -> Iterator[bool]:
        """Keep other processes of this machine from pulling; yields whether we have it."""
        until = time.monotonic() + wait_seconds
        self.local.root.mkdir(parents=True, exist_ok=True)
        with open(self.local.root / _LOCK, "a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() < until:
                        time.sleep(0.1)
                        continue
                    yield False
                else:
                    yield True
                return

    def stored_names(self) -> set[str]:
        """All names of the task that the store has."""
        return {item.name for item in self.remote.listing()}

    def pull_legs(self) -> None:
        """Bring the records of legs, which other machines may have closed."""
        self._pull_legs({item.name: item.size for item in self.remote.listing("legs")})

    def _pull_legs(self, listed: Mapping[str, int]) -> None:
        for name in listed:
            if not _LEG.fullmatch(name):
                continue
            path = self.local.path(name)
            if path.exists() and json.loads(path.read_bytes()).get("state") != "active":
                continue  # a leg that has ended does not change
            self._bring(name)

    def _bring(self, name: str) -> None:
        self.local.write(name, self.remote.read(name))
        self._index[name] = _known(self.local.path(name))

    def _bring_blobs(self, entries: Sequence[FileEntry]) -> None:
        """Fetch large finished files; what an earlier try left is gone on from."""
        folder = self.local.root / _FETCHED
        missing = [entry for entry in entries if not self._is_same(entry)]
        self.version.fetch(
            [
                Wanted(
                    name=blob_name(entry.sha256),
                    size=entry.size,
                    sha256=entry.sha256,
                    target=folder / entry.sha256,
                )
                for entry in {entry.sha256: entry for entry in missing}.values()
            ]
        )
        for entry in missing:
            self.local.delete(entry.name)
            self.local.upload(folder / entry.sha256, entry.name)
            self._index[entry.name] = _known(self.local.path(entry.name), entry.sha256)
        shutil.rmtree(folder, ignore_errors=True)

    def _is_same(self, entry: FileEntry) -> bool:
        """Is this file here, as far as size and the last look at it tell?"""
        path = self.local.path(entry.name)
        if not path.exists() or path.stat().st_size != entry.size:
            return False
        is_known = self._index.get(entry.name) == _known(path, entry.sha256)
        return is_known or sha256_of(path) == entry.sha256

    def _join_log(self) -> None:
        """Put what other machines have logged before what this one has added since.

        In place, because the launcher has the file open already.
        """
        theirs, path = self.remote.read(LOG), self.local.path(LOG)
        ours = path.read_bytes() if path.exists() else b""
        if ours.startswith(theirs):
            return
        both = zip(theirs.splitlines(True), ours.splitlines(True), strict=False)
        same = sum(len(line) for line, _ in itertools.takewhile(lambda two: two[0] == two[1], both))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "wb") as log:
            log.write(theirs + ours[same:])

    # --- checkpoints --------------------------------------------------------------------

    def archive(self, prefix: str) -> Archive:
        """The remote checkpoints of one stage."""
        return Archive(self.version, f"{self.prefix}/{prefix}")

    def elsewhere(self, checkpoints: Checkpoints) -> _Elsewhere:
        """The remote copies of local checkpoints."""
        return _Elsewhere(self, checkpoints)

    def bring_checkpoint(self, checkpoints: Checkpoints, step: int) -> None:
        """Make a remote checkpoint a local one; of several processes here one brings it."""
        with self._alone(f"{_FETCHED}-{step}"):
            if step in checkpoints.steps():
                return
            folder = self.local.root / f"{_FETCHED}-{step:06d}"
            _, manifest = self.archive(checkpoints.prefix).fetch(step, folder)
            checkpoints.adopt(step, folder, manifest)
            shutil.rmtree(folder)

    def bring_checkpoints(self, last: int = 0) -> None:
        """Bring the last checkpoints of every stage that are only in the store; 0 is all."""
        for prefix in newest_steps(self.stored_names()):
            here = Checkpoints(self.local, prefix, 0, lambda: None, lambda: "")
            for step in self.archive(prefix).steps()[-last:]:
                self.bring_checkpoint(here, step)

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        self.local.root.mkdir(parents=True, exist_ok=True)
        path = self.local.root / f"{what}.lock"
        with open(path, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        path.unlink(missing_ok=True)

    def steps(self, prefix: str) -> tuple[list[int], list[int]]:
        """Complete steps here and in the store."""
        here = Checkpoints(self.local, prefix, 0, lambda: None, lambda: "")
        return here.steps(), self.archive(prefix).steps()

    def prefixes(self) -> list[str]:
        """Folders of checkpoints here."""
        return sorted(newest_steps(set(self.local.names())))

    @contextlib.contextmanager
    def frozen_checkpoint(self, prefix: str, step: int) -> Iterator[tuple[Path, Manifest, bytes]]:
        """A hard-linked copy that rotation cannot take away while it is sent.

        Raises:
            NameMissing: rotation was faster.
            DamagedError: its bytes are not what its manifest promises.
        """
        checkpoints = Checkpoints(self.local, prefix, 0, lambda: None, lambda: "")
        folder = self.local.root / _SENDING
        shutil.rmtree(folder, ignore_errors=True)
        name = checkpoints.name(step)
        try:
            shutil.copytree(self.local.path(name), folder, copy_function=os.link)
        except (FileNotFoundError, shutil.Error) as error:
            raise NameMissing(f"{name} was rotated away") from error
        try:
            if not (folder / MANIFEST).exists():
                raise NameMissing(f"{name} was rotated away")
            data = (folder / MANIFEST).read_bytes()
            manifest = Manifest.from_json(data, where=name)
            for entry in manifest.files:
                verify_file(folder / entry.name, entry, name)
            yield folder, manifest, data
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def manifests(self) -> dict[str, Manifest]:
        """Every manifest of the version in the store; each is read once, for they never change."""
        names = {n for n in self.version.names("tasks") if _CHECKPOINTS.fullmatch(n)}
        wanted = {name for name in names if name.endswith(f"/{MANIFEST}")}
        for name in wanted - self._manifests.keys():
            with contextlib.suppress(NameMissing):
                self._manifests[name] = Manifest.from_json(self.version.read(name), where=name)
        for name in self._manifests.keys() - wanted:
            del self._manifests[name]
        return dict(self._manifests)

    # --- sending things there -----------------------------------------------------------

    def changes(self) -> Changes:
        """Files of this folder that the store does not have as they are now."""
        here = {
            name: _known(self.local.path(name)) for name in self.local.names() if _is_mirrored(name)
        }
        changed = {
            name: known
            for name, known in here.items()
            if name not in self._index or not known.is_like(self._index[name])
        }
        gone = {name for name in self._index if name not in here and _is_mirrored(name)}
        return Changes(changed, gone)

    def send(
        self,
        changes: Changes,
        lease: LegRecord,
        *,
        checkpoint: Batch | None = None,
        urgent: bool = False,
    ) -> None:
        """Bring the store up to `changes`, and commit a checkpoint with them; markers last.

        Raises:
            FencedError: another leg owns the task.
        """
        sent = dict(changes.changed)
        blobs: dict[str, Path] = {}
        writes: dict[str, bytes | Path] = {}
        last: dict[str, bytes | Path] = {}
        for name, known in changes.changed.items():
            path = self.local.path(name)
            if is_blob(self.version, known.size) and not _GROWING.fullmatch(name):
                sent[name] = replace(known, sha256=sha256_of(path))
                blobs[blob_name(sent[name].sha256)] = path
            else:
                # What grows is sent as it is at this moment.
                data = path.read_bytes() if _GROWING.fullmatch(name) else path
                (last if _DONE.fullmatch(name) else writes)[f"{self.prefix}/{name}"] = data
        index = {n: known for n, known in self._index.items() if n not in changes.gone} | sent
        entries = [
            FileEntry(name=name, size=known.size, sha256=known.sha256)
            for name, known in sorted(index.items())
            if known.sha256
        ]
        if blobs or any(self._index[name].sha256 for name in changes.gone):
            writes[f"{self.prefix}/{FILES}"] = FileList(files=entries).to_json()
        batch = checkpoint or Batch(message=f"{self.task}: records of leg {lease.number}")
        batch = replace(
            batch,
            blobs={**blobs, **batch.blobs},
            writes={**writes, **batch.writes},
            last=last,
            deletes=[*batch.deletes, *(f"{self.prefix}/{name}" for name in changes.gone)],
            urgent=urgent,
        )
        self.commit(batch, lease)
        self._index = index
        self.write_index()

    def commit(self, batch: Batch, lease: LegRecord) -> None:
        """Make a batch of changes as the leg that owns the task, and say that it lives.

        Raises:
            FencedError: another leg owns it.
        """
        writes = dict(batch.writes)
        progress = self.local.path(PROGRESS)
        if progress.exists():
            writes[f"{self.prefix}/{PROGRESS}"] = progress.read_bytes()
        self.version.commit(
            replace(
                batch,
                writes=writes,
                lease=(f"{self.prefix}/legs/{lease.number:03d}.json", lease.to_json()),
                check=lambda: self._check_owner(lease.number),
            )
        )

    def close_leg(self, record: LegRecord) -> None:
        """Store how a leg ended, with its last words."""
        log = self.local.path(LOG)
        writes = {f"{self.prefix}/{LOG}": log.read_bytes()} if log.exists() else {}
        self.commit(
            Batch(
                message=f"{self.task}: leg {record.number} {record.state}",
                writes=writes,
                urgent=True,
            ),
            record,
        )

    def _check_owner(self, number: int) -> None:
        legs = (_LEG.fullmatch(name) for name in self.remote.names("legs"))
        newest = max((int(found[1]) for found in legs if found), default=number)
        if newest > number:
            raise FencedError(
                f"{self.task}: leg {newest} has taken over from leg {number}; this one stops"
            )

    # --- what both sides are known to have ----------------------------------------------

    def write_index(self) -> None:
        """Note what both sides have; after a loss of it small files are sent again, no more."""
        values = {
            "durable": self.durable,
            "files": {name: list(astuple(known)) for name, known in sorted(self._index.items())},
        }
        self.local.write(INDEX, dump_json(values))

    def _read_index(self) -> None:
        try:
            values = json.loads(self.local.read(INDEX))
            self.durable = {str(k): int(v) for k, v in values["durable"].items()}
            self._index = {str(name): _Known(*row) for name, row in values["files"].items()}
        except (NameMissing, ValueError, KeyError, TypeError, AttributeError):
            self.durable, self._index = {}, {}

    def _note(self, listed: Collection[str]) -> None:
        """Believe the store, not the index, about what the store has."""
        stored = {*listed, *(entry for entry in self._remote_files(listed))}
        self._index = {name: known for name, known in self._index.items() if name in stored}
        self.durable = newest_steps(listed)

    def _remote_files(self, listed: Collection[str]) -> dict[str, FileEntry]:
        """The files that lie in the store under their content's name."""
        if FILES not in listed:
            return {}
        where = f"{self.remote.url}/{FILES}"
        entries = FileList.from_json(self.remote.read(FILES), where=where).files
        for entry in entries:
            if not is_name(entry.name) or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
                raise DamagedError(f"{where}: {entry.name!r} is no name inside a store")
        return {entry.name: entry for entry in entries}


@dataclass(frozen=True)
class _Elsewhere:
    """The remote copies of one stage's checkpoints, as `Checkpoints` asks for them."""

    mirror: Mirror
    checkpoints: Checkpoints

    def steps(self) -> list[int]:
        return self.mirror.archive(self.checkpoints.prefix).steps()

    def bring(self, step: int) -> None:
        self.mirror.bring_checkpoint(self.checkpoints, step)

    def set_aside(self, step: int, reason: str) -> None:
        self.mirror.archive(self.checkpoints.prefix).set_aside(step, reason)


def durable_step(folder: Path, prefix: str) -> int | None:
    """The newest step of a stage in the store that `folder` mirrors, as last seen from here."""
    try:
        values = json.loads((folder / INDEX).read_bytes())["durable"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    step = values.get(prefix)
    return None if step is None else int(step)


def is_mirror(folder: Path) -> bool:
    """Does this task's folder mirror one in a remote store?"""
    return (folder / INDEX).exists()


def _known(path: Path, sha256: str = "") -> _Known:
    found = path.stat()
    return _Known(found.st_size, found.st_mtime_ns, sha256)


def _is_mirrored(name: str) -> bool:
    """Files that are sent as they are; checkpoints, legs and heartbeats go their own ways."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    own_way = _CHECKPOINTS.fullmatch(name) or _LEG.fullmatch(name)
    aside = name in (PROGRESS, FILES, CANCELLED) or name.endswith(".part")
    return not (hidden or own_way or aside)
