"""What every store can do, and which names it may hold."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

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
