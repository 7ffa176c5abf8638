"""Requests to one bucket of the Hugging Face Hub, and how one of several writers wins there.

Files go through Xet, which sends only chunks that the Hub does not have. A bucket has no
conditional writes: where only one writer may win, each first writes a claim under a name of its
own and then lists all claims. It goes on only if its own is the only one. Of two that meet, the
later listing shows both, so never do both go on: the earlier one waits, the other takes its
claim back. A claim of a process that died is passed over: at once on its own machine, after a
while on another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import get_session
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status

from baton.errors import (
    DamagedError,
    FencedError,
    NameMissing,
    NameTaken,
    StoreBusy,
    StoreError,
    StoreRefused,
)
from baton.identity import started_ticks, this_runner
from baton.record import Runner
from baton.store.hub_requests import asked, hub_api, require_identity
from baton.store.objects import HIDDEN
from baton.store.partial import TRIES, fetch_in_parts
from baton.store.patience import IMPATIENT, Patience

_CLAIMS, _STAGED = f"{HIDDEN}claims/", f"{HIDDEN}staged/"
_CLAIM = re.compile(r"(?P<machine>\w+)\.(?P<pid>\d+)\.(?P<ticks>\d+)\.\w+")
# What Xet calls no bytes.
_EMPTY = "0" * 64
# A claim older than another by so much was left by a process that died; whoever makes one writes
# what it is for within half of that, or starts again.
_STALE_SECONDS = 40.0


@dataclass
class HubBucket:
    """Requests to one bucket, repeated a bounded number of times, with errors for people."""

    name: str
    is_private: bool = True
    query: str = ""
    patience: Patience = IMPATIENT
    # Xet hashes of what this process wrote or may have written, where no answer came: one of
    # them a lease must still be to be renewed.
    _written: dict[str, set[str]] = field(default_factory=dict)
    _renewing: threading.Lock = field(default_factory=threading.Lock)
    _is_there: bool = False

    def __post_init__(self) -> None:
        disable_progress_bars()
        self.api: Any = hub_api()

    @property
    def where(self) -> str:
        return f"hf://buckets/{self.name}"

    def look(self) -> None:
        """Find out whether the bucket is there. Raises `StoreRefused` if we may not."""
        try:
            self._ask("looking", lambda: self.api.bucket_info(self.name))
            self._is_there = True
        except NameMissing:
            require_identity(self.where)

    # --- what a store needs of a bucket ------------------------------------------------------

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        for file in self._tree(prefix):
            if not file.path.startswith(HIDDEN):
                yield file.path, file.size

    def size(self, key: str) -> int | None:
        found = self._find(key)
        return None if found is None else int(found.size)

    def get(self, key: str, what: str) -> bytes:
        for _ in range(TRIES):
            found = self._require(key, what)
            data = self.get_range(key, 0, found.size, what)
            if _is_it(data, found):
                return data
        raise DamagedError(f"{what}: the bytes there are not what was saved")

    def get_range(self, key: str, start: int, length: int, what: str) -> bytes:
        if length == 0:
            return b""
        url = f"{self.api.endpoint}/buckets/{self.name}/resolve/{quote(key, safe='')}"
        headers = build_hf_headers() | {"Range": f"bytes={start}-{start + length - 1}"}

        def get() -> bytes:
            answer = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
            data = bytes(answer.content)
            # A server may answer a range with everything.
            return data[start : start + length] if answer.status_code == 200 else data

        try:
            data: bytes = self._ask(f"reading {key}", get)
        except NameMissing:
            raise NameMissing(f"{what}: nothing is stored there") from None
        return data

    def download(self, key: str, what: str, target: Path) -> None:
        for _ in range(TRIES):
            found = self._require(key, what)
            fetch_in_parts(
                target,
                size=found.size,
                sha256="",
                what=what,
                read=lambda start, length: self.get_range(key, start, length, what),
            )
            if _is_it(target, found):
                return
            target.unlink()
        raise DamagedError(f"{what}: the bytes that arrive are not what was saved")

    def put(self, items: Mapping[str, bytes | Path], *, sha256: str = "") -> None:
        self._make()
        self._change("writing", add=items)
        self._remember(items)

    def create(self, key: str, data: bytes | Path) -> None:
        self._make()
        if isinstance(data, bytes):
            self._create(key, _xet_hash(data), add={key: data})
            self._remember({key: data})
            return
        # Its bytes may take their time; after that it only needs its name.
        staged = f"{_STAGED}{os.urandom(8).hex()}"
        try:
            self._change(f"writing {key}", add={staged: data})
            digest = self._require(staged, key).xet_hash
            self._create(key, digest, copy={key: digest})
        finally:
            self._tidy([staged])

    def renew(self, key: str, data: bytes, what: str) -> None:
        # A heartbeat and a checkpoint may both renew it.
        with self._renewing:
            if (ours := self._written.get(key)) is not None:
                found = self._find(key)
                if found is None or found.xet_hash not in ours:
                    raise FencedError(f"{what} was taken over by somebody else")
                ours.add(_xet_hash(data))
            self.put({key: data})

    def delete(self, keys: Sequence[str]) -> None:
        # In a bucket that nobody has created nothing is to be removed.
        with contextlib.suppress(NameMissing):
            self._change("deleting", delete=keys)

    def sweep(self, older_than_seconds: float) -> list[str]:
        """Remove what processes that died have left of exclusive writes; returns its keys."""
        now = datetime.now(UTC)
        left = [
            file.path
            for file in self._tree(HIDDEN)
            if (now - _since(file)).total_seconds() > older_than_seconds
        ]
        if left:
            self.delete(left)
        return left

    # --- one of several writers ----------------------------------------------------------------

    def _create(self, key: str, digest: str, **how: Any) -> None:
        """Make an object that is not there, while nobody else does."""
        is_sent = False

        def is_there() -> bool:
            found = self._find_now(key)
            if found is None:
                return False
            # An earlier try of ours may have arrived, and its answer not.
            if is_sent and found.xet_hash == digest:
                return True
            raise NameTaken(f"{self.where}: {key} is already stored")

        def insisted() -> None:
            nonlocal is_sent
            until, wait = time.monotonic() + 2 * _STALE_SECONDS, 0.05
            while not is_there():
                with self._claim(key) as is_alone:
                    if is_alone and not is_there():
                        is_sent = True
                        self._change_now(f"writing {key}", **how)
                        return
                if time.monotonic() > until or self.patience.should_stop():
                    raise StoreBusy(f"{self.where}: writing {key}: others are at it, too")
                time.sleep(random.uniform(0, wait))
                wait = min(2 * wait, 4.0)

        self.patience.insist(insisted)

    @contextlib.contextmanager
    def _claim(self, key: str) -> Iterator[bool]:
        """Say that we want to write an object, and for so long.

        Yields:
            Are we the only one who does? Of two, at most one is told so.
        """
        folder = f"{_CLAIMS}{hashlib.sha256(key.encode()).hexdigest()[:32]}/"
        mine, begun = f"{folder}{_this_claim()}", time.monotonic()
        self._change_now("claiming", add={mine: b"claim"})
        try:
            yield self._is_alone(folder, mine, until=begun + _STALE_SECONDS / 2)
        finally:
            self._tidy([mine])

    def _tidy(self, names: Sequence[str]) -> None:
        """Remove what only this process has use for; where that fails, it is in nobody's way."""
        with contextlib.suppress(StoreError):
            self._change_now("tidying up", delete=names)

    def _is_alone(self, folder: str, mine: str, *, until: float) -> bool:
        """Is ours the only claim, at once or as soon as later ones were taken back?"""
        wait = 0.05
        while True:
            found = {file.path: _since(file) for file in self._tree_now(folder)}
            if (now := found.pop(mine, None)) is None:
                return False
            # Ages are by the server's clock, as ours is.
            dead = [
                path
                for path, begun in found.items()
                if (now - begun).total_seconds() > _STALE_SECONDS or _is_dead(path)
            ]
            if dead:
                self._tidy(dead)
            others = [(begun, path) for path, begun in found.items() if path not in dead]
            if time.monotonic() > until:
                return False
            if not others:
                return True
            if min(others) < (now, mine) or self.patience.should_stop():
                return False
            time.sleep(wait)
            wait = min(2 * wait, 1.0)

    # --- requests ------------------------------------------------------------------------------

    def _make(self) -> None:
        if not self._is_there:
            self._ask(
                "creating it",
                lambda: self.api.create_bucket(self.name, private=self.is_private, exist_ok=True),
            )
            self._is_there = True

    def _remember(self, items: Mapping[str, bytes | Path]) -> None:
        for key, data in items.items():
            if isinstance(data, bytes):
                self._written[key] = {_xet_hash(data)}

    def _change(self, doing: str, **what: Any) -> None:
        self.patience.insist(lambda: self._change_now(doing, **what))

    def _change_now(
        self,
        doing: str,
        *,
        add: Mapping[str, bytes | Path] | None = None,
        copy: Mapping[str, str] | None = None,
        delete: Sequence[str] = (),
    ) -> None:
        """Write, name (`copy` has Xet hashes) and remove objects, in one request at the end."""

        def change() -> None:
            try:
                self.api.batch_bucket_files(
                    self.name,
                    add=[(data, key) for key, data in (add or {}).items()],
                    copy=[("bucket", self.name, xet, key) for key, xet in (copy or {}).items()],
                    delete=list(delete),
                )
            except Exception as error:
                if not _is_of_xet(error):
                    raise
                if isinstance(error, PermissionError) or re.search(r"\(40[13] ", str(error)):
                    raise StoreRefused(
                        f"{self.where}: {doing}: the token may not write to this bucket ({error})"
                    ) from error
                raise ConnectionError(str(error)) from error

        asked(change, where=self.where, doing=doing, repeats_itself=True)

    def _tree(self, prefix: str) -> list[Any]:
        return self.patience.insist(lambda: self._tree_now(prefix))

    def _tree_now(self, prefix: str) -> list[Any]:
        folder = prefix.rpartition("/")[0] or None

        def listed() -> list[Any]:
            return list(self.api.list_bucket_tree(self.name, folder, recursive=True))

        try:
            entries = asked(listed, where=self.where, doing="listing it", repeats_itself=True)
        except NameMissing:
            return []
        return [e for e in entries if e.type == "file" and e.path.startswith(prefix)]

    def _find(self, key: str) -> Any:
        return self.patience.insist(lambda: self._find_now(key))

    def _find_now(self, key: str) -> Any:
        """Size, Xet hash and more of an object; None if there is none."""
        try:
            found = asked(
                lambda: list(self.api.get_bucket_paths_info(self.name, [key])),
                where=self.where,
                doing=f"looking at {key}",
                repeats_itself=True,
            )
        except NameMissing:
            return None
        return found[0] if found else None

    def _require(self, key: str, what: str) -> Any:
        found = self._find(key)
        if found is None:
            raise NameMissing(f"{what}: nothing is stored there")
        return found

    def _ask(self, doing: str, request: Callable[[], Any]) -> Any:
        return self.patience.insist(lambda: asked(request, where=self.where, doing=doing))


