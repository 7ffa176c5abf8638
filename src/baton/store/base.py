"""What every store can do, and which names it may hold."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from baton.errors import StoreError

# What every file system, S3 and the Hub accept alike; control characters and backslashes
# in a name are how a name from a store would leave its folder or a terminal its line.
_PART = re.compile(r"[^\x00-\x1f\x7f\\/:]{1,200}")


def is_name(name: str) -> bool:
    """Is this a plain relative path? Names come from stores, so trust none."""
    parts = name.split("/")
    return all(part not in (".", "..") and _PART.fullmatch(part) for part in parts)


def check_name(name: str) -> str:
    """Return `name` if it is one.

    Raises:
        StoreError: the name is absolute, leaves its folder, or has a character no store takes.
    """
    if not is_name(name):
        raise StoreError(f"{name!r} is not a name inside a store: use plain relative paths")
    return name


class Store(Protocol):
    """Six methods over names such as `tasks/lora_20k/legs/001.json`.

    A name exists only once its bytes are complete and on disk: a kill at any moment leaves
    either the whole or nothing. All methods raise `StoreError` when the far end fails.
    """

    @property
    def url(self) -> str:
        """What to give to `--store` to open this place again."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes under `name`. Raises `NameMissing`."""
        ...

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """Put a small object; replaces an older one unless `exclusive` (then `NameTaken`)."""
        ...

    def upload(self, source: Path, name: str) -> None:
        """Put a finished file that nobody will change again. Raises `NameTaken`."""
        ...

    def download(self, name: str, target: Path) -> None:
        """Copy `name` to the path `target`, which appears only when complete."""
        ...

    def names(self, prefix: str = "") -> Iterator[str]:
        """Every name below the folder `prefix`, in any order, leaving out unfinished writes."""
        ...

    def delete(self, name: str) -> None:
        """Forget `name`; nothing happens if it is not there."""
        ...


def _nothing() -> None:
    """No fence: the default of `Batch.check`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Changes to a remote store that belong together.

    Readers see `marker` only when everything else is there, and `deletes` happen after it.

    Attributes:
        message: what it is, for people who read the store's history.
        blobs: files named by their content; one that is there is not sent again.
        writes: files and small objects that replace what is there.
        lease: the object that says who owns the task, with its new bytes. If somebody else has
            replaced it since this process wrote it, that is a `FencedError`.
        check: called before anything is replaced and before the marker; what it raises stops
            the batch.
        marker: name and bytes of an exclusive write (`NameTaken`).
        last: as `writes`, one after the other, each promising that all before it is there.
        urgent: the process is about to end; do not save requests up.
    """

    message: str
    blobs: Mapping[str, Path] = field(default_factory=dict)
    writes: Mapping[str, bytes | Path] = field(default_factory=dict)
    lease: tuple[str, bytes] | None = None
    marker: tuple[str, bytes] | None = None
    last: Mapping[str, bytes | Path] = field(default_factory=dict)
    deletes: Collection[str] = ()
    check: Callable[[], None] = _nothing
    urgent: bool = False


@dataclass(frozen=True)
class Listed:
    """A name in a store and the size of its bytes."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file to bring here from a store: what it must be, and where it goes."""

    name: str
    size: int
    sha256: str
    target: Path


class Remote(Store, Protocol):
    """A store behind a network: training never waits for it, a mirror of it is kept here.

    Attributes:
        shares_content: the store itself keeps equal files once, whatever their names.
        publishes: people load models from here, so final weights get a folder and a card.
        heartbeat_seconds: how often a leg at work can afford to say so.
        lost_after_seconds: a leg that has said nothing for so long counts as lost.
    """

    shares_content: bool
    publishes: bool
    heartbeat_seconds: float
    lost_after_seconds: float

    def below(self, prefix: str) -> Self:
        """The part of this store whose names start with the folder `prefix`."""
        ...

    def listing(self, prefix: str = "") -> Iterator[Listed]:
        """As `names`, with sizes."""
        ...

    def commit(self, batch: Batch) -> None:
        """Make a batch of changes.

        Raises:
            NameTaken: the marker is there already.
            FencedError: the lease is somebody else's by now.
        """
        ...

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Bring files here, several at once; what an earlier try left is gone on from.

        Raises:
            NameMissing: a name is not there.
            DamagedError: the bytes that are there are not those that were promised.
        """
        ...

    def task_finished(self, card: str) -> None:
        """Told once a task is finished and stored; `card` is empty or its model card."""
        ...

    def wait_seconds(self) -> float:
        """How long an ordinary batch should wait, so that urgent ones are never refused."""
        ...


def explained(error: OSError, doing: str) -> StoreError:
    """What the operating system's refusal means for the person whose disk it is."""
    advice = {
        errno.ENOSPC: "the disk is full; free some space, what was stored before is intact",
        errno.EDQUOT: "the quota is used up; free some space, what was stored before is intact",
        errno.EFBIG: "a file would be larger than `ulimit -f` allows; what was stored is intact",
        errno.EROFS: "the file system is read-only; choose another place with --store",
        errno.EACCES: "permission denied; choose another place with --store or mend its owner",
    }.get(error.errno or 0, os.strerror(error.errno or 0))
    return StoreError(f"{doing}: {advice}")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """While a file is written here: what the system refuses becomes a `StoreError` with advice."""
    try:
        yield
    except OSError as error:
        raise explained(error, f"writing {target}") from error
