"""A small Hugging Face Hub for tests: what huggingface_hub 2 asks for.

    with MiniHub(folder) as hub:
        os.environ.update(hub.environment)

`python minihub.py PORT FOLDER` runs it by itself. It keeps repositories in memory and LFS
objects in `folder`; it checks tokens, parent commits and SHA-256, redirects LFS files to
another host name as the real one does, and can allow only so many commits an hour. Files of
repositories travel without Xet; buckets (`minibucket.py`) know nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

from minibucket import ENVIRONMENT, Buckets

TOKEN = "hf_test"
LFS_ABOVE_BYTES = 10_000_000
LFS_SUFFIXES = (".safetensors", ".bin", ".tokens", ".zip")
MULTIPART_ABOVE_BYTES = 50 * 2**20
CHUNK_BYTES = 5 * 2**20
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_REPO = re.compile(
    r"/api/(models|datasets|spaces)/([^/]+/[^/]+?)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?"
)
_LFS = re.compile(r"/lfs-(put|part|complete|verify)/([0-9a-f]{64})(?:/(\d+))?")
_RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or the SHA-256 of an LFS object."""

    size: int
    data: bytes = b""
    lfs: str = ""

    @property
    def oid(self) -> str:
        """What git calls the file (for LFS: its pointer)."""
        data = self.data
        if self.lfs:
            data = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.lfs.encode(),
                self.size,
            )
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.lfs, "size": self.size, "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid, **lfs}


@dataclass
class Commit:
    oid: str
    title: str
    message: str
    files: dict[str, Blob]
    parent: str | None
    time: float = field(default_factory=time.time)

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.time))


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    head: str = ""

    def add(self, title: str, message: str, files: dict[str, Blob], parent: str | None) -> Commit:
        number = f"{time.time_ns()} {title} {len(self.commits)}"
        commit = Commit(hashlib.sha1(number.encode()).hexdigest(), title, message, files, parent)
        self.commits[commit.oid] = commit
        self.head = commit.oid
        return commit

    def at(self, revision: str | None) -> Commit | None:
        name = unquote(revision or "main")
        return self.commits.get(self.head if name == "main" else name)