def _is_it(content: bytes | Path, found: Any) -> bool:
    return bool(found.size == 0 or _xet_hash(content) == found.xet_hash)


def _since(file: Any) -> datetime:
    """When it was stored, by the server's clock; else by the writer's."""
    moment = file.uploaded_at or file.mtime
    return moment if moment is not None else datetime.now(UTC)


def _this_claim() -> str:
    """A name that tells processes of this machine who made it."""
    here = this_runner()
    return f"{_machine(here)}.{here.pid}.{here.started_ticks}.{os.urandom(8).hex()}"


def _is_dead(claim: str) -> bool:
    """Was it made by a process of this machine that is no more?

    Of a name that is not ours nobody knows; it is in the way until it is old.
    """
    made = _CLAIM.fullmatch(claim.rpartition("/")[2])
    if made is None or made["machine"] != _machine(this_runner()):
        return False
    return started_ticks(int(made["pid"])) != int(made["ticks"])


def _machine(runner: Runner) -> str:
    return hashlib.sha256(f"{runner.boot} {runner.pid_namespace}".encode()).hexdigest()[:16]


def _is_of_xet(error: Exception) -> bool:
    """Is this what hf_xet makes of trouble on the way, with a status in its words?"""
    ours = (ConnectionError, TimeoutError, RuntimeError)
    return isinstance(error, ours) or type(error).__module__.partition(".")[0] == "hf_xet"


def _xet_hash(content: bytes | Path) -> str:
    """What Xet calls these bytes."""
    from hf_xet import hash_files

    if isinstance(content, Path):
        return str(hash_files([str(content)])[0].hash)
    if not content:
        return _EMPTY
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return str(hash_files([file.name])[0].hash)
