"""A stage is a named step of a task; a leg is one process lifetime working on it."""

from __future__ import annotations

import enum
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from baton.handover import StopSignal
from baton.record import LegRecord, Plan, TaskPlan, dump_json, replace
from baton.store.local import LocalStore

PROGRESS = "progress.json"
# Rewriting a small file is cheap, but a stage may report hundreds of times a second.
_PROGRESS_EVERY_SECONDS = 0.25


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
    first in whatever the stage writes for people.
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
    progress: dict[str, Any] = field(default_factory=dict)
    on_progress: Callable[[Mapping[str, Any]], None] | None = None
    _written: float = -1e9

    @property
    def folder(self) -> Path:
        """The task's folder on this machine."""
        return self.store.root

    @property
    def is_first(self) -> bool:
        """Is this the process that writes for all peers?"""
        return self.peers.rank == 0

    def log(self, event: str, **values: object) -> None:
        """One line for one event, as `key=value`, with task and stage."""
        words = " ".join(f"{key}={_word(value)}" for key, value in values.items())
        stage = self.record.stage
        logging.getLogger("baton").info(
            "%s task=%s leg=%d stage=%s %s", event, self.task.name, self.record.number, stage, words
        )

    def report(self, *, now: bool = False, **values: Any) -> None:
        """Say how far the stage is; `status`, the progress bar and the heartbeat read it.

        The file is rewritten at most four times a second unless `now`.
        """
        if not self.is_first:
            return
        self.progress.update(values)
        if now or self.clock() - self._written >= _PROGRESS_EVERY_SECONDS:
            self._written = self.clock()
            # A heartbeat need not survive a power cut, so no fsync; but never half a file.
            beside = self.folder / f".{PROGRESS}.{os.getpid()}"
            beside.write_bytes(dump_json(self.progress | {"time": self.now()}))
            os.replace(beside, self.folder / PROGRESS)
        if self.on_progress is not None:
            self.on_progress(self.progress)

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


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if " " in text or not text else text
