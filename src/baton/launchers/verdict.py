"""What the end of a leg means: is its task finished, given up, or started again?"""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import dataclass, field

from baton.errors import ExitStatus
from baton.handover import StopSignal
from baton.launchers.base import Request, View, last_error
from baton.legs import Legs, utc_now
from baton.record import LegRecord
from baton.runner import task_store
from baton.store.local import LocalStore
from baton.store.task_names import CANCELLED


@dataclass
class Verdicts:
    """Judges the legs that a launcher has watched to their end; counts failures by task."""

    request: Request
    stop: StopSignal
    retries: int
    view: View
    failures: Counter[str] = field(default_factory=Counter)

    def newest(self, task: str) -> LegRecord | None:
        """The record of a task's newest leg; its number tells whether another has begun since."""
        return Legs(self._store(task), task, utc_now).newest()

    def of(
        self, task: str, status: int, *, before: LegRecord | None, why: str = ""
    ) -> ExitStatus | None:
        """How a task ended, or None if it is to be started again.

        `status` is the exit status, or minus the number of the signal that killed the leg, which
        `why` explains where it is known; `before` was the newest record when the leg started.
        """
        record = self.newest(task)
        reason = f": {record.reason}" if record and record.reason else ""
        if status == ExitStatus.FINISHED:
            self.view.event(task, "finished")
            return ExitStatus.FINISHED
        if self._store(task).path(CANCELLED).exists():
            self.view.event(task, "cancelled")
            return ExitStatus.STOP
        if status == ExitStatus.HANDED_OVER:
            step = record.durable_step if record else None
            kept = "nothing to resume from yet" if step is None else f"step {step} is durable"
            self.view.event(task, f"handed over, {kept}{reason}")
            # A leg that saved what it did: what fails after it has not failed in a row.
            if record and record.position_at_end != record.position:
                self.failures[task] = 0
            return ExitStatus.HANDED_OVER if self.stop.is_set else None
        if status == ExitStatus.STOP:
            self.view.event(task, f"stopped{self._last_words(task, reason)}")
            return ExitStatus.STOP
        killed = f"killed by {signal.Signals(-status).name}" if status < 0 else f"failed ({status})"
        killed += f" ({why})" if why else ""
        was_recorded = record is not None and (before is None or record.number > before.number)
        if status > 0 or why or not was_recorded:
            # A kill is somebody's doing and says nothing about the task, and the crash-loop rule
            # of legs.py bounds those; but it only knows of legs that lived to leave a record.
            self.failures[task] += 1
            killed += self._last_words(task, reason) if status > 0 else ""
        if self.failures[task] > self.retries:
            self.view.event(
                task, f"{killed}; given up after {self.failures[task]} failures in a row"
            )
            return ExitStatus.FAILED
        self.view.event(task, f"{killed}; starting again")
        return ExitStatus.HANDED_OVER if self.stop.is_set else None

    def _store(self, task: str) -> LocalStore:
        return task_store(self.request.store_root, self.request.plan, task)

    def _last_words(self, task: str, reason: str) -> str:
        """Why a leg ended: the last error it printed, or its record."""
        said = last_error(self._store(task).root)
        return f": {said}" if said else reason
