"""Checkpoints in a store: committed by a manifest, verified on the way back, rotated by step."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from baton.errors import DamagedError, FencedError, NameMissing, NameTaken
from baton.record import FileEntry, Manifest, dump_json
from baton.store.base import Store, check_name, is_name
from baton.store.parallel import all_of, in_parallel

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SET_ASIDE = "set-aside.json"
_STEP = re.compile(r"step-(\d{6,})")
# Files that are read and hashed at once; hashing lets other threads run.
_HASHING = 4


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the last `keep_last`, every `keep_every_steps`, and the best."""

    keep_last: int
    keep_every_steps: int | None = None
    best: int | None = None

    def keeps(self, step: int) -> bool:
        """Does this step stay however old it is?"""
        every = self.keep_every_steps
        return step == self.best or (every is not None and step > 0 and step % every == 0)

    def dropped(self, steps: Sequence[int]) -> list[int]:
        """Of all steps, those to remove; never the newest."""
        ordered = sorted(steps)
        return [step for step in ordered[: -max(1, self.keep_last)] if not self.keeps(step)]


class Elsewhere(Protocol):
    """Another place that may hold the same checkpoints: the remote store behind a mirror."""

    def steps(self) -> Collection[int]:
        """Steps that are complete there."""
        ...

    def bring(self, step: int) -> None:
        """Make the checkpoint of `step` one of this place. Raises `DamagedError`."""
        ...

    def set_aside(self, step: int, reason: str) -> None:
        """Take a damaged checkpoint out of use there."""
        ...


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage of one task, below `prefix` in `store`.

    A checkpoint is complete when its manifest exists, and the manifest is written last. A
    kill at any moment therefore leaves the previous checkpoint intact and at most some files
    without a manifest, which the next save of that step replaces.
    """

    store: Store
    prefix: str
    leg: int
    check_fence: Callable[[], None]
    now: Callable[[], str]
    notice: str = ""
    elsewhere: Elsewhere | None = None

    def name(self, step: int, file: str = "") -> str:
        return f"{self.prefix}/step-{step:06d}" + (f"/{file}" if file else "")

    def steps(self) -> list[int]:
        """Steps with a manifest, oldest first; order comes from the step, never from mtime."""
        return sorted(step for step, files in self._files().items() if MANIFEST in files)

    def save(self, step: int, folder: Path) -> Manifest:
        """Commit every file below `folder` as the checkpoint of `step`.

        `folder` must lie on the store's file system to be linked instead of copied; its files
        must not change afterwards. Saving a step that is already complete returns the manifest
        there is: a resumed run reaches the same step with the same state.

        Raises:
            FencedError: a newer leg owns the task.
            StoreError: the store refused; earlier checkpoints are intact.
        """
        self.check_fence()
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = in_parallel(
            lambda path: _entry(path, path.relative_to(folder).as_posix()), paths, workers=_HASHING
        )
        files = list(entries)
        manifest = Manifest(
            notice=self.notice, step=step, leg=self.leg, created=self.now(), files=files
        )
        if step in self.steps():
            return self.manifest(step)
        self._forget(step)
        for path, entry in zip(paths, files, strict=True):
            self._upload(path, self.name(step, entry.name))
        self.check_fence()
        try:
            self.store.write(self.name(step, MANIFEST), manifest.to_json(), exclusive=True)
        except NameTaken:
            raise FencedError(
                f"step {step} was just saved by another leg; this one stops"
            ) from None
        return manifest

    def adopt(self, step: int, folder: Path, manifest: bytes) -> None:
        """Commit a checkpoint that was brought here and verified, with the manifest it has.

        Raises:
            FencedError: a newer leg owns the task.
        """
        if step in self.steps():
            return
        self._forget(step)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self._upload(path, self.name(step, path.relative_to(folder).as_posix()))
        self.check_fence()
        with contextlib.suppress(NameTaken):
            self.store.write(self.name(step, MANIFEST), manifest, exclusive=True)

    def _upload(self, path: Path, name: str) -> None:
        try:
            self.store.upload(path, name)
        except NameTaken:
            # Half of an older leg's save landed after we cleared the step: ours wins, unless
            # it is we who are the older leg.
            self.check_fence()
            self.store.delete(name)
            self.store.upload(path, name)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a complete checkpoint. Raises `DamagedError` if it cannot be read."""
        name = self.name(step, MANIFEST)
        try:
            manifest = Manifest.from_json(self.store.read(name), where=name)
        except NameMissing as error:
            raise DamagedError(f"step-{step:06d}: the manifest is gone") from error
        if manifest.step != step:
            raise DamagedError(f"step-{step:06d}: its manifest is of step {manifest.step}")
        for entry in manifest.files:
            if not is_name(entry.name):
                raise DamagedError(f"step-{step:06d}: {entry.name!r} is no name inside a store")
        return manifest

    def fetch(self, step: int, target: Path) -> Manifest:
        """Copy a checkpoint to the folder `target` and verify every byte of it.

        Raises:
            DamagedError: a file is missing, or its size or SHA-256 is not the manifest's.
        """
        manifest = self.manifest(step)
        shutil.rmtree(target, ignore_errors=True)
        for entry in manifest.files:
            try:
                self.store.download(self.name(step, entry.name), target / entry.name)
            except NameMissing:
                raise DamagedError(f"step-{step:06d}: {entry.name} is missing") from None

        def check(entry: FileEntry) -> None:
            verify_file(target / entry.name, entry, f"step-{step:06d}")

        all_of(check, manifest.files, workers=_HASHING)
        return manifest

    def everywhere(self) -> list[int]:
        """Steps that are complete here or elsewhere, oldest first."""
        other = self.elsewhere.steps() if self.elsewhere else ()
        return sorted({*self.steps(), *other})

    def fetch_anywhere(self, step: int, target: Path) -> Manifest:
        """As `fetch`, from here if it is whole here, else from elsewhere; what is not is said.

        Raises:
            DamagedError: it is whole nowhere.
        """
        if step in self.steps():
            try:
                return self.fetch(step, target)
            except DamagedError as error:
                self._set_aside(step, str(error))
                if self.elsewhere is None or step not in self.elsewhere.steps():
                    raise
                log.warning("%s; using the copy in the store instead", error)
        if self.elsewhere is None:
            raise DamagedError(f"step-{step:06d}: the manifest is gone")
        try:
            self.elsewhere.bring(step)
        except DamagedError as error:
            self.elsewhere.set_aside(step, str(error))
            raise
        return self.fetch(step, target)

    def fetch_newest_verified(self, target: Path) -> Manifest | None:
        """Fetch the newest checkpoint that is whole; damaged ones are set aside and said.

        Returns None when there is none: the run then starts at step 0.
        """
        steps = self.everywhere()
        while steps:
            step = steps.pop()
            try:
                return self.fetch_anywhere(step, target)
            except DamagedError as error:
                instead = f"using step-{steps[-1]:06d} instead" if steps else "starting from step 0"
                log.warning("%s; %s", error, instead)
        return None

    def prune(self, retention: Retention) -> None:
        """Remove what `retention` lets go.

        The newest is never removed. The manifest goes first, so a kill half-way leaves an
        incomplete checkpoint, not a damaged one.
        """
        files = self._files()
        steps = sorted(step for step in files if MANIFEST in files[step])
        for step in retention.dropped(steps):
            self._forget(step)
        for step in files:
            if SET_ASIDE in files[step] and steps and step < steps[-1]:
                self._forget(step)

    def sweep(self) -> None:
        """Remove what kills left behind: files of a step that never got its manifest.

        Damaged checkpoints stay where they were set aside, for a person to look at, until a
        newer save takes their step or `prune` passes them.
        """
        files = self._files()
        for step, names in files.items():
            if MANIFEST not in names and SET_ASIDE not in names:
                self._forget(step)

    def _files(self) -> dict[int, set[str]]:
        files: dict[int, set[str]] = {}
        for name in self.store.names(self.prefix):
            folder, _, file = name.removeprefix(f"{self.prefix}/").partition("/")
            if found := _STEP.fullmatch(folder):
                files.setdefault(int(found[1]), set()).add(file)
        return files

    def _forget(self, step: int) -> None:
        names = sorted(self.store.names(self.name(step)), key=lambda n: not n.endswith(MANIFEST))
        for name in names:
            self.store.delete(name)

    def _set_aside(self, step: int, reason: str) -> None:
        self.store.write(self.name(step, SET_ASIDE), dump_json({"reason": reason}))
        self.store.delete(self.name(step, MANIFEST))


def _entry(path: Path, name: str) -> FileEntry:
    return FileEntry(name=check_name(name), size=path.stat().st_size, sha256=sha256_of(path))


def verify_file(path: Path, entry: FileEntry, checkpoint: str) -> None:
    """Raise `DamagedError` unless a file is what a manifest promises."""
    if not path.exists():
        raise DamagedError(f"{checkpoint}: {entry.name} is missing")
    size = path.stat().st_size
    if size != entry.size:
        raise DamagedError(
            f"{checkpoint}: {entry.name} is {size:,} bytes, manifest says {entry.size:,}"
        )
    if sha256_of(path) != entry.sha256:
        raise DamagedError(f"{checkpoint}: the bytes of {entry.name} are not what was saved")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
