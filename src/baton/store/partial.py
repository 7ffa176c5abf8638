"""A file that arrives in parts, and goes on where a killed process stopped."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from baton.errors import DamagedError
from baton.store.parallel import in_parallel

PART_BYTES = 8 * 2**20
# How often something that arrives other than it was saved is asked for: a byte may change on the
# way, several times in a row behind a bad device; what lies damaged in the store stays so.
TRIES = 4
_READ_BYTES = 2**20


def fetch_in_parts(
    target: Path,
    *,
    size: int,
    sha256: str,
    what: str,
    read: Callable[[int, int], bytes],
    part_bytes: int = PART_BYTES,
) -> None:
    """Fill `target` with `read(start, length)` of every part, several parts at once.

    Bytes go to `<target>.part`; which parts are there is noted in `<target>.part.done`, so the
    next process goes on. The file gets its name when its SHA-256 is right (an empty `sha256`
    is not compared).

    Raises:
        DamagedError: the bytes are not those, `TRIES` times in a row.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    notes = _Notes(target, f"{size} {sha256} {part_bytes}")
    for attempt in range(1, TRIES + 1):
        found = _fill(notes, size, part_bytes, read)
        if not sha256 or found == sha256:
            with open(notes.file, "rb") as file:
                os.fsync(file.fileno())
            os.replace(notes.file, target)
            notes.forget()
            return
        # Changed on the way, or left by a machine that lost power: again.
        notes.forget()
        if attempt == TRIES:
            raise DamagedError(
                f"{what}: the bytes that arrive are not what was saved"
                f" (SHA-256 {found[:12]}…, expected {sha256[:12]}…)"
            )


def _fill(notes: _Notes, size: int, part_bytes: int, read: Callable[[int, int], bytes]) -> str:
    """Bring what is missing; returns the SHA-256 of all, taken while later parts arrive."""
    digest = hashlib.sha256()
    with _Parts(notes, size) as parts:

        def bring(start: int) -> int:
            if start not in parts.done:
                parts.put(start, read(start, min(part_bytes, size - start)))
            return start

        for start in in_parallel(bring, range(0, size, part_bytes)):
            end = min(start + part_bytes, size)
            for place in range(start, end, _READ_BYTES):
                digest.update(os.pread(parts.descriptor, min(_READ_BYTES, end - place), place))
            # Linux begins to write these bytes to disk now, so that fsync at the end finds few.
            os.posix_fadvise(parts.descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


class _Parts:
    """A file that several threads fill, and what of it was there before (`done`).

    When one part fails, the others' threads are not waited for: whatever they still receive
    after the file was closed is dropped, for its descriptor may by then be another file's.
    """

    def __init__(self, notes: _Notes, size: int) -> None:
        self.done = notes.begin()
        self.descriptor = os.open(notes.file, os.O_RDWR | os.O_CREAT, 0o644)
        os.truncate(self.descriptor, size)
        self._notes = notes
        self._is_closed, self._writers = False, 0
        self._change = threading.Condition()

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._is_closed = True
            self._change.wait_for(lambda: self._writers == 0)
        os.close(self.descriptor)

    def put(self, start: int, content: bytes) -> None:
        """Write a part in its place, then note that it is there."""
        with self._change:
            if self._is_closed:
                return
            self._writers += 1
        try:
            data, place = memoryview(content), start
            while data:
                written = os.pwrite(self.descriptor, data, place)
                data, place = data[written:], place + written
            self._notes.add(start)
        finally:
            with self._change:
                self._writers -= 1
                self._change.notify_all()


class _Notes:
    """Which parts of a file have arrived, beside the file."""

    def __init__(self, target: Path, identity: str) -> None:
        self.file = target.with_name(f"{target.name}.part")
        self.list = target.with_name(f"{target.name}.part.done")
        self.identity = identity

    def begin(self) -> set[int]:
        """Starts of the parts that an earlier process brought of this very file."""
        lines = self.list.read_text().splitlines(keepends=True) if self.list.exists() else []
        if self.file.exists() and lines and lines[0].strip() == self.identity:
            # A kill may have cut the last line off.
            return {int(line) for line in lines[1:] if line.endswith("\n")}
        self.forget()
        self.list.write_text(f"{self.identity}\n")
        return set()

    def add(self, start: int) -> None:
        # One write to a file opened for appending: lines of several threads do not mix.
        with open(self.list, "ab", buffering=0) as notes:
            notes.write(b"%d\n" % start)

    def forget(self) -> None:
        for path in (self.file, self.list):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
