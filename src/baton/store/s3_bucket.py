"""Requests to one bucket of a server that speaks S3: repeated, checked, with errors for people."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from baton.errors import DamagedError, FencedError, NameMissing, NameTaken, StoreError
from baton.store.objects import HIDDEN
from baton.store.parallel import WORKERS, all_of, in_parallel
from baton.store.partial import PART_BYTES, TRIES, fetch_in_parts
from baton.store.patience import IMPATIENT, Patience
from baton.store.s3_errors import explain, is_missing, is_refused_condition

log = logging.getLogger(__name__)

_PROBE = f"{HIDDEN}conditional-writes"
# S3 takes at most 10,000 parts.
_MAX_PARTS = 9_000
_BODY_ATTEMPTS = 5
_SHA256, _TOKEN = "sha256", "write"


@dataclass(frozen=True)
class Conditions:
    """What a server makes of `If-None-Match: *` and `If-Match` on a PUT.

    Ceph 16 wants ETags without their quotes; others ignore the headers.
    """

    create: bool
    match: bool
    quoted: bool = True


@dataclass
class S3Bucket:
    """Requests to one bucket, repeated a bounded number of times, with errors for people."""

    name: str
    client: Any
    endpoint: str
    patience: Patience = IMPATIENT
    # ETags of small objects that this process wrote: what a lease must still be to be renewed.
    _written: dict[str, str] = field(default_factory=dict)
    _renewing: threading.Lock = field(default_factory=threading.Lock)
    # By key, tokens of renewals that may have arrived though no answer came.
    _unsure: dict[str, set[str]] = field(default_factory=dict)
    _can: Conditions | None = None
    _over_tls: bool = field(init=False)

    def __post_init__(self) -> None:
        self._over_tls = self.endpoint.startswith("https:")

    @classmethod
    def open(cls, name: str, patience: Patience = IMPATIENT) -> S3Bucket:
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
        return cls(name, client, str(client.meta.endpoint_url), patience)

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

    def size(self, key: str) -> int | None:
        found = self._head(key)
        return None if found is None else int(found["ContentLength"])

    def get(self, key: str, what: str) -> bytes:
        for attempt in range(TRIES):
            found, data = self._get(key, what)
            promised = found["Metadata"].get(_SHA256, "")
            if promised in ("", hashlib.sha256(data).hexdigest()):
                return data
            log.debug("%s: a byte changed on the way (try %d)", key, attempt + 1)
        raise DamagedError(f"{what}: the bytes there are not what was saved")

    def get_range(self, key: str, start: int, length: int, what: str) -> bytes:
        if length == 0:
            return b""
        return self._get(key, what, Range=f"bytes={start}-{start + length - 1}")[1]

    def download(self, key: str, what: str, target: Path) -> None:
        found = self._head(key)
        if found is None:
            raise NameMissing(f"{what}: nothing is stored there")
        fetch_in_parts(
            target,
            size=found["ContentLength"],
            sha256=found["Metadata"].get(_SHA256, ""),
            what=what,
            read=lambda start, length: self.get_range(key, start, length, what),
        )

    def put(self, items: Mapping[str, bytes | Path], *, sha256: str = "") -> None:
        def put(item: tuple[str, bytes | Path]) -> None:
            key, data = item
            if isinstance(data, Path):
                self._send(data, key, sha256=sha256)
            else:
                self._put_noted(key, data)

        all_of(put, items.items())

    def create(self, key: str, data: bytes | Path) -> None:
        if isinstance(data, Path):
            self._send(data, key, exclusive=True)
            return
        token = os.urandom(8).hex()
        if not self.can.create and self._head(key) is not None:
            raise NameTaken(f"{key} is already stored")
        condition = {"IfNoneMatch": "*"} if self.can.create else {}
        self._put_once(key, data, token, condition)
        if not self.can.create:
            # Two may have written; the last one's bytes are there, and only it goes on.
            found = self._head(key)
            if found is None or found["Metadata"].get(_TOKEN) != token:
                raise NameTaken(f"{key} was stored by somebody else at the same moment")

    def renew(self, key: str, data: bytes, what: str) -> None:
        # A heartbeat and a checkpoint may both renew it.
        with self._renewing:
            seen = self._written.get(key)
            if seen is None or not self.can.match:
                self._put_noted(key, data)
                return
            token, ours = os.urandom(8).hex(), self._unsure.setdefault(key, set())
            ours.add(token)
            try:
                try:
                    self._put_once(key, data, token, self._if_match(seen))
                except NameTaken:
                    found = self._head(key)
                    if found is None or found["Metadata"].get(_TOKEN) not in ours:
                        raise
                    self._put_once(key, data, token, self._if_match(str(found["ETag"])))
            except (NameTaken, NameMissing):
                raise FencedError(f"{what} was taken over by somebody else") from None
            ours.clear()

    def delete(self, keys: Sequence[str]) -> None:
        def delete(key: str) -> None:
            self._ask(
                f"deleting {key}", lambda: self.client.delete_object(Bucket=self.name, Key=key)
            )

        all_of(delete, keys)

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

    # --- one object, one request, again -----------------------------------------------------

    def _send(self, source: Path, key: str, *, exclusive: bool = False, sha256: str = "") -> None:
        with open(source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > PART_BYTES:
                whole = sha256 or hashlib.file_digest(file, "sha256").hexdigest()
                self._put_parts(key, file.fileno(), size, whole, exclusive=exclusive)
            elif exclusive:
                self.create(key, file.read())
            else:
                self._put_noted(key, file.read())

    def _if_match(self, etag: str) -> dict[str, str]:
        return {"IfMatch": etag if self.can.quoted else etag.strip('"')}

    def _put_noted(self, key: str, data: bytes) -> str:
        """Write an object and remember its ETag."""
        etag = str(self._put(key, data, os.urandom(8).hex())["ETag"])
        self._written[key] = etag
        return etag

    def _put_parts(
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
        etag = self._put_noted(_PROBE, b"")
        for quoted in (True, False):
            if tried(IfMatch=etag if quoted else etag.strip('"')):
                return Conditions(create, True, quoted)
        return Conditions(create, False)

    def _put_once(self, key: str, data: bytes, token: str, condition: dict[str, str]) -> None:
        try:
            etag = str(self._put(key, data, token, **condition)["ETag"])
        except NameTaken:
            # A repeated request finds what the first one wrote, whose answer was lost.
            found = self._head(key)
            if found is None or found["Metadata"].get(_TOKEN) != token:
                raise
            etag = str(found["ETag"])
        self._written[key] = etag

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
        return self.patience.insist(lambda: self._get_now(key, what, options))

    def _get_now(
        self, key: str, what: str, options: dict[str, str]
    ) -> tuple[dict[str, Any], bytes]:
        for attempt in range(1, _BODY_ATTEMPTS + 1):
            try:
                answer = self._ask_now(
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
        return self.patience.insist(lambda: self._ask_now(doing, request))

    def _ask_now(self, doing: str, request: Callable[[], Any]) -> Any:
        """One request, with the quick tries of boto3."""
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
