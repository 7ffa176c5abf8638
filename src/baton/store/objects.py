"""A store in a flat space of objects, as a bucket is: what every kind of bucket has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

from baton.errors import DamagedError, NameMissing, NameTaken
from baton.store.base import Batch, Listed, Wanted, check_name, writing
from baton.store.parallel import all_of
from baton.store.partial import PART_BYTES, fetch_in_parts

# Keys below it are ours alone and are never listed.
HIDDEN = ".baton/"


class Bucket(Protocol):
    """Requests to one bucket, each repeated a bounded number of times.

    All raise `StoreError` with words for people. `what` is how messages call an object.
    """

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys and sizes, a page in memory at a time."""
        ...

    def size(self, key: str) -> int | None:
        """How many bytes it has; None if there is no such object."""
        ...

    def get(self, key: str, what: str) -> bytes:
        """A whole object as it was saved. Raises `NameMissing`, `DamagedError`."""
        ...

    def get_range(self, key: str, start: int, length: int, what: str) -> bytes:
        """Some bytes of an object."""
        ...

    def download(self, key: str, what: str, target: Path) -> None:
        """Bring an object of which nothing is known. Raises `NameMissing`, `DamagedError`."""
        ...

    def put(self, items: Mapping[str, bytes | Path], *, sha256: str = "") -> None:
        """Write objects, in any order; `sha256` is that of a single file where it is known."""
        ...

    def create(self, key: str, data: bytes | Path) -> None:
        """Write an object that is not there yet. Raises `NameTaken`."""
        ...

    def renew(self, key: str, data: bytes, what: str) -> None:
        """Replace what this process last wrote. Raises `FencedError` if somebody else has since."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there, too."""
        ...


class ObjectStore:
    """Names are keys below `prefix`; large files are kept once, by content."""

    shares_content = False
    publishes = False
    heartbeat_seconds: float
    lost_after_seconds: float

    def __init__(self, bucket: Bucket, url: str, prefix: str = "") -> None:
        self._bucket = bucket
        # The bucket's own URL.
        self._where = url
        self._prefix = f"{prefix}/" if prefix else ""

    @property
    def url(self) -> str:
        return f"{self._where}/{self._prefix}".rstrip("/")

    def below(self, prefix: str) -> Self:
        return type(self)(self._bucket, self._where, self._prefix + check_name(prefix))

    def task_finished(self, card: str) -> None:
        """Nothing to do: nobody loads models from here."""

    def wait_seconds(self) -> float:
        return 0.0

    # --- the six methods ----------------------------------------------------------------

    def read(self, name: str) -> bytes:
        return self._bucket.get(self._key(name), self._what(name))

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        key = self._key(name)
        if exclusive:
            self._bucket.create(key, data)
        else:
            self._bucket.put({key: data})

    def upload(self, source: Path, name: str) -> None:
        key = self._key(name)
        if self._bucket.size(key) is not None:
            raise NameTaken(f"{self._what(name)} is already stored")
        self._bucket.create(key, source)

    def download(self, name: str, target: Path) -> None:
        with writing(target):
            self._bucket.download(self._key(name), self._what(name), target)

    def names(self, prefix: str = "") -> Iterator[str]:
        return (listed.name for listed in self.listing(prefix))

    def delete(self, name: str) -> None:
        self._bucket.delete([self._key(name)])

    # --- what a remote store can do besides ----------------------------------------------

    def listing(self, prefix: str = "") -> Iterator[Listed]:
        folder = self._prefix + (f"{check_name(prefix)}/" if prefix else "")
        hidden = f"{self._prefix}{HIDDEN}"
        for key, size in self._bucket.keys(folder):
            # Others may keep what they like in a bucket, such as "folders" of no bytes.
            if not key.startswith(hidden) and not key.endswith("/"):
                yield Listed(key.removeprefix(self._prefix), size)

    def commit(self, batch: Batch) -> None:
        reused: list[tuple[str, Path]] = []
        # One file at a time: the parts of each are sent in parallel.
        for name, path in batch.blobs.items():
            if self._bucket.size(self._key(name)) == path.stat().st_size:
                reused.append((name, path))
            else:
                # Its name says what it holds, and it was looked at right before.
                self._bucket.put({self._key(name): path}, sha256=name.rpartition("/")[2])
        # The lease first: a leg that has lost it must replace nothing.
        if batch.lease is not None:
            name, data = batch.lease
            self._bucket.renew(self._key(name), data, self._what(name))
        batch.check()
        if batch.writes:
            self._bucket.put({self._key(name): data for name, data in batch.writes.items()})
        batch.check()
        if batch.marker is not None:
            self.write(*batch.marker, exclusive=True)
            for name, path in reused:
                # Whoever tidied up at that moment did not see our marker yet.
                if self._bucket.size(self._key(name)) is None:
                    self._bucket.put({self._key(name): path})
        for name, item in batch.last.items():
            self._bucket.put({self._key(name): item})
        if batch.deletes:
            self._bucket.delete([self._key(name) for name in batch.deletes])

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        small = [file for file in wanted if file.size <= PART_BYTES]
        all_of(self._fetch, small)
        for file in wanted:
            if file.size > PART_BYTES:
                self._fetch(file)

    def _fetch(self, file: Wanted) -> None:
        key, what = self._key(file.name), self._what(file.name)
        size = self._bucket.size(key)
        if size is None:
            raise NameMissing(f"{what}: nothing is stored there")
        if size != file.size:
            raise DamagedError(f"{what} is {size:,} bytes, manifest says {file.size:,}")
        with writing(file.target):
            fetch_in_parts(
                file.target,
                size=size,
                sha256=file.sha256,
                what=what,
                read=lambda start, length: self._bucket.get_range(key, start, length, what),
            )

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _what(self, name: str) -> str:
        return f"{self.url}: {name}"
