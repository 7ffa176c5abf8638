"""The legs of one task: who works on it now, who did before, and who may not any more."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import DamagedError, FencedError, NameTaken, NoProgressError
from baton.identity import started_ticks
from baton.record import LegRecord, Runner, replace
from baton.stage import progress_in
from baton.store.base import Store

# A leg that runs elsewhere and has not said anything for so long counts as lost.
HEARTBEAT_TIMEOUT_SECONDS = 90.0
_LEG = re.compile(r"legs/(\d{3,})\.json")
NO_PROGRESS_LEGS = 3


@dataclass(frozen=True)
class Legs:
    """The leg records below `legs/` in a task's store, which several machines may share.

    `lost_after_seconds`: a leg on another machine that is silent for so long counts as lost.
    """

    store: Store
    task: str
    now: Callable[[], str]
    lost_after_seconds: float = HEARTBEAT_TIMEOUT_SECONDS

    def history(self) -> list[LegRecord]:
        """Every leg so far, oldest first."""
        return [self._read(number) for number in self._numbers()]

    def newest(self) -> LegRecord | None:
        """The record of the newest leg."""
        numbers = self._numbers()
        return self._read(numbers[-1]) if numbers else None

    def wait_for_silence(
        self, record: LegRecord, *, should_stop: Callable[[], bool], poll_seconds: float = 0.5
    ) -> None:
        """Wait out the heartbeat of a leg whose process cannot be looked at from here.

        After a reboot, or in a new container, the old leg is almost surely gone, but only its
        silence proves it. Returns when it is silent long enough, ended, or wanted no more.

        Raises:
            FencedError: it gave a sign of life.
        """
        leg = self.newest()
        if leg is None or leg.runner.is_visible_from(record.runner):
            return
        heard = progress_in(self.store).get("time")
        while leg.state == "active" and self.is_alive(leg, record.runner, record.submission):
            if progress_in(self.store).get("time") != heard:
                raise FencedError(self._busy(leg))
            if should_stop():
                return
            time.sleep(poll_seconds)
            leg = self._read(leg.number)

    def open(self, record: LegRecord) -> LegRecord:
        """Claim the task: write the record of a new, active leg under the next number.

        Raises:
            FencedError: another leg is at work, or another runner claimed the task first.
            NoProgressError: the last legs of this submission left nothing durable behind.
        """
        history = self.history()
        for place, leg in enumerate(history):
            if leg.state == "active":
                if self.is_alive(leg, record.runner, record.submission):
                    raise FencedError(self._busy(leg))
                history[place] = replace(
                    leg,
                    state="lost",
                    ended=self.now(),
                    position_at_end=record.position,
                    reason="ended without a word: killed, or its node was lost",
                )
                self.close(history[place])
        record = replace(record, number=history[-1].number + 1 if history else 1)
        self._refuse_crash_loop(history, record)
        try:
            self.store.write(self._name(record.number), record.to_json(), exclusive=True)
        except NameTaken:
            raise FencedError(
                f"{self.task}: another runner claimed leg {record.number} at the same moment;"
                " this one stops"
            ) from None
        return record

    def close(self, record: LegRecord) -> None:
        """Write how a leg ended."""
        self.store.write(self._name(record.number), record.to_json())

    def check_fence(self, number: int) -> None:
        """Raise `FencedError` if a leg newer than `number` has started."""
        newest = max(self._numbers(), default=0)
        if newest > number:
            raise FencedError(
                f"{self.task}: leg {newest} has taken over from leg {number}; this one stops"
            )

    def _numbers(self) -> list[int]:
        found = (_LEG.fullmatch(name) for name in self.store.names("legs"))
        return sorted(int(match[1]) for match in found if match)

    def _read(self, number: int) -> LegRecord:
        where = f"{self.store.url}/{self._name(number)}"
        try:
            return LegRecord.from_json(self.store.read(self._name(number)), where=where)
        except DamagedError as error:
            raise DamagedError(
                f"{error}; move it away and submit again: what it said of leg {number} is lost,"
                " and nothing else"
            ) from error

    def _name(self, number: int) -> str:
        return f"legs/{number:03d}.json"

    def is_alive(self, leg: LegRecord, here: Runner, submission: str = "") -> bool:
        """Is an active leg really at work, seen from the process `here`?"""
        if leg.runner.is_visible_from(here):
            return started_ticks(leg.runner.pid) == leg.runner.started_ticks
        if leg.submission.startswith(("slurm:", "docker:")) and _same_place(leg, submission):
            # Slurm runs a job once, and an engine has one container of a name: that we run means
            # that the older leg does not.
            return False
        return self._silent_seconds(leg) < self.lost_after_seconds

    def _silent_seconds(self, leg: LegRecord) -> float:
        last = max(leg.started, str(progress_in(self.store).get("time", "")))
        spoken = datetime.datetime.fromisoformat(last)
        return (datetime.datetime.fromisoformat(self.now()) - spoken).total_seconds()

    def _busy(self, leg: LegRecord) -> str:
        runner = leg.runner
        return (
            f"{self.task}: leg {leg.number} is already working on this task (process {runner.pid}"
            f" on {runner.host}, since {leg.started}); wait for it, or stop it with"
            f" `baton cancel {self.task}`. A leg on another machine counts as lost"
            f" {self.lost_after_seconds:.0f} s after its last sign of life"
        )

    def _refuse_crash_loop(self, history: list[LegRecord], record: LegRecord) -> None:
        """Stop when the last legs of this submission all began where this one would begin."""
        mine = [leg for leg in history if leg.submission == record.submission]
        recent = mine[-NO_PROGRESS_LEGS:]
        if len(recent) < NO_PROGRESS_LEGS or any(leg.position != record.position for leg in recent):
            return
        reasons = "; ".join(f"leg {leg.number} {_lasted(leg)}: {leg.reason}" for leg in recent)
        raise NoProgressError(
            f"{self.task}: {NO_PROGRESS_LEGS} legs in a row left nothing durable behind"
            f" ({reasons}). Mend the cause, give the legs more time, or save more often"
            " (train.save_every_steps); then submit again"
        )


def _same_place(leg: LegRecord, submission: str) -> bool:
    """Do both run in the same job or container? A `#` parts its name from the submission's."""
    return leg.submission.partition("#")[0] == submission.partition("#")[0]


def _lasted(leg: LegRecord) -> str:
    if leg.ended is None:
        return "is active"
    start, end = map(datetime.datetime.fromisoformat, (leg.started, leg.ended))
    return f"{leg.state} after {(end - start).total_seconds():.0f} s"


def utc_now() -> str:
    """The time as every record writes it: ISO 8601, UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
