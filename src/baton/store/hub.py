"""A store in a repository of the Hugging Face Hub: one commit for all that belongs together."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
)

from baton.errors import (
    ConfigError,
    DamagedError,
    FencedError,
    NameMissing,
    NameTaken,
    StoreError,
    StoreRefused,
)
from baton.store.base import Batch, Listed, Wanted, check_name
from baton.store.card import CARD, is_ours
from baton.store.commits import CommitBudget
from baton.store.parallel import all_of
from baton.store.partial import PART_BYTES, TRIES, fetch_in_parts

log = logging.getLogger(__name__)

_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
# Ours alone, never listed: when commits were made, so that all writers share one budget.
_LEDGER = ".baton/commits.json"
# Written by the Hub when a repository is created.
_HIDDEN = (".gitattributes", _LEDGER)
_ATTEMPTS = 6
_LONGEST_WAIT_SECONDS = 60.0
_MANY_WRITERS = 30
# huggingface_hub 1 carries requests by httpx, 2 by httpx2.
_NETWORK_MODULES = ("httpx", "httpx2", "httpcore", "httpcore2")

Operation = CommitOperationAdd | CommitOperationDelete


class HubStore:
    """Names are paths below `prefix` on the branch `main` of a repository.

    The Hub keeps equal large files once (LFS, Xet), so every checkpoint has its own paths and
    can be loaded from there. Each write is a commit on top of the one that was looked at; if
    somebody else was faster, it is looked at again.
    """

    shares_content = True
    publishes = True
    # A commit each: five minutes of twelve an hour.
    heartbeat_seconds = 300.0
    lost_after_seconds = 900.0

    def __init__(self, repository: Repository, prefix: str = "") -> None:
        self.repository = repository
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    def open(cls, url: str) -> HubStore:
        """The store `hf://user/repository`, `hf://datasets/user/repository` or a folder in one.

        `?visibility=public` creates a public repository instead of a private one, and
        `?squash=yes` makes one commit of its history when a task is finished.

        Raises:
            ConfigError: the URL is none of these.
            StoreRefused: there is no token, or it may not look.
        """
        parsed = urlsplit(url)
        parts = [part for part in f"{parsed.netloc}{parsed.path}".split("/") if part]
        if parts[:1] == ["buckets"]:
            raise ConfigError(
                f"store {url!r}: buckets of the Hub have no conditional writes and no history to"
                " fence legs with; name a repository (hf://user/repository)"
            )
        kind = _KINDS[parts.pop(0)] if parts and parts[0] in _KINDS else "model"
        if len(parts) < 2:
            raise ConfigError(f"store {url!r}: name a repository: hf://user/repository")
        options = dict(parse_qsl(parsed.query))
        unknown = set(options) - {"visibility", "squash"}
        if unknown:
            raise ConfigError(f"store {url!r}: unknown option {sorted(unknown)[0]!r}")
        repository = Repository(
            name="/".join(parts[:2]),
            kind=kind,
            is_private=options.get("visibility", "private") != "public",
            is_squashed=options.get("squash") in ("yes", "true", "1"),
            query=f"?{parsed.query}" if parsed.query else "",
        )
        repository.refresh()
        prefix = "/".join(parts[2:])
        return cls(repository, check_name(prefix) if prefix else "")

    @property
    def url(self) -> str:
        repository = self.repository
        return f"hf://{repository.kind}s/{repository.name}/{self._prefix}".rstrip("/") + (
            repository.query
        )

    def below(self, prefix: str) -> Self:
        return type(self)(self.repository, self._prefix + check_name(prefix))

    def wait_seconds(self) -> float:
        return self.repository.budget.wait_seconds()

    # --- the six methods ----------------------------------------------------------------

    def read(self, name: str) -> bytes:
        path = self._path(name)
        files = self.repository.refresh()
        return self.repository.read(self._found(files, path), path)

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        path = self._path(name)
        add = CommitOperationAdd(path, data)

        def build(files: Files) -> list[Operation]:
            _refuse_below(files, path)
            if exclusive and path in files:
                raise NameTaken(f"{self._what(path)} is already stored")
            return [add]

        # A claim is small and somebody waits for it.
        self.repository.commit(f"{name}", build, urgent=True)

    def upload(self, source: Path, name: str) -> None:
        path = self._path(name)
        if not source.is_file():
            raise StoreError(f"{source} is not a file")
        add = CommitOperationAdd(path, source)

        def build(files: Files) -> list[Operation]:
            _refuse_below(files, path)
            if path in files:
                raise NameTaken(f"{self._what(path)} is already stored")
            return [add]

        self.repository.commit(name, build, urgent=True)

    def download(self, name: str, target: Path) -> None:
        path = self._path(name)
        found = self._found(self.repository.refresh(), path)
        self.repository.fetch(found, path, found.sha256, target, self._what(path))

    def names(self, prefix: str = "") -> Iterator[str]:
        return (listed.name for listed in self.listing(prefix))

    def delete(self, name: str) -> None:
        path = self._path(name)

        def build(files: Files) -> list[Operation]:
            return [CommitOperationDelete(path)] if path in files else []

        self.repository.commit(f"delete {name}", build, urgent=True)

    # --- what a remote store can do besides ----------------------------------------------

    def listing(self, prefix: str = "") -> Iterator[Listed]:
        folder = self._prefix + (f"{check_name(prefix)}/" if prefix else "")
        for path, file in self.repository.refresh().items():
            if path.startswith(folder) and path not in _HIDDEN:
                yield Listed(path.removeprefix(self._prefix), file.size)

    def commit(self, batch: Batch) -> None:
        everything = {**batch.blobs, **batch.writes, **batch.last}
        if batch.lease is not None:
            everything[batch.lease[0]] = batch.lease[1]
        if batch.marker is not None:
            everything[batch.marker[0]] = batch.marker[1]
        adds = {
            self._path(name): CommitOperationAdd(self._path(name), data)
            for name, data in everything.items()
        }

        def build(_: Files) -> list[Operation]:
            batch.check()
            # The check has looked again.
            files = self.repository.files
            if batch.lease is not None:
                self.repository.require_ours(files, self._path(batch.lease[0]))
            if batch.marker is not None and self._path(batch.marker[0]) in files:
                raise NameTaken(f"{self._what(self._path(batch.marker[0]))} is already stored")
            gone = {self._path(name) for name in batch.deletes} & files.keys() - adds.keys()
            return [*adds.values(), *(CommitOperationDelete(path) for path in sorted(gone))]

        self.repository.commit(batch.message, build, urgent=batch.urgent)
        if batch.lease is not None:
            self.repository.remember(self._path(batch.lease[0]), batch.lease[1])

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        files = self.repository.refresh()

        def bring(file: Wanted) -> None:
            path = self._path(file.name)
            found = self._found(files, path)
            if found.size != file.size:
                raise DamagedError(
                    f"{self._what(path)} is {found.size:,} bytes, manifest says {file.size:,}"
                )
            self.repository.fetch(found, path, file.sha256, file.target, self._what(path))

        all_of(bring, wanted)

    def task_finished(self, card: str) -> None:
        """Show the card of the newest finished task at the top; squash the history if asked to.

        A README that a person wrote stays.
        """
        files = self.repository.refresh()
        theirs = CARD in files and not is_ours(
            self.repository.read(files[CARD], CARD).decode(errors="replace")
        )
        if card and not theirs:
            add = CommitOperationAdd(CARD, card.encode())
            self.repository.commit("model card", lambda _: [add], urgent=True)
        if self.repository.is_squashed:
            self.repository.squash()

    def _path(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _found(self, files: Files, path: str) -> HubFile:
        if path not in files or path in _HIDDEN:
            raise NameMissing(f"{self._what(path)}: nothing is stored there")
        return files[path]

    def _what(self, path: str) -> str:
        return f"{self.repository.where}: {path}"


@dataclass(frozen=True)
class HubFile:
    """A file at a commit; `sha256` is empty for one that git itself keeps."""

    size: int
    oid: str
    sha256: str


Files = Mapping[str, HubFile]


@dataclass
class Repository:
    """One branch of one repository, as it was at the commit last looked at."""

    name: str
    kind: str
    is_private: bool = True
    is_squashed: bool = False
    query: str = ""
    head: str = ""
    files: dict[str, HubFile] = field(default_factory=dict)
    budget: CommitBudget = field(default_factory=CommitBudget.from_environment)
    _ours: dict[str, str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        disable_progress_bars()
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        self._place: dict[str, Any] = {"repo_id": self.name, "repo_type": self.kind}

    @property
    def where(self) -> str:
        return f"hf://{self.kind}s/{self.name}"

    def refresh(self) -> Files:
        """The files at the newest commit; none while there is no repository."""
        with self._lock:
            try:
                info = self._ask("looking", lambda: self.api.repo_info(**self._place))
            except NameMissing:
                self._require_token()
                self.head, self.files = "", {}
                return self.files
            if info.sha != self.head:
                entries = self._ask("listing", lambda: list(self._tree(info.sha)))
                self.files = {
                    entry.path: HubFile(
                        entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else ""
                    )
                    for entry in entries
                    if hasattr(entry, "blob_id")
                }
                self.head = info.sha
                if _LEDGER in self.files:
                    self.budget.read(self.read(self.files[_LEDGER], _LEDGER))
            return self.files

    def read(self, file: HubFile, path: str) -> bytes:
        """A whole file at the commit last looked at. Raises `DamagedError`."""
        for _ in range(TRIES):
            data = self._get(path, {})
            if _is_it(file, data):
                return data
        raise DamagedError(f"{self.where}: {path}: the bytes there are not what was saved")

    def fetch(self, file: HubFile, path: str, sha256: str, target: Path, what: str) -> None:
        """Bring a file to `target` in parts."""

        def read(start: int, length: int) -> bytes:
            if length == 0:
                return b""
            data = self._get(path, {"Range": f"bytes={start}-{start + length - 1}"})
            # A server may answer a range with everything.
            return data if len(data) == length else data[start : start + length]

        for _ in range(TRIES):
            fetch_in_parts(
                target, size=file.size, sha256=sha256, what=what, read=read, part_bytes=PART_BYTES
            )
            if sha256 or _is_it(file, target.read_bytes()):
                return
            target.unlink()
        raise DamagedError(f"{what}: the bytes that arrive are not what was saved")

    def commit(
        self, title: str, build: Callable[[Files], list[Operation]], *, urgent: bool = False
    ) -> None:
        """Commit what `build` makes of the files there are, on top of exactly those.

        Large files are sent first, while others may go on committing. A conflict, a server
        that is busy and one that asks to wait are waited out a bounded number of times.

        Raises:
            StoreError: the Hub did not take it.
        """
        token = os.urandom(8).hex()
        operations = build(self.refresh())
        if not operations:
            return
        self._create()
        self._send_large(operations)
        for attempt in range(1, _MANY_WRITERS + 1):
            with self._lock:
                operations = build(self.refresh())
                problem = self._try(title, operations, token) if operations else None
            if problem is None:
                return
            if attempt >= (_MANY_WRITERS if _is_conflict(problem) else _ATTEMPTS):
                raise self._explain(problem, "writing")
            self._wait_out(problem, attempt, urgent=urgent)
            if not _is_conflict(problem) and self._has_landed(token):
                return
        raise AssertionError("the last attempt returns or raises")

    def require_ours(self, files: Files, path: str) -> None:
        """Raise `FencedError` if a lease is not what this process last wrote."""
        ours = self._ours.get(path)
        if ours is not None and (path not in files or files[path].oid != ours):
            raise FencedError(f"{self.where}: {path} was taken over by somebody else")

    def remember(self, path: str, data: bytes) -> None:
        self._ours[path] = _git_oid(data)

    def squash(self) -> None:
        self._ask("squashing", lambda: self.api.super_squash_history(**self._place))
        self.refresh()

    # --- one try ------------------------------------------------------------------------

    def _try(self, title: str, operations: list[Operation], token: str) -> Exception | None:
        """One commit on top of what was looked at; returns what the Hub said against it."""
        ledger = CommitOperationAdd(_LEDGER, self.budget.noted())
        try:
            self.api.create_commit(
                **self._place,
                operations=[*operations, ledger],
                commit_message=title or "baton",
                commit_description=token,
                parent_commit=self.head,
            )
        # huggingface_hub lets the errors of its HTTP library through.
        except Exception as error:
            if not _is_of_network(error):
                raise
            return error
        self.budget.add()
        self.refresh()
        return None

    def _send_large(self, operations: list[Operation]) -> None:
        adds = [op for op in operations if isinstance(op, CommitOperationAdd)]
        self._ask(
            "sending files",
            lambda: self.api.preupload_lfs_files(**self._place, additions=adds, free_memory=False),
        )

    def _create(self) -> None:
        if not self.head:
            self._ask(
                "creating it",
                lambda: self.api.create_repo(**self._place, private=self.is_private, exist_ok=True),
            )
            self.refresh()

    def _has_landed(self, token: str) -> bool:
        """Did a commit arrive whose answer was lost?"""
        commits = self._ask("looking", lambda: self.api.list_repo_commits(**self._place))
        return any(token in (commit.message or "") for commit in commits[:_MANY_WRITERS])

    def _wait_out(self, error: Exception, attempt: int, *, urgent: bool) -> None:
        seconds = min(_LONGEST_WAIT_SECONDS, 0.2 * 2 ** min(attempt, 9))
        if (advertised := _retry_after(error)) is not None:
            self.budget.full_for(advertised)
            if advertised > _LONGEST_WAIT_SECONDS or urgent:
                raise self._explain(error, "writing")
            seconds = advertised
        if _is_conflict(error):
            seconds = random.uniform(0, min(2.0, 0.05 * 2 ** min(attempt, 6)))
        log.debug("%s: %s; again in %.1f s", self.where, error, seconds)
        time.sleep(seconds)

    def _tree(self, revision: str) -> Any:
        return self.api.list_repo_tree(**self._place, recursive=True, revision=revision)

    def _get(self, path: str, headers: dict[str, str]) -> bytes:
        url = hf_hub_url(
            self.name, path, repo_type=self.kind, revision=self.head, endpoint=self.api.endpoint
        )

        def get() -> bytes:
            answer = get_session().get(
                url, headers={**build_hf_headers(), **headers}, follow_redirects=True
            )
            hf_raise_for_status(answer)
            return bytes(answer.content)

        data: bytes = self._ask(f"reading {path}", get)
        return data

    def _ask(self, doing: str, request: Callable[[], Any]) -> Any:
        """Make a request, again a bounded number of times while the trouble may pass."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return request()
            except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
                if _status(error) == 401:
                    self._require_token()
                    raise self._explain(error, doing) from error
                raise NameMissing(f"{self.where}: {doing}: it is not there") from None
            except Exception as error:
                if not _is_of_network(error):
                    raise
                wait = _retry_after(error)
                passes = _status(error) in (None, 429, 500, 502, 503, 504)
                if not passes or attempt == _ATTEMPTS or (wait or 0) > _LONGEST_WAIT_SECONDS:
                    raise self._explain(error, doing) from error
                time.sleep(wait if wait is not None else 0.1 * 2**attempt)
        raise AssertionError("every attempt returns or raises")

    def _require_token(self) -> None:
        """The Hub says "not found" to strangers as well."""
        if get_token() is None:
            raise StoreRefused(
                f"{self.where}: there is no token; set HF_TOKEN or run `hf auth login`"
            )
        self._ask("asking who we are", self.api.whoami)

    def _explain(self, error: Exception, doing: str) -> StoreError:
        status = _status(error)
        if isinstance(error, OfflineModeIsEnabled):
            return StoreRefused(f"{self.where}: HF_HUB_OFFLINE is set; unset it to use this store")
        refused = {
            401: "the token is not valid; set HF_TOKEN to one that is (`hf auth login`)",
            403: "the token may not do that; it needs write access to this repository",
            404: "there is no such repository, or the token may not see it",
        }
        if status in refused:
            return StoreRefused(f"{self.where}: {doing}: {refused[status]}")
        if status == 429:
            wait = _retry_after(error)
            soon = f"in {wait:.0f} s" if wait is not None else "later"
            return StoreError(
                f"{self.where}: {doing}: too many requests or commits (128 an hour); again {soon}"
            )
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = "" if status else "; check HF_ENDPOINT and the network"
        return StoreError(f"{self.where}: {doing}: {lines[0]}{advice}")


