"""A store in a bucket of any server that speaks S3: AWS, MinIO, Ceph, R2 and others."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from baton.errors import ConfigError, DamagedError, FencedError, NameMissing, NameTaken, StoreError
from baton.store.base import Batch, Listed, Wanted, check_name, explained
from baton.store.parallel import WORKERS, all_of, in_parallel
from baton.store.partial import PART_BYTES, TRIES, fetch_in_parts
from baton.store.s3_errors import explain, is_missing, is_refused_condition

log = logging.getLogger(__name__)

# Keys below it are ours alone and are never listed.
_HIDDEN = ".baton/"
_PROBE = f"{_HIDDEN}conditional-writes"
# S3 takes at most 10,000 parts.
_MAX_PARTS = 9_000
_BODY_ATTEMPTS = 5
_STALE_SECONDS = 86_400.0
_SHA256, _TOKEN = "sha256", "write"


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
    def open(cls, url: str) -> S3Store:
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
        opened = Bucket.open(bucket)
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
        hidden = f"{self._prefix}{_HIDDEN}"
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
        all_of(send, batch.last.items())
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


@dataclass(frozen=True)
class Conditions:
    """What a server makes of `If-None-Match: *` and `If-Match` on a PUT.

    Ceph 16 wants ETags without their quotes; others ignore the headers.
    """

    create: bool
    match: bool
    quoted: bool = True


@dataclass
class Bucket:
    """Requests to one bucket, repeated a bounded number of times, with errors for people."""

    name: str
    client: Any
    endpoint: str
    # ETags of small objects that this process wrote: what a lease must still be to be renewed.
    written: dict[str, str] = field(default_factory=dict)
    renewing: threading.Lock = field(default_factory=threading.Lock)
    _can: Conditions | None = None
    _over_tls: bool = field(init=False)

    def __post_init__(self) -> None:
        self._over_tls = self.endpoint.startswith("https:")

    @classmethod
    def open(cls, name: str) -> Bucket:
        try:
            session = boto3.session.Session()
            config = Config(
                # Adaptive: slows down with the server. Five tries take about 20 s.
                retries={"mode": "adaptive", "total_max_attempts": 5},
                connect_timeout=5,
                read_timeout=30,
                max_pool_connections=4 * WORKERS,
                # Ours are the checksums; servers other than AWS refuse the default trailers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                **_addressing(session),
            )
            client = session.client(
                "s3", config=config, region_name=session.region_name or "us-east-1"
            )
        except BotoCoreError as error:
            raise explain(error, bucket=name, endpoint="", doing="opening it") from error
        return cls(name, client, str(client.meta.endpoint_url))

    @property
    def can(self) -> Conditions:
        """Found out by trying, once; a server that ignores conditions is named in the log."""
        if self._can is None:
            self._can = self._probe()
            if not self._can.create:
                log.warning(
                    "%s ignores If-None-Match: two legs that start in the same second may both"
                    " claim a task; the one with the higher number goes on",
                    self.endpoint,
                )
        return self._can

    def list_page(self, prefix: str, *, limit: int) -> None:
        """Look whether listing works at all."""
        self._ask(
            "listing it",
            lambda: self.client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=limit),
        )

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys and sizes, a page of a thousand in memory at a time."""
        after: dict[str, str] = {}
        while True:
            page = self._ask(
                "listing it",
                functools.partial(
                    self.client.list_objects_v2, Bucket=self.name, Prefix=prefix, **after
                ),
            )
            for entry in page.get("Contents", ()):
                yield entry["Key"], entry["Size"]
            if not page.get("IsTruncated"):
                return
            after = {"ContinuationToken": page["NextContinuationToken"]}

    def head(self, key: str, what: str) -> tuple[int, str]:
        """Size, and the SHA-256 that was noted with it. Raises `NameMissing`."""
        found = self._head(key)
        if found is None:
            raise NameMissing(f"{what}: nothing is stored there")
        return found["ContentLength"], found["Metadata"].get(_SHA256, "")

    def size(self, key: str) -> int | None:
        found = self._head(key)
        return None if found is None else int(found["ContentLength"])

    def get(self, key: str, what: str) -> tuple[bytes, str]:
        """A whole object and the SHA-256 noted with it. Raises `NameMissing`."""
        found, data = self._get(key, what)
        return data, found["Metadata"].get(_SHA256, "")

    def get_range(self, key: str, start: int, length: int, what: str) -> bytes:
        if length == 0:
            return b""
        return self._get(key, what, Range=f"bytes={start}-{start + length - 1}")[1]

    def put(self, key: str, data: bytes, **conditions: str) -> str:
        """Write an object; returns its ETag."""
        token = os.urandom(8).hex()
        etag = str(self._put(key, data, token, **conditions)["ETag"])
        self.written[key] = etag
        return etag

    def create(self, key: str, data: bytes) -> str:
        """Write an object that is not there yet; returns its ETag. Raises `NameTaken`."""
        token = os.urandom(8).hex()
        if not self.can.create and self._head(key) is not None:
            raise NameTaken(f"{key} is already stored")
        condition = {"IfNoneMatch": "*"} if self.can.create else {}
        etag = self._put_once(key, data, token, condition)
        if not self.can.create:
            # Two may have written; the last one's bytes are there, and only it goes on.
            found = self._head(key)
            if found is None or found["Metadata"].get(_TOKEN) != token:
                raise NameTaken(f"{key} was stored by somebody else at the same moment")
        return etag

    def swap(self, key: str, data: bytes, seen: str) -> str:
        """Replace the object whose ETag is `seen`. Raises `NameTaken` if it is another."""
        match = seen if self.can.quoted else seen.strip('"')
        return self._put_once(key, data, os.urandom(8).hex(), {"IfMatch": match})

    def put_parts(
        self, key: str, descriptor: int, size: int, sha256: str, *, exclusive: bool = False
    ) -> None:
        """Send a large file in parts, several at once; it appears when the last one is there."""
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        checked = {"ChecksumAlgorithm": "SHA256"} if self._over_tls else {}
        begun = self._ask(
            f"writing {key}",
            lambda: self.client.create_multipart_upload(
                Bucket=self.name, Key=key, Metadata={_SHA256: sha256}, **checked
            ),
        )
        upload = {"Bucket": self.name, "Key": key, "UploadId": begun["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            data = os.pread(descriptor, part_bytes, (number - 1) * part_bytes)
            checksum = self._checksum(data)
            answer = self._ask(
                f"writing {key}",
                lambda: self.client.upload_part(**upload, PartNumber=number, Body=data, **checksum),
            )
            return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

        condition = {"IfNoneMatch": "*"} if exclusive and self.can.create else {}
        try:
            parts = list(in_parallel(send, range(1, -(-size // part_bytes) + 1)))
            self._ask(
                f"writing {key}",
                lambda: self.client.complete_multipart_upload(
                    **upload, MultipartUpload={"Parts": parts}, **condition
                ),
            )
        except StoreError:
            # What is not ended is paid for; where even that fails, `store gc` finds it.
            with contextlib.suppress(ClientError, BotoCoreError):
                self.client.abort_multipart_upload(**upload)
            raise

    def delete(self, key: str) -> None:
        self._ask(f"deleting {key}", lambda: self.client.delete_object(Bucket=self.name, Key=key))

    def abort_uploads(self, prefix: str, older_than_seconds: float) -> list[str]:
        begun = self._ask(
            "listing its uploads",
            lambda: self.client.list_multipart_uploads(Bucket=self.name, Prefix=prefix),
        )
        ended = []
        for upload in begun.get("Uploads", ()):
            if time.time() - upload["Initiated"].timestamp() >= older_than_seconds:
                self.client.abort_multipart_upload(
                    Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"]
                )
                ended.append(upload["Key"])
        return ended

    def _probe(self) -> Conditions:
        def tried(**condition: str) -> bool:
            """Was a PUT under this condition carried out?"""
            try:
                self._put(_PROBE, b"", "", **condition)
            except NameTaken:
                return False
            return True

        # The first may find nothing there and be right to write.
        create = not tried(IfNoneMatch="*") or not tried(IfNoneMatch="*")
        if not create or tried(IfMatch='"0000"'):
            return Conditions(create, False)
        etag = self.put(_PROBE, b"")
        for quoted in (True, False):
            if tried(IfMatch=etag if quoted else etag.strip('"')):
                return Conditions(create, True, quoted)
        return Conditions(create, False)

    def _put_once(self, key: str, data: bytes, token: str, condition: dict[str, str]) -> str:
        try:
            etag = str(self._put(key, data, token, **condition)["ETag"])
        except NameTaken:
            # A repeated request finds what the first one wrote, whose answer was lost.
            found = self._head(key)
            if found is None or found["Metadata"].get(_TOKEN) != token:
                raise
            etag = str(found["ETag"])
        self.written[key] = etag
        return etag

    def _put(self, key: str, data: bytes, token: str, **conditions: str) -> dict[str, Any]:
        noted = {_SHA256: hashlib.sha256(data).hexdigest(), _TOKEN: token}
        answer: dict[str, Any] = self._ask(
            f"writing {key}",
            lambda: self.client.put_object(
                Bucket=self.name,
                Key=key,
                Body=data,
                Metadata=noted,
                **self._checksum(data),
                **conditions,
            ),
        )
        return answer

    def _checksum(self, data: bytes) -> dict[str, str]:
        """Over plain HTTP the signature covers the body's SHA-256 already."""
        if not self._over_tls:
            return {}
        return {"ChecksumSHA256": base64.b64encode(hashlib.sha256(data).digest()).decode()}

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._ask(
                f"looking at {key}", lambda: self.client.head_object(Bucket=self.name, Key=key)
            )
        except NameMissing:
            return None
        return found

    def _get(self, key: str, what: str, **options: str) -> tuple[dict[str, Any], bytes]:
        """An answer and its body; a body that breaks off is asked for again."""
        for attempt in range(1, _BODY_ATTEMPTS + 1):
            try:
                answer = self._ask(
                    f"reading {key}",
                    lambda: self.client.get_object(Bucket=self.name, Key=key, **options),
                )
                data = answer["Body"].read()
                if len(data) == answer["ContentLength"]:
                    return answer, data
                problem: Exception = HTTPError("the body was shorter than announced")
            except NameMissing:
                raise NameMissing(f"{what}: nothing is stored there") from None
            except (BotoCoreError, HTTPClientError, HTTPError, OSError) as error:
                problem = error
            if attempt < _BODY_ATTEMPTS:
                time.sleep(0.1 * 2**attempt)
        raise explain(problem, bucket=self.name, endpoint=self.endpoint, doing=f"reading {key}")

    def _ask(self, doing: str, request: Callable[[], Any]) -> Any:
        try:
            with contextlib.suppress(ResponseParserError):
                return request()
            # An answer that was changed on the way, which botocore does not ask for again.
            return request()
        except (ClientError, BotoCoreError, HTTPClientError, ResponseParserError) as error:
            if is_missing(error):
                raise NameMissing(f"{self.name}: nothing is stored there ({doing})") from None
            if is_refused_condition(error):
                raise NameTaken(f"{self.name}: {doing}: somebody else has written it") from None
            raise explain(error, bucket=self.name, endpoint=self.endpoint, doing=doing) from error


def _addressing(session: Any) -> dict[str, Any]:
    """`http://host/bucket` for servers of one's own, unless the AWS config file says how."""
    profile = session.profile_name
    configured = session._session.full_config.get("profiles", {}).get(profile, {})
    has_endpoint = any(
        name in os.environ for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    ) or ("endpoint_url" in configured)
    if has_endpoint and "addressing_style" not in configured.get("s3", {}):
        return {"s3": {"addressing_style": "path"}}
    return {}


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explained(error, f"writing {target}") from error