class MiniHub:
    """The server and all that it holds; tests may look into `repositories` and change them."""

    def __init__(self, folder: Path, *, port: int = 0, commits_per_hour: int = 10**9) -> None:
        self.folder = folder
        self.commits_per_hour = commits_per_hour
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lock = threading.RLock()
        self.log: list[tuple[str, str, int]] = []
        self.committed: list[float] = []
        # Called with method and path; what it returns (status, headers) is answered instead.
        self.fault: Callable[[str, str], tuple[int, Mapping[str, str]] | None] = lambda *_: None
        self.parts: dict[tuple[str, int], bytes] = {}
        folder.mkdir(parents=True, exist_ok=True)
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        # Another host name is another host: clients must not send their token there.
        self.cdn = f"http://localhost:{self.port}"
        self.buckets = Buckets(folder, self.url)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> MiniHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to talk to this hub and to no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            **ENVIRONMENT,
            # What Xet notes about chunks that were sent is true of one server only.
            "HF_XET_CACHE": str(self.folder / "xet-cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def bytes_of(self, blob: Blob) -> bytes:
        return self.object(blob.lfs).read_bytes() if blob.lfs else blob.data

    def object(self, sha256: str) -> Path:
        return self.folder / sha256


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: MiniHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go separately; the body need not wait 40 ms

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self) -> None:
        self.body = self._body()
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        if found := self.hub.fault(self.command, self.path):
            self.send(found[0], {"error": "injected"}, headers=found[1])
            return
        raw = url.path
        path = raw if "/resolve/" in raw or "/tree/" in raw else unquote(raw)
        if self.hub.buckets.answer(self):
            return
        if path == "/api/whoami-v2":
            self._whoami()
        elif path == "/api/repos/create":
            self._create()
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif found := _REPO.fullmatch(path):
            self._repository(*found.groups())
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch()
        elif found := _LFS.fullmatch(path):
            self._lfs(*found.groups())
        elif found := _RESOLVE.fullmatch(path):
            self._resolve(*found.groups())
        elif path.startswith("/lfs-get/"):
            sha256 = path.removeprefix("/lfs-get/")
            self.send_range(self.hub.object(sha256).read_bytes(), {"ETag": f'"{sha256}"'})
        else:
            self.fail(404, message=f"no route {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    # --- what is asked about repositories -------------------------------------------------

    def _whoami(self) -> None:
        if not self.has_token:
            self.fail(401)
            return
        token = {"accessToken": {"displayName": "t", "role": "write"}, "type": "access_token"}
        self.send(200, {"type": "user", "name": "tester", "orgs": [], "auth": token})

    def _create(self) -> None:
        wanted = json.loads(self.body)
        kind = wanted.get("type") or "model"
        owner = wanted.get("organization") or "tester"
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if not self.has_token:
            self.fail(401)
        elif owner == "forbidden":
            self.fail(403, message="You don't have the rights to create a model here")
        else:
            with self.hub.lock:
                if (kind, name) in self.hub.repositories:
                    self.send(409, {"error": "You already created this repo", "url": url})
                    return
                private = wanted.get("visibility") == "private" or wanted.get("private", False)
                repository = Repository(private)
                repository.add("initial commit", "", {}, None)
                self.hub.repositories[kind, name] = repository
            self.send(200, {"url": url, "name": name, "id": name})

    def _repository(
        self, kinds: str, name: str, action: str | None, revision: str | None, rest: str | None
    ) -> None:
        repository = self.hub.repositories.get((KINDS[kinds], name))
        if repository is None or (repository.private and not self.has_token):
            self.fail(404 if self.has_token else 401, "RepoNotFound", "Repository not found")
            return
        if action not in (None, "paths-info") and self.command != "GET" and not self.has_token:
            self.fail(401)
            return
        if action == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
            self.send(200, {"branches": [main], "tags": [], "converts": []})
            return
        commit = repository.at(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        act = {
            None: self._info,
            "revision": self._info,
            "commits": self._commits,
            "preupload": self._preupload,
            "paths-info": self._paths_info,
            "tree": self._tree,
            "commit": self._commit,
            "super-squash": self._squash,
        }[action]
        act(repository, commit, name, rest)

    def _info(self, repository: Repository, commit: Commit, name: str, _: str | None) -> None:
        self.send(
            200,
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": commit.date,
                "createdAt": commit.date,
                "siblings": [{"rfilename": path} for path in commit.files],
            },
        )

    def _commits(self, repository: Repository, commit: Commit, *_: str | None) -> None:
        rows = []
        following: Commit | None = commit
        while following is not None:
            row = {"id": following.oid, "title": following.title, "message": following.message}
            rows.append(row | {"authors": [], "date": following.date})
            following = repository.commits.get(following.parent or "")
        self.send(200, rows[:50])

    def _preupload(self, _: Repository, commit: Commit, *__: str | None) -> None:
        files = []
        for file in json.loads(self.body)["files"]:
            path, known = file["path"], commit.files.get(file["path"])
            is_lfs = file["size"] >= LFS_ABOVE_BYTES or path.endswith(LFS_SUFFIXES)
            oid = (known.lfs or known.oid) if known else None
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": files, "commitOid": commit.oid})

    def _paths_info(self, _: Repository, commit: Commit, *__: str | None) -> None:
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode()))["paths"]
        self.send(200, [commit.files[p].entry(p) for p in paths if p in commit.files])

    def _tree(self, _: Repository, commit: Commit, __: str, rest: str | None) -> None:
        prefix = f"{unquote(rest)}/" if rest else ""
        paths = sorted(path for path in commit.files if path.startswith(prefix))
        rows = [commit.files[path].entry(path) for path in paths]
        start, limit = int(self.query.get("cursor", 0)), int(self.query.get("limit", 1000))
        headers = {}
        if len(rows) > start + limit:
            url = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true"
            headers["Link"] = f'<{url}&limit={limit}&cursor={start + limit}>; rel="next"'
        self.send(200, rows[start : start + limit], headers=headers)

    def _commit(self, repository: Repository, _: Commit, name: str, __: str | None) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        with self.hub.lock:
            recent = [moment for moment in self.hub.committed if moment > time.time() - 3600]
            if len(recent) >= self.hub.commits_per_hour:
                wait = int(recent[0] + 3600 - time.time()) + 1
                self.fail(429, message="too many commits", headers={"Retry-After": str(wait)})
                return
            head = repository.commits[repository.head]
            if header.get("parentCommit") not in (None, head.oid):
                self.fail(412, message="A commit has happened since. Please refresh and try again.")
                return
            files = dict(head.files)
            for line in lines[1:]:
                problem = self._apply(files, line["key"], line["value"])
                if problem:
                    self.fail(400, message=problem)
                    return
            commit = repository.add(
                header["summary"], header.get("description", ""), files, head.oid
            )
            self.hub.committed = [*recent, commit.time]
        url = f"{self.hub.url}/{name}/commit/{commit.oid}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}
        self.send(200, answer)

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> str:
        """Make one change of a commit; returns what is wrong with it."""
        path = value["path"]
        if key == "file":
            data = base64.b64decode(value["content"])
            files[path] = Blob(len(data), data)
        elif key == "lfsFile":
            if not self.hub.object(value["oid"]).exists():
                return f"LFS pointer pointed to a file that does not exist: {path}"
            files[path] = Blob(value["size"], lfs=value["oid"])
        elif key == "deletedFile" and files.pop(path, None) is None:
            return f"{path}: entry not found"
        return ""

    def _squash(self, repository: Repository, commit: Commit, *_: str | None) -> None:
        with self.hub.lock:
            files = repository.commits[repository.head].files
            repository.commits.clear()
            repository.add("Super-squash branch 'main'", "", files, None)
        del commit
        self.send(200, {})

    # --- large files ------------------------------------------------------------------------

    def _lfs_batch(self) -> None:
        if not self.has_token:
            self.fail(401)
            return
        wanted = json.loads(self.body)
        hub, objects, transfer = self.hub, [], "basic"
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if not hub.object(oid).exists():
                upload: dict[str, Any] = {"href": f"{hub.url}/lfs-put/{oid}", "header": {}}
                if size > MULTIPART_ABOVE_BYTES and "multipart" in wanted["transfers"]:
                    transfer = "multipart"
                    count = -(-size // CHUNK_BYTES)
                    parts = {str(n): f"{hub.url}/lfs-part/{oid}/{n}" for n in range(1, count + 1)}
                    header = {"chunk_size": str(CHUNK_BYTES), **parts}
                    upload = {"href": f"{hub.url}/lfs-complete/{oid}", "header": header}
                verify = {"href": f"{hub.url}/lfs-verify/{oid}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.send(200, {"transfer": transfer, "objects": objects})

    def _lfs(self, what: str, oid: str, number: str | None) -> None:
        data, file = self.body, self.hub.object(oid)
        if what == "part":
            self.hub.parts[oid, int(number or 0)] = data
            self.send(200, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
            return
        if what == "verify":
            right = file.exists() and file.stat().st_size == json.loads(data)["size"]
            self.send(200 if right else 404, {})
            return
        if what == "complete":
            parts = json.loads(data)["parts"]
            data = b"".join(self.hub.parts.pop((oid, part["partNumber"])) for part in parts)
        if hashlib.sha256(data).hexdigest() != oid:
            self.fail(400, message="sha256 mismatch")
            return
        beside = file.with_name(f"{oid}.{next(_numbers)}")
        beside.write_bytes(data)
        beside.rename(file)
        self.send(200, {} if what == "complete" else None)

    def _resolve(self, kinds: str | None, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get((KINDS[kinds or "models"], name))
        if repository is None or (repository.private and not self.has_token):
            self.fail(404 if self.has_token else 401, "RepoNotFound")
            return
        commit = repository.at(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound")
            return
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(unquote(path))
        if blob is None:
            self.fail(404, "EntryNotFound", headers=headers)
        elif blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.lfs}"', "X-Linked-Size": str(blob.size)}
            headers |= {"ETag": f'"{blob.lfs}"', "Location": f"{self.hub.cdn}/lfs-get/{blob.lfs}"}
            self.send(302, headers=headers)
        else:
            self.send_range(blob.data, headers | {"ETag": f'"{blob.oid}"'})

    # --- answers ----------------------------------------------------------------------------

    @property
    def has_token(self) -> bool:
        return bool(self.headers.get("Authorization") == f"Bearer {TOKEN}")

    def send(
        self,
        status: int,
        values: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
    ) -> None:
        body = raw if raw is not None else b"" if values is None else json.dumps(values).encode()
        # Before the client can look.
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        if values is not None:
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(
        self,
        status: int,
        code: str = "",
        message: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        coded = {"X-Error-Code": code} if code else {}
        self.send(status, {"error": message or code}, headers={**(headers or {}), **coded})

    def send_range(self, data: bytes, headers: Mapping[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            self.send(200, headers=headers, raw=data)
            return
        first = int(found[1])
        last = min(int(found[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            self.send(416, headers={**headers, "Content-Range": f"bytes */{len(data)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206, headers=headers, raw=data[first : last + 1])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data


_numbers = itertools.count()


if __name__ == "__main__":
    server = MiniHub(Path(sys.argv[2]), port=int(sys.argv[1]))
    print(server.url, flush=True)
    threading.Event().wait()
