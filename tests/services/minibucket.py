"""Buckets of the small Hub, and the Xet storage behind them, as far as clients see it.

Clients cut files into chunks, send them packed together (xorbs, uncompressed: `ENVIRONMENT`
says so), then tell of which chunks each file is made (shards), then give the file a path in a
bucket. Formats: https://huggingface.co/docs/xet. A file is put together once, when its shard
arrives; whatever does not fit together is answered with 400.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

import hf_xet

ACCESS = "xet-access"
ENVIRONMENT = {"HF_XET_XORB_COMPRESSION_POLICY": "none"}
# What clients call a file of no bytes.
EMPTY = "0" * 64
_API = re.compile(
    r"/api/buckets/([^/]+/[^/]+?)(?:/(xet-(?:read|write)-token|batch|paths-info|tree)(?:/(.*))?)?"
)
_RESOLVE = re.compile(r"/buckets/([^/]+/[^/]+)/resolve/(.+)")
_CAS = re.compile(r"/v1/(xorbs/default/([0-9a-f]{64})|shards)")
_HEADER, _CHUNK = 48, 8
_WITH_CHECKS, _WITH_MORE = 1 << 31, 1 << 30
_BOOKEND = b"\xff" * 32
_numbers = itertools.count()


class Request(Protocol):
    """What a handler of the Hub offers."""

    command: str
    path: str
    body: bytes
    query: dict[str, str]
    headers: Any

    @property
    def has_token(self) -> bool: ...
    def send(self, status: int, values: Any = None, **more: Any) -> None: ...
    def fail(self, status: int, code: str = "", message: str = "") -> None: ...
    def send_range(self, data: bytes, headers: dict[str, str]) -> None: ...


@dataclass(frozen=True)
class File:
    """A path's content, by its Xet hash."""

    hash: str
    size: int
    uploaded: float = field(default_factory=time.time)

    def entry(self, path: str) -> dict[str, Any]:
        moment = datetime.fromtimestamp(self.uploaded, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "type": "file",
            "path": path,
            "size": self.size,
            "xetHash": self.hash,
            "uploadedAt": moment,
        }


