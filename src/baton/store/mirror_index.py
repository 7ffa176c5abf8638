"""What a folder and the remote store that it mirrors are both known to have."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Self

from baton.errors import NameMissing
from baton.record import FileEntry, dump_json
from baton.store.local import LocalStore
from baton.store.task_names import DONE, is_mirrored

_FILE = ".mirror.json"


@dataclass(frozen=True)
class Known:
    """A file as it was when it was last the same on both sides; a large one with its content."""

    size: int
    mtime_ns: int
    sha256: str = ""

    @classmethod
    def of(cls, path: Path, sha256: str = "") -> Self:
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, sha256)

    def is_like(self, other: Known) -> bool:
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


@dataclass(frozen=True)
class Changes:
    """What differs between a folder and its store: files to send, and names to delete there."""

    changed: Mapping[str, Known]
    gone: Collection[str]

    @property
    def is_empty(self) -> bool:
        return not (self.changed or self.gone)

    def with_markers_of(self, stages: Sequence[str]) -> Changes:
        """All, but of markers those of these stages alone, in their order."""
        changed = {n: known for n, known in self.changed.items() if not DONE.fullmatch(n)}
        markers = (f"{stage}/done.json" for stage in stages)
        changed |= {n: self.changed[n] for n in markers if n in self.changed}
        return Changes(changed, self.gone)

    def finished_stages(self) -> list[str]:
        """Stages whose marker the store does not have yet."""
        return [found[1] for name in self.changed if (found := DONE.fullmatch(name))]


@dataclass
class Index:
    """Kept beside the files; after a loss of it small files are sent again, no more.

    Attributes:
        durable: the newest step of each folder of checkpoints that the store has.
        files: what else both sides have.
        leg: the newest leg that the store knew of then; 0 before there was one.
    """

    local: LocalStore
    durable: dict[str, int] = field(default_factory=dict)
    files: dict[str, Known] = field(default_factory=dict)
    leg: int = 0

    @classmethod
    def read(cls, local: LocalStore) -> Self:
        try:
            values = json.loads(local.read(_FILE))
            durable = {str(prefix): int(step) for prefix, step in values["durable"].items()}
            files = {str(name): Known(*row) for name, row in values["files"].items()}
            leg = int(values["leg"])
        except (NameMissing, ValueError, KeyError, TypeError, AttributeError):
            return cls(local)
        return cls(local, durable, files, leg)

    def write(self) -> None:
        values = {
            "durable": self.durable,
            "files": {name: list(astuple(known)) for name, known in sorted(self.files.items())},
            "leg": self.leg,
        }
        self.local.write(_FILE, dump_json(values))

    def changes(self) -> Changes:
        """Files of the folder that the store does not have as they are now."""
        here = {
            name: Known.of(self.local.path(name))
            for name in self.local.names()
            if is_mirrored(name)
        }
        changed = {
            name: known
            for name, known in here.items()
            if name not in self.files or not known.is_like(self.files[name])
        }
        gone = {name for name in self.files if name not in here and is_mirrored(name)}
        return Changes(changed, gone)

    def after(self, changes: Changes, sent: Mapping[str, Known]) -> dict[str, Known]:
        """What both sides have once these changes are made."""
        return {n: known for n, known in self.files.items() if n not in changes.gone} | dict(sent)

    def forget_all_but(self, stored: Collection[str]) -> None:
        """Believe the store, not the index, about what the store has."""
        self.files = {name: known for name, known in self.files.items() if name in stored}

    def forget_what_may_differ(self, large: Mapping[str, FileEntry]) -> None:
        """Another machine has written since: of `large` files alone the store tells the content."""
        self.files = {
            name: known
            for name, known in self.files.items()
            if name in large and known.sha256 == large[name].sha256
        }


def entries_of(files: Mapping[str, Known]) -> list[FileEntry]:
    """Those that lie in the store under their content's name."""
    return [
        FileEntry(name=name, size=known.size, sha256=known.sha256)
        for name, known in sorted(files.items())
        if known.sha256
    ]


def durable_step(folder: Path, prefix: str) -> int | None:
    """The newest step of a stage in the store that `folder` mirrors, as last seen from here."""
    return Index.read(LocalStore(folder)).durable.get(prefix)


def is_mirror(folder: Path) -> bool:
    """Does this task's folder mirror one in a remote store?"""
    return (folder / _FILE).exists()
