"""A store in a folder: write beside, fsync, then give it its name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from baton.errors import NameMissing, NameTaken
from baton.store.base import Batch, Listed, Wanted, check_name, explained, writing

# Unfinished writes live here, on the same file system as what they will become.
INCOMING = ".incoming"
_STALE_SECONDS = 3600.0


class LocalStore:
    """A folder. Safe for several processes at once on a POSIX file system.

    It can do what remote stores do, so that one can be copied to and from.
    """

    # A file is a file: every name has its own.
    shares_content = True
    publishes = False
    heartbeat_seconds = 10.0
    lost_after_seconds = 90.0

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        """Where `name` lies on disk, whether or not it exists."""
        return self.root / check_name(name)

    def read(self, name: str) -> bytes:
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            raise NameMissing(f"{self.root}: nothing is stored under {name}") from None
        except OSError as error:
            raise explained(error, f"reading {self.root / name}") from error

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        target = self.path(name)
        with writing(target), self._incoming() as beside:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _give_name(beside, target, exclusive=exclusive)

    def upload(self, source: Path, name: str) -> None:
        target = self.path(name)
        with writing(target), self._incoming() as beside:
            _link_or_copy(source, beside)
            _give_name(beside, target, exclusive=True)

    def download(self, name: str, target: Path) -> None:
        """As promised by `Store`; on one file system the target is a hard link: only read it."""
        source = self.path(name)
        beside = target.with_name(f"{target.name}.part")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            try:
                _link_or_copy(source, beside)
            except FileNotFoundError:
                raise NameMissing(f"{self.root}: nothing is stored under {name}") from None
            _give_name(beside, target, exclusive=False)

    def names(self, prefix: str = "") -> Iterator[str]:
        top = self.path(prefix) if prefix else self.root
        for folder, folders, files in os.walk(top):
            folders[:] = sorted(f for f in folders if f != INCOMING)
            for file in sorted(files):
                yield Path(folder, file).relative_to(self.root).as_posix()

    def delete(self, name: str) -> None:
        target = self.path(name)
        with writing(target):
            target.unlink(missing_ok=True)
        # Empty folders would clutter `ls`; another process may be filling one, so only try.
        folder = target.parent
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:
                break
            folder = folder.parent

    def below(self, prefix: str) -> Self:
        return type(self)(self.path(prefix))

    def listing(self, prefix: str = "") -> Iterator[Listed]:
        for name in self.names(prefix):
            with contextlib.suppress(FileNotFoundError):
                yield Listed(name, (self.root / name).stat().st_size)

    def commit(self, batch: Batch) -> None:
        for name, source in batch.blobs.items():
            with contextlib.suppress(NameTaken):
                self.upload(source, name)
        batch.check()
        if batch.lease is not None:
            self.write(*batch.lease)
        for name, data in batch.writes.items():
            self._put(name, data)
        batch.check()
        if batch.marker is not None:
            self.write(*batch.marker, exclusive=True)
        for name, data in batch.last.items():
            self._put(name, data)
        for name in batch.deletes:
            self.delete(name)

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        for file in wanted:
            self.download(file.name, file.target)

    def task_finished(self, card: str) -> None:
        """Nothing to do: nobody loads models from here."""

    def wait_seconds(self) -> float:
        return 0.0

    def _put(self, name: str, data: bytes | Path) -> None:
        if isinstance(data, Path):
            self.delete(name)
            self.upload(data, name)
        else:
            self.write(name, data)

    def sweep(self) -> None:
        """Remove unfinished writes that killed processes left an hour ago or earlier.

        By age, because in containers every process has the same number.
        """
        for path in self.root.glob(f"{INCOMING}/*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_ctime > _STALE_SECONDS:
                    path.unlink()

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Path]:
        folder = self.root / INCOMING
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / os.urandom(8).hex()
        try:
            yield beside
        finally:
            beside.unlink(missing_ok=True)


def _link_or_copy(source: Path, beside: Path) -> None:
    try:
        os.link(source, beside)
    except OSError as error:
        # Another file system, or one without hard links.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, beside)
    with open(beside, "rb") as file:
        os.fsync(file.fileno())


def _give_name(beside: Path, target: Path, *, exclusive: bool) -> None:
    while True:
        _make_folder(target.parent)
        try:
            if exclusive:
                os.link(beside, target)
            else:
                os.replace(beside, target)
        except FileExistsError:
            raise NameTaken(f"{target} is already stored") from None
        except FileNotFoundError:
            # delete() of a neighbour removed the empty folder in between.
            if beside.exists():
                continue
            raise
        break
    _sync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    """`mkdir -p` beside a process that removes emptied folders."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            # It vanished between mkdir's attempt and its look, unless something is in the way.
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise
        except FileNotFoundError:
            continue  # a folder above it vanished
        else:
            return


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