class Buckets:
    """Every bucket: its files by path. Tests may look inside, and change what they find."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        # Where clients send chunks; a test may put something in between.
        self.cas_url = url
        self.buckets: dict[str, dict[str, File]] = {}
        self.private: dict[str, bool] = {}
        self.lock = threading.RLock()

    def answer(self, request: Request) -> bool:
        """Answer a request that is ours; is it?"""
        path = urlsplit(request.path).path
        if found := _API.fullmatch(path):
            self._api(request, *found.groups())
        elif found := _RESOLVE.fullmatch(path):
            self._resolve(request, *found.groups())
        elif path.startswith("/xet-get/"):
            request.send_range(self.content(path.rpartition("/")[2]), {})
        elif found := _CAS.fullmatch(path):
            self._store(request, found[2])
        elif path.startswith("/v1/telemetry"):
            request.send(200, {})
        elif path.startswith(("/v1/", "/v2/")):
            # No deduplication across clients, no grants, no progress: they do without.
            request.fail(404)
        else:
            return False
        return True

    def content(self, digest: str) -> bytes:
        return b"" if digest == EMPTY else (self.folder / f"xet-{digest}").read_bytes()

    def read(self, bucket: str, path: str) -> bytes:
        return self.content(self.buckets[bucket][path].hash)

    def forget(self, bucket: str) -> None:
        self.buckets.pop(bucket, None)

    def put(self, bucket: str, path: str, data: bytes | None) -> None:
        """Other bytes under a path, behind everybody's back; None removes it."""
        if data is None:
            del self.buckets[bucket][path]
            return
        beside = self.folder / f"put.{next(_numbers)}"
        beside.write_bytes(data)
        digest = hf_xet.hash_files([str(beside)])[0].hash if data else EMPTY
        beside.rename(self.folder / f"xet-{digest}")
        self.buckets[bucket][path] = File(digest, len(data))

    # --- the Hub's side --------------------------------------------------------------------

    def _api(self, request: Request, name: str, action: str | None, rest: str | None) -> None:
        if not request.has_token:
            request.fail(401)
        elif action is None and request.command == "POST":
            self._create(request, name)
        elif name not in self.buckets:
            request.fail(404, "RepoNotFound", "Repository not found")
        elif action is None:
            files = self.buckets[name].values()
            request.send(
                200,
                {
                    "id": name,
                    "private": self.private[name],
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "size": sum(file.size for file in files),
                    "totalFiles": len(files),
                },
            )
        elif action == "batch":
            self._batch(request, self.buckets[name])
        elif action == "paths-info":
            files = self.buckets[name]
            paths = json.loads(request.body)["paths"]
            request.send(200, [files[path].entry(path) for path in paths if path in files])
        elif action == "tree":
            self._tree(request, self.buckets[name], unquote(rest or ""))
        else:
            expires = int(time.time()) + 3600
            request.send(
                200,
                {"casUrl": self.cas_url, "accessToken": ACCESS, "exp": expires},
                headers={
                    "X-Xet-Cas-Url": self.cas_url,
                    "X-Xet-Access-Token": ACCESS,
                    "X-Xet-Token-Expiration": str(expires),
                },
            )

    def _create(self, request: Request, name: str) -> None:
        url = f"http://{request.headers['Host']}/buckets/{name}"
        if name.startswith("forbidden/"):
            request.fail(403, message="You don't have the rights to create a bucket here")
            return
        with self.lock:
            taken = name in self.buckets
            if not taken:
                self.buckets[name] = {}
                self.private[name] = json.loads(request.body).get("visibility") == "private"
        request.send(409 if taken else 200, {"url": url, "name": name})

    def _batch(self, request: Request, files: dict[str, File]) -> None:
        failed = []
        operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        with self.lock:
            for operation in operations:
                path = operation["path"]
                if operation["type"] == "deleteFile":
                    files.pop(path, None)
                    continue
                digest = operation["xetHash"]
                stored = self.folder / f"xet-{digest}"
                if digest != EMPTY and not stored.exists():
                    failed.append({"path": path, "error": "no such content"})
                    continue
                files[path] = File(digest, stored.stat().st_size if digest != EMPTY else 0)
        done = len(operations) - len(failed)
        status = 422 if failed and not done else 200
        request.send(
            status, {"success": not failed, "processed": len(operations), "failed": failed}
        )

    def _tree(self, request: Request, files: dict[str, File], prefix: str) -> None:
        with self.lock:
            found = sorted(p for p in files if not prefix or p.startswith(f"{prefix}/"))
            rows = [files[path].entry(path) for path in found]
        start, limit = int(request.query.get("cursor", 0)), int(request.query.get("limit", 1000))
        headers = {}
        if len(rows) > start + limit:
            # Not `self.url`: a client goes on asking where it began.
            here = f"http://{request.headers['Host']}{request.path.partition('?')[0]}"
            more = f"recursive=true&limit={limit}&cursor={start + limit}"
            headers["Link"] = f'<{here}?{more}>; rel="next"'
        request.send(200, rows[start : start + limit], headers=headers)

    def _resolve(self, request: Request, name: str, path: str) -> None:
        path = unquote(path)
        if not request.has_token:
            request.fail(401)
        elif path not in self.buckets.get(name, {}):
            request.fail(404, "EntryNotFound")
        else:
            file = self.buckets[name][path]
            route = f"{self.url}/api/buckets/{quote(name)}/xet-read-token"
            request.send(
                302,
                headers={
                    "X-Xet-Hash": file.hash,
                    "X-Linked-Size": str(file.size),
                    "Link": f'<{route}>; rel="xet-auth"',
                    "Location": f"{self.url.replace('127.0.0.1', 'localhost')}/xet-get/{file.hash}",
                },
            )

    # --- Xet's side ------------------------------------------------------------------------

    def _store(self, request: Request, xorb: str | None) -> None:
        if request.headers.get("Authorization") != f"Bearer {ACCESS}":
            request.fail(401)
            return
        try:
            if xorb:
                list(_chunks(request.body))
                self._keep(f"xorb-{xorb}", request.body)
            else:
                for digest, data in self._files(request.body):
                    self._keep(f"xet-{digest}", data)
        except (ValueError, struct.error, OSError) as problem:
            request.fail(400, message=str(problem))
            return
        request.send(200, {"was_inserted": True} if xorb else {"result": 1})

    def _keep(self, name: str, data: bytes) -> None:
        beside = self.folder / f"{name}.{next(_numbers)}"
        beside.write_bytes(data)
        beside.rename(self.folder / name)

    def _files(self, shard: bytes) -> Iterator[tuple[str, bytes]]:
        """The files that a shard tells of: hash and bytes."""
        place = _HEADER
        while (digest := shard[place : place + 32]) != _BOOKEND:
            flags, count = struct.unpack_from("<II", shard, place + 32)
            entries = [place + _HEADER * (1 + number) for number in range(count)]
            yield _name(digest), b"".join(self._segment(shard, entry) for entry in entries)
            place += _HEADER * (1 + count * (2 if flags & _WITH_CHECKS else 1))
            place += _HEADER if flags & _WITH_MORE else 0

    def _segment(self, shard: bytes, place: int) -> bytes:
        xorb = (self.folder / f"xorb-{_name(shard[place : place + 32])}").read_bytes()
        size, first, last = struct.unpack_from("<III", shard, place + 36)
        data = b"".join(itertools.islice(_chunks(xorb), first, last))
        if len(data) != size:
            raise ValueError(f"a segment has {len(data)} bytes, its shard says {size}")
        return data


def _name(digest: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _chunks(xorb: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(xorb):
        packed, scheme = int.from_bytes(xorb[place + 1 : place + 4], "little"), xorb[place + 4]
        if scheme or place + _CHUNK + packed > len(xorb):
            raise ValueError("a chunk is compressed, or cut off")
        yield xorb[place + _CHUNK : place + _CHUNK + packed]
        place += _CHUNK + packed
