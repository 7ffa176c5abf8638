"""A store in a bucket of any server that speaks S3: AWS, MinIO, Ceph, R2 and others."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from baton.errors import ConfigError, DamagedError, FencedError, NameMissing, NameTaken
from baton.store.base import Batch, Listed, Wanted, check_name, explained
from baton.store.parallel import all_of
from baton.store.partial import PART_BYTES, TRIES, fetch_in_parts
from baton.store.patience import IMPATIENT, Patience
from baton.store.s3_bucket import HIDDEN, Bucket

log = logging.getLogger(__name__)

_STALE_SECONDS = 86_400.0


class S3Store:
    """Names are keys below `prefix`; every object carries the SHA-256 of its bytes.

    The bytes of a part are covered on their way: by the signature over plain HTTP, by a
    checksum header beside TLS. What comes back is compared with the SHA-256.
    """

    shares_content = False
    publishes = False
    heartbeat_seconds = 15.0
    lost_after_seconds = 90.0

    def __init__(self, bucket: Bucket, prefix: str = "") -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    def open(cls, url: str, patience: Patience = IMPATIENT) -> S3Store:
        """The store `s3://bucket/prefix`.

        Endpoint, region, profile and credentials are found where every AWS tool looks.

        Raises:
            StoreRefused: no such bucket, or no permission to list it.
        """
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not bucket:
            raise ConfigError(f"store {url!r}: no bucket is named; use s3://bucket/prefix")
        if prefix:
            check_name(prefix)
        opened = Bucket.open(bucket, patience)
        opened.list_page(prefix, limit=1)
        return cls(opened, prefix)

    @property
    def url(self) -> str:
        return f"s3://{self._bucket.name}/{self._prefix}".rstrip("/")

    def below(self, prefix: str) -> Self:
        return type(self)(self._bucket, self._prefix + check_name(prefix))

    def task_finished(self, card: str) -> None:
        """Nothing to do: nobody loads models from here."""

    def wait_seconds(self) -> float:
        return 0.0

    # --- the six methods ----------------------------------------------------------------

    def read(self, name: str) -> bytes:
        key = self._key(name)
        for attempt in range(TRIES):
            data, promised = self._bucket.get(key, self._what(name))
            if promised in ("", hashlib.sha256(data).hexdigest()):
                return data
            log.debug("%s: a byte changed on the way (try %d)", key, attempt + 1)
        raise DamagedError(f"{self._what(name)}: the bytes there are not what was saved")

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        key = self._key(name)
        if exclusive:
            self._bucket.create(key, data)
        else:
            self._bucket.put(key, data)

    def upload(self, source: Path, name: str) -> None:
        key = self._key(name)
        if self._bucket.size(key) is not None:
            raise NameTaken(f"{self._what(name)} is already stored")
        self._send(source, key, exclusive=True)

    def download(self, name: str, target: Path) -> None:
        key = self._key(name)
        size, sha256 = self._bucket.head(key, self._what(name))
        self._bring(key, size, sha256, target)

    def names(self, prefix: str = "") -> Iterator[str]:
        return (listed.name for listed in self.listing(prefix))

    def delete(self, name: str) -> None:
        self._bucket.delete(self._key(name))

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

        def send_blob(item: tuple[str, Path]) -> None:
            name, path = item
            if self._bucket.size(self._key(name)) == path.stat().st_size:
                reused.append(item)
            else:
                # Its name says what it holds, and it was looked at right before.
                self._send(path, self._key(name), sha256=name.rpartition("/")[2])

        def send(item: tuple[str, bytes | Path]) -> None:
            name, data = item
            if isinstance(data, Path):
                self._send(data, self._key(name))
            else:
                self.write(name, data)

        # One file at a time: the parts of each are sent in parallel.
        for blob in batch.blobs.items():
            send_blob(blob)
        # The lease first: a leg that has lost it must replace nothing.
        if batch.lease is not None:
            self._renew(*batch.lease)
        batch.check()
        all_of(send, batch.writes.items())
        batch.check()
        if batch.marker is not None:
            self.write(*batch.marker, exclusive=True)
            for name, path in reused:
                # Whoever tidied up at that moment did not see our marker yet.
                if self._bucket.size(self._key(name)) is None:
                    self._send(path, self._key(name))
        for item in batch.last.items():
            send(item)
        all_of(self.delete, batch.deletes)

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        small = [file for file in wanted if file.size <= PART_BYTES]
        all_of(self._fetch, small)
        for file in wanted:
            if file.size > PART_BYTES:
                self._fetch(file)

    def sweep_uploads(self) -> list[str]:
        """End multipart uploads that nobody has finished for a day; returns their names."""
        ended = self._bucket.abort_uploads(self._prefix, _STALE_SECONDS)
        return [key.removeprefix(self._prefix) for key in ended]

    def _fetch(self, file: Wanted) -> None:
        key = self._key(file.name)
        size, _ = self._bucket.head(key, self._what(file.name))
        if size != file.size:
            raise DamagedError(
                f"{self._what(file.name)} is {size:,} bytes, manifest says {file.size:,}"
            )
        self._bring(key, size, file.sha256, file.target)

    def _bring(self, key: str, size: int, sha256: str, target: Path) -> None:
        what = f"{self.url.removesuffix('/')}: {key.removeprefix(self._prefix)}"
        with _writing(target):
            fetch_in_parts(
                target,
                size=size,
                sha256=sha256,
                what=what,
                read=lambda start, length: self._bucket.get_range(key, start, length, what),
            )

    def _renew(self, name: str, data: bytes) -> None:
        """Replace what this process last wrote under `name`, unless somebody else has since."""
        key = self._key(name)
        # A heartbeat and a checkpoint may both renew it.
        with self._bucket.renewing:
            seen = self._bucket.written.get(key)
            if seen is None or not self._bucket.can.match:
                self.write(name, data)
                return
            try:
                self._bucket.swap(key, data, seen)
            except (NameTaken, NameMissing):
                raise FencedError(f"{self._what(name)} was taken over by somebody else") from None

    def _send(self, source: Path, key: str, *, exclusive: bool = False, sha256: str = "") -> None:
        with open(source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > PART_BYTES:
                whole = sha256 or hashlib.file_digest(file, "sha256").hexdigest()
                self._bucket.put_parts(key, file.fileno(), size, whole, exclusive=exclusive)
            elif exclusive:
                self._bucket.create(key, file.read())
            else:
                self._bucket.put(key, file.read())

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _what(self, name: str) -> str:
        return f"{self.url}: {name}"


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explained(error, f"writing {target}") from error