def _refuse_below(files: Files, path: str) -> None:
    """A git tree has no place for a name below a name."""
    folders = path.split("/")
    above = ("/".join(folders[:count]) for count in range(1, len(folders)))
    taken = next((name for name in above if name in files), None)
    if taken or any(name.startswith(f"{path}/") for name in files):
        raise StoreError(f"{path}: {taken or path} is both a name and a folder there")


def _is_it(file: HubFile, data: bytes) -> bool:
    if file.sha256:
        return hashlib.sha256(data).hexdigest() == file.sha256
    return _git_oid(data) == file.oid


def _git_oid(data: bytes) -> str:
    # git's own name for these bytes, not a matter of security
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _is_conflict(error: Exception) -> bool:
    return _status(error) in (409, 412)


def _is_of_network(error: Exception) -> bool:
    """Is this an answer of the server, or of whatever carries requests to it?"""
    # hf_xet reports trouble on the way as Python's own ConnectionError; an answer that was
    # cut off or changed on the way is no JSON.
    known = (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        LocalTokenNotFoundError,
        ConnectionError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    )
    if isinstance(error, known):
        return True
    return type(error).__module__.partition(".")[0] in _NETWORK_MODULES


def _retry_after(error: Exception) -> float | None:
    """Seconds until the limit is reset, as `Retry-After` or `RateLimit: …;t=55` says."""
    response = getattr(error, "response", None)
    if response is None or response.status_code != 429:
        return None
    after = response.headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    found = re.search(r"\bt=(\d+)", response.headers.get("ratelimit", ""))
    return float(found[1]) if found else 5.0
