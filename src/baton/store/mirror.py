"""A task's folder on this machine, and the same task in a remote store."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from baton.errors import DamagedError, FencedError, NameMissing
from baton.record import FileEntry, FileList, LegRecord, Manifest
from baton.store.archive import Archive, blob_name, is_blob
from baton.store.base import Batch, Remote, Wanted, is_name
from baton.store.checkpoint import MANIFEST, Checkpoints, sha256_of, verify_file
from baton.store.local import LocalStore
from baton.store.mirror_index import Changes, Index, Known, entries_of
from baton.store.parallel import all_of
from baton.store.task_names import (
    CHECKPOINT_FILE,
    COMPILED,
    DONE,
    FILES,
    GROWING,
    LEG,
    LOG,
    PROGRESS,
    is_mirrored,
    newest_leg,
    newest_steps,
    position_of,
)

log = logging.getLogger(__name__)

_LOCK, _FETCHED, _SENDING = ".mirror.lock", ".fetched", ".sending"


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
        self.index = Index.read(local)
        self._manifests: dict[str, Manifest] = {}

    # --- bringing things here -----------------------------------------------------------

    def pull(self, stages: Sequence[str], *, leg: int = 0, with_blobs: bool = True) -> None:
        """Bring what the store has and this folder lacks; checkpoints come when asked for.

        Of two histories the one whose position is further on wins; legs and the log are
        joined. Stage markers come last, so that what they promise is here. `leg` is who pulls,
        if a leg does.
        """
        listed = {item.name: item.size for item in self.remote.listing()}
        self._pull_legs(listed)
        here = set(self.local.names())
        files = self._remote_files(listed)
        newest = newest_leg(name for name in listed if name != f"legs/{leg:03d}.json")
        if newest != self.index.leg:
            self.index.forget_what_may_differ(files)
            self.index.leg = newest
        # The log is joined further down: a launcher here may have it open.
        plain = [name for name in listed if is_mirrored(name) and name != LOG]
        wanted = list(files.values())
        if position_of(here, stages) >= position_of(listed, stages):
            plain = []
            wanted = [entry for entry in wanted if entry.name not in here]
        if not with_blobs:
            wanted = [entry for entry in wanted if entry.name.endswith(".json")]
        self._bring_blobs([e for e in wanted if not e.name.startswith(COMPILED)])
        self._bring_compiled([e for e in wanted if e.name.startswith(COMPILED)])
        markers = [name for name in plain if DONE.fullmatch(name)]
        all_of(self._bring, sorted({*plain} - {*markers}))
        for name in markers:
            self._bring(name)
        if LOG in listed:
            self._join_log()
        if PROGRESS in listed and PROGRESS not in here:
            self._bring(PROGRESS)
        self.index.forget_all_but({*listed, *self._remote_files(listed)})
        self.index.durable = newest_steps(listed)
        self.index.write()

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
        def is_known(name: str) -> bool:
            """A leg that has ended does not change."""
            path = self.local.path(name)
            return path.exists() and json.loads(path.read_bytes()).get("state") != "active"

        all_of(self._bring, [n for n in listed if LEG.fullmatch(n) and not is_known(n)])

    def _bring(self, name: str) -> None:
        self.local.write(name, self.remote.read(name))
        self.index.files[name] = Known.of(self.local.path(name))

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
            self.index.files[entry.name] = Known.of(self.local.path(entry.name), entry.sha256)
        shutil.rmtree(folder, ignore_errors=True)

    def _bring_compiled(self, entries: Sequence[FileEntry]) -> None:
        """Fetch what earlier legs compiled; a leg can do without."""
        try:
            self._bring_blobs(entries)
        except (DamagedError, NameMissing) as error:
            log.warning("compiled code of earlier legs is not used, compiling anew: %s", error)

    def _is_same(self, entry: FileEntry) -> bool:
        """Is this file here, as far as size and the last look at it tell?"""
        path = self.local.path(entry.name)
        if not path.exists() or path.stat().st_size != entry.size:
            return False
        is_known = self.index.files.get(entry.name) == Known.of(path, entry.sha256)
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
        names = {n for n in self.version.names("tasks") if CHECKPOINT_FILE.fullmatch(n)}
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
        return self.index.changes()

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
            if is_blob(self.version, known.size) and not GROWING.fullmatch(name):
                sent[name] = replace(known, sha256=sha256_of(path))
                blobs[blob_name(sent[name].sha256)] = path
            else:
                # What grows is sent as it is at this moment.
                data = path.read_bytes() if GROWING.fullmatch(name) else path
                (last if DONE.fullmatch(name) else writes)[f"{self.prefix}/{name}"] = data
        files = self.index.after(changes, sent)
        if blobs or any(self.index.files[name].sha256 for name in changes.gone):
            writes[f"{self.prefix}/{FILES}"] = FileList(files=entries_of(files)).to_json()
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
        self.index.files = files
        self.index.leg = lease.number
        self.index.write()

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
        newest = newest_leg(self.remote.names("legs"))
        if newest > number:
            raise FencedError(
                f"{self.task}: leg {newest} has taken over from leg {number}; this one stops"
            )

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
