"""One branch of one repository of the Hub: files as they were last looked at, commits on top."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    get_session,
    hf_hub_url,
)
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
)

from baton.errors import DamagedError, FencedError, NameMissing
from baton.store.commits import CommitBudget
from baton.store.hub_errors import (
    LONGEST_WAIT_SECONDS,
    explain,
    is_conflict,
    is_of_network,
    retry_after,
)
from baton.store.hub_requests import ATTEMPTS, asked, hub_api, require_identity
from baton.store.partial import PART_BYTES, TRIES, fetch_in_parts
from baton.store.patience import IMPATIENT, Patience

log = logging.getLogger(__name__)

# Ours alone, never listed: when commits were made, so that all writers share one budget.
LEDGER = ".baton/commits.json"
_MANY_WRITERS = 30

Operation = CommitOperationAdd | CommitOperationDelete


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
    patience: Patience = IMPATIENT
    # By lease, what this process wrote or may have written, where no answer came.
    _ours: dict[str, set[str]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        disable_progress_bars()
        self.api = hub_api()
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
                require_identity(self.where)
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
                if LEDGER in self.files:
                    self.budget.read(self.read(self.files[LEDGER], LEDGER))
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
        tries = 0

        def insisted() -> None:
            nonlocal tries
            tries += 1
            if tries == 1 or not self._has_landed(token):
                self._commit(title, build, token, urgent=urgent)

        self.patience.insist(insisted)

    def require_ours(self, files: Files, path: str) -> None:
        """Raise `FencedError` if a lease is not what this process wrote."""
        ours = self._ours.get(path)
        if ours is not None and (path not in files or files[path].oid not in ours):
            raise FencedError(f"{self.where}: {path} was taken over by somebody else")

    def begin(self, path: str, data: bytes) -> None:
        """A lease is about to be written, which may succeed and look as if it had not."""
        if path in self._ours:
            self._ours[path].add(_git_oid(data))

    def remember(self, path: str, data: bytes) -> None:
        """A lease was written."""
        self._ours[path] = {_git_oid(data)}

    def squash(self) -> None:
        self._ask("squashing", lambda: self.api.super_squash_history(**self._place))
        self.refresh()

    # --- one commit ---------------------------------------------------------------------

    def _commit(
        self, title: str, build: Callable[[Files], list[Operation]], token: str, *, urgent: bool
    ) -> None:
        for attempt in range(1, _MANY_WRITERS + 1):
            with self._lock:
                operations = build(self.refresh())
                problem = self._try(title, operations, token) if operations else None
            if problem is None:
                return
            if attempt >= (_MANY_WRITERS if is_conflict(problem) else ATTEMPTS):
                raise explain(problem, where=self.where, doing="writing")
            self._wait_out(problem, attempt, urgent=urgent)
            if not is_conflict(problem) and self._has_landed(token):
                return
        raise AssertionError("the last attempt returns or raises")

    def _try(self, title: str, operations: list[Operation], token: str) -> Exception | None:
        """One commit on top of what was looked at; returns what the Hub said against it."""
        ledger = CommitOperationAdd(LEDGER, self.budget.noted())
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
            if not is_of_network(error):
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
        seconds = min(LONGEST_WAIT_SECONDS, 0.2 * 2 ** min(attempt, 9))
        if (advertised := retry_after(error)) is not None:
            self.budget.full_for(advertised)
            if advertised > LONGEST_WAIT_SECONDS or urgent:
                raise explain(error, where=self.where, doing="writing")
            seconds = advertised
        if is_conflict(error):
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
        return self.patience.insist(lambda: self._ask_now(doing, request))

    def _ask_now(self, doing: str, request: Callable[[], Any]) -> Any:
        return asked(request, where=self.where, doing=doing)


def _is_it(file: HubFile, data: bytes) -> bool:
    if file.sha256:
        return hashlib.sha256(data).hexdigest() == file.sha256
    return _git_oid(data) == file.oid


def _git_oid(data: bytes) -> str:
    # git's own name for these bytes, not a matter of security
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
