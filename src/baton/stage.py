"""A stage is a named step of a task; a leg is one process lifetime working on it."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from baton.errors import NameMissing
from baton.handover import StopSignal
from baton.record import LegRecord, Plan, TaskPlan, dump_json, replace
from baton.store.base import Store
from baton.store.checkpoint import Checkpoints, Retention
from baton.store.local import LocalStore
from baton.store.mirror import Mirror
from baton.store.task_names import PROGRESS
from baton.store.upload import Uploader

# Rewriting a small file is cheap, but a stage may report hundreds of times a second.
PROGRESS_EVERY_SECONDS = 0.25
HEARTBEAT_SECONDS = 10.0


class Outcome(enum.Enum):
    """How a stage ended, when it did not raise."""

    FINISHED = "finished"
    HANDED_OVER = "handed_over"


class Peers(Protocol):
    """The processes working on the same leg, one per device."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag: has any peer raised it? Every peer must call this the same times."""
        ...

    def broadcast(self, value: Any) -> Any:
        """The first peer's JSON value, on every peer."""
        ...


@dataclass(frozen=True)
class Alone:
    """The peers of a leg of one process."""

    rank: int = 0
    size: int = 1

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def broadcast(self, value: Any) -> Any:
        return value


@dataclass(kw_only=True)
class Leg:
    """All that a stage needs to know about where, when and for whom it runs.

    `store` is the task's folder; names in it are relative to the task. `notice` must stand
    first in whatever the stage writes for people. `mirror` is there when `store` copies a
    remote one, and `uploader` in the process that sends to it.
    """

    plan: Plan
    task: TaskPlan
    config: Any
    record: LegRecord
    store: LocalStore
    stop: StopSignal
    peers: Peers
    check_fence: Callable[[], None]
    now: Callable[[], str]
    clock: Callable[[], float] = time.monotonic
    notice: str = ""
    allow_changed: Sequence[str] = ()
    progress_every_seconds: float = PROGRESS_EVERY_SECONDS
    progress: dict[str, Any] = field(default_factory=dict)
    on_progress: Callable[[Mapping[str, Any]], None] | None = None
    mirror: Mirror | None = None
    uploader: Uploader | None = None
    _saved_below: str = ""
    _written: float = -1e9
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """The task's folder on this machine."""
        return self.store.root

    @property
    def is_first(self) -> bool:
        """Is this the process that writes for all peers?"""
        return self.peers.rank == 0

    def checkpoints(self, prefix: str) -> Checkpoints:
        """The checkpoints of a stage, here and in the remote store behind this folder."""
        here = Checkpoints(
            self.store, prefix, self.record.number, self.check_fence, self.now, self.notice
        )
        if self.mirror is None:
            return here
        return dataclasses.replace(here, elsewhere=self.mirror.elsewhere(here))

    def saved(self, prefix: str, step: int, retention: Retention) -> None:
        """A checkpoint is on this machine's disk; a remote store gets it in the background."""
        self._saved_below = prefix
        self.report(local_step=step)
        if self.uploader is None:
            self._note_durable(step)
        else:
            self.uploader.saved(prefix, retention)
            self._note_durable(self.uploader.mirror.index.durable.get(prefix))

    def stored(self, prefix: str, step: int) -> None:
        """The remote store has this newest checkpoint of a folder.

        What a finished stage left may arrive while the next one trains; its steps do not count.
        """
        if self._saved_below in ("", prefix):
            self._note_durable(step)

    def _note_durable(self, step: int | None) -> None:
        self.report(durable_step=step)
        self.amend(durable_step=step)

    def log(self, event: str, **values: object) -> None:
        """One line for one event, as `key=value`, with task and stage; the first peer's only."""
        if not self.is_first:
            return
        words = " ".join(f"{key}={_word(value)}" for key, value in values.items())
        stage = self.record.stage
        logging.getLogger("baton").info(
            "%s task=%s leg=%d stage=%s %s", event, self.task.name, self.record.number, stage, words
        )

    def report(self, *, now: bool = False, **values: Any) -> None:
        """Say how far the stage is; `status`, the progress bar and the heartbeat read it.

        The file is rewritten at most every `progress_every_seconds` unless `now`.
        """
        if not self.is_first:
            return
        with self._lock:
            self.progress.update(values)
            if now or self.clock() - self._written >= self.progress_every_seconds:
                self._write_progress()
        if self.on_progress is not None:
            self.on_progress(self.progress)

    def start_over(self, **values: Any) -> None:
        """Forget what the last stage reported."""
        with self._lock:
            self.progress.clear()
        self.report(now=True, **values)

    def _write_progress(self) -> None:
        self._written = self.clock()
        # A heartbeat need not survive a power cut, so no fsync; but never half a file.
        beside = self.folder / f".{PROGRESS}-{self.record.number:03d}"
        try:
            beside.write_bytes(dump_json(self.progress | {"time": self.now()}))
            os.replace(beside, self.folder / PROGRESS)
        except OSError as error:
            # Nothing depends on a progress report; what does will meet the full disk itself.
            logging.getLogger("baton").warning("progress was not written: %s", error)

    @contextlib.contextmanager
    def heartbeat(self, every_seconds: float = HEARTBEAT_SECONDS) -> Iterator[None]:
        """Rewrite the progress file in the background while a stage has nothing to report.

        A leg that loads a model for minutes must not look lost to other machines.
        """
        over = threading.Event()

        def beat() -> None:
            while not over.wait(every_seconds):
                self.report()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def amend(self, **changes: Any) -> None:
        """Note something in the leg's record; it is written when the leg ends."""
        self.record = replace(self.record, **changes)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A named step. `run` must be resumable: called again after a kill, it carries on.

    `all_peers` is False for a stage that one process does while the others wait.
    """

    name: str
    run: Callable[[Leg], Outcome]
    all_peers: bool = True


def read_progress(folder: Path) -> dict[str, Any]:
    """What the newest leg of a task last reported; empty where nothing readable is."""
    return progress_in(LocalStore(folder))


def progress_in(store: Store) -> dict[str, Any]:
    """What the newest leg of the task in `store` last reported there."""
    try:
        progress = json.loads(store.read(PROGRESS))
    except (NameMissing, ValueError):
        # Written without fsync, so a power cut may leave half of it: nothing depends on it.
        return {}
    return progress if isinstance(progress, dict) else {}


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if " " in text or not text else text
