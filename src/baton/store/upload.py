"""Brings what a leg makes to a remote store, in the background: training never waits for it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from baton.errors import BatonError, DamagedError, FencedError, NameMissing, NameTaken
from baton.record import LegRecord, dump_json
from baton.store.base import Batch
from baton.store.checkpoint import Retention
from baton.store.mirror import Mirror
from baton.store.mirror_index import Changes
from baton.store.task_names import PROGRESS, newest_steps

log = logging.getLogger(__name__)

# After a failure the next try waits, longer each time.
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 60.0
# A leg that has ended without a deadline gives up after so long without getting anywhere.
_PATIENCE_SECONDS = 600.0
# Left of the grace for writing the leg's record and ending the process.
_RESERVE_SECONDS = 1.0
_END_SECONDS = 2.0


@dataclass(kw_only=True)
class Uploader:
    """Two threads of a leg: one sends checkpoints and records, one says that the leg lives.

    Of several checkpoints that wait, only the newest is sent, after the best (and later those
    that retention keeps for ever). A store that fails is tried again, and at every save;
    training hears of it in the log only, unless another leg has taken over (`fenced`).

    Attributes:
        stages: of the task, in their order.
        record: the leg's record as it is now; it is also the lease of the task.
        durable: called with a folder of checkpoints and the newest step of it that the store has.
    """

    mirror: Mirror
    stages: Sequence[str]
    record: Callable[[], LegRecord]
    durable: Callable[[str, int], None] = lambda prefix, step: None
    clock: Callable[[], float] = time.monotonic
    fenced: FencedError | None = None
    _retention: dict[str, Retention] = field(default_factory=dict)
    _wake: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _flush: bool = False
    _failing_since: float | None = None
    _damaged: set[int] = field(default_factory=set)
    _is_settled: threading.Event = field(default_factory=threading.Event)
    _committed_at: float = 0.0
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Begin; what an earlier leg could not send is sent first."""
        self._committed_at = self.clock()
        for work in (self._send_for_ever, self._beat_for_ever):
            # Daemons: when the grace is over the process must end, whatever hangs.
            thread = threading.Thread(target=work, name=work.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._wake.set()

    def saved(self, prefix: str, retention: Retention) -> None:
        """A checkpoint below `prefix` was committed here."""
        self._retention[prefix] = retention
        self._wake.set()

    def changed(self) -> None:
        """Something else is worth sending soon, such as a finished stage."""
        self._wake.set()

    def check_fence(self) -> None:
        """Raise the `FencedError` that a thread met."""
        if self.fenced is not None:
            raise self.fenced

    def finish(self, *, deadline: Callable[[], float | None]) -> list[str]:
        """Send everything there is; returns what could not be sent.

        Waits until all is there, `deadline` (a reading of the clock) comes near, another leg
        has taken over, or nothing has got any further for ten minutes.
        """
        self._is_settled.clear()
        self._flush = True
        self._wake.set()
        while not self._is_settled.wait(0.02) and self.fenced is None:
            until = deadline()
            if until is None and self._failing_since is not None:
                until = self._failing_since + _PATIENCE_SECONDS
            if until is not None and self.clock() > until - _RESERVE_SECONDS:
                break
        return [] if self._is_settled.is_set() else self._missing()

    def close(self) -> None:
        """End the threads, as far as they are not in a request."""
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=_END_SECONDS)

    # --- the thread that sends ----------------------------------------------------------

    def _send_for_ever(self) -> None:
        wait = _FIRST_WAIT_SECONDS
        while not self._stop.is_set():
            self._wake.wait(self.mirror.version.heartbeat_seconds)
            self._wake.clear()
            pause = 0.0 if self._flush else self.mirror.version.wait_seconds()
            if pause and self._pause(pause):
                continue
            is_flush = self._flush
            try:
                self._send()
                wait, self._failing_since = _FIRST_WAIT_SECONDS, None
                if is_flush:
                    self._is_settled.set()
                    self._flush = False
            except FencedError as error:
                self.fenced = error
                return
            except FileNotFoundError:
                self._wake.set()  # a stage removed what it no longer needs; look again
            except (BatonError, OSError) as error:
                self._failing_since = self._failing_since or self.clock()
                log.warning("not stored yet, training goes on: %s", error)
                self._pause(wait)
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
                self._wake.set()

    def _pause(self, seconds: float) -> bool:
        """Wait, but not through the end of the leg; true if there is something more urgent."""
        until = self.clock() + seconds
        while self.clock() < until:
            if self._stop.wait(0.1) or (self._flush and seconds > _FIRST_WAIT_SECONDS):
                return True
        return False

    def _send(self) -> None:
        """One round: checkpoints that should be there, then files and records.

        What a finished stage made goes before the first checkpoint of the next one: a machine
        that finds that checkpoint must find all it stands on.
        """
        while (due := self._next_checkpoint()) is not None:
            changes = self._changes()
            if changes.finished_stages():
                self.mirror.send(changes, self.record(), urgent=self._flush)
            self._send_checkpoint(*due)
            if self._stop.is_set():
                return
        changes = self._changes()
        if not changes.is_empty or self._flush:
            self.mirror.send(changes, self.record(), urgent=self._flush)
            self._committed_at = self.clock()

    def _changes(self) -> Changes:
        """What to send now: no marker of a stage whose checkpoints are not all there.

        Nor of a later one: whoever goes on from the first would do the later ones on top of it.
        """
        changes = self.mirror.changes()
        finished = set(changes.finished_stages())
        for number, stage in enumerate(self.stages):
            prefix = f"{stage}/checkpoints"
            if stage in finished and self._unsent(prefix, *self.mirror.steps(prefix)):
                return changes.with_markers_of(self.stages[:number])
        return changes.with_markers_of(self.stages)

    def _next_checkpoint(self) -> tuple[str, int] | None:
        """The checkpoint to send next: the newest, then what is kept for ever, newest first.

        The best goes before any newer one: whoever goes on from that, elsewhere, must find it.
        Until the leg's first save tells which it is, the oldest goes first. All that stays of a
        stage that is finished is sent: its marker promises them.
        """
        finished = self.mirror.changes().finished_stages()
        for prefix in self.mirror.prefixes():
            here, there = self.mirror.steps(prefix)
            self._note(prefix, there)
            missing = self._unsent(prefix, here, there)
            if not missing:
                continue
            retention = self._retention.get(prefix)
            is_finished = prefix.partition("/")[0] in finished
            if retention is None:
                # What is older than the store's newest has been there, or was let go.
                newer = [step for step in missing if is_finished or not there or step > there[-1]]
                if newer:
                    return prefix, newer[0]
                continue
            if retention.best in missing:
                return prefix, retention.best
            if not there or missing[-1] > there[-1]:
                return prefix, missing[-1]
            for step in reversed(missing):
                if is_finished or retention.keeps(step):
                    return prefix, step
        return None

    def _unsent(self, prefix: str, here: Sequence[int], there: Sequence[int]) -> list[int]:
        """Steps to send some time, oldest first: not those that would be let go on arrival.

        A machine that had the task before others did keeps checkpoints the store is past.
        """
        retention = self._retention.get(prefix)
        past = retention.dropped(sorted({*here, *there})) if retention is not None else []
        return [step for step in here if step not in {*there, *past, *self._damaged}]

    def _send_checkpoint(self, prefix: str, step: int) -> None:
        archive = self.mirror.archive(prefix)
        started = self.clock()
        try:
            with self.mirror.frozen_checkpoint(prefix, step) as (folder, manifest, data):
                batch = archive.sending(step, folder, manifest, data)
                retention = self._retention.get(prefix)
                if retention is not None:
                    dropped = retention.dropped([*archive.steps(), step])
                    names = archive.dropping(dropped, self.mirror.manifests()) if dropped else []
                    # A blob that the new checkpoint shares with a dropped one stays.
                    batch = replace(batch, deletes=[n for n in names if n not in batch.blobs])
                # Curves and logs first, or in the same commit: they must not lag behind.
                self.mirror.send(
                    self._changes(), self.record(), checkpoint=batch, urgent=self._flush
                )
        except NameTaken:
            # The same step of the same plan: another leg's bytes are as good.
            log.info("step %d was stored by another leg", step)
            return
        except NameMissing:
            return  # rotated away: there is a newer one
        except DamagedError as error:
            # Whoever resumes finds out too, and sets it aside.
            log.warning("not stored: %s", error)
            self._damaged.add(step)
            return
        self._committed_at = self.clock()
        self._note(prefix, [step])
        log.info(
            "stored task=%s step=%d bytes=%d seconds=%.3f",
            self.mirror.task,
            step,
            sum(entry.size for entry in manifest.files),
            self.clock() - started,
        )

    def _note(self, prefix: str, steps: Sequence[int]) -> None:
        """Remember what the store has, for `status` and for the leg's record."""
        newest = max(steps, default=None)
        if newest is not None and newest > self.mirror.index.durable.get(prefix, -1):
            self.mirror.index.durable[prefix] = newest
            self.mirror.index.write()
            self.durable(prefix, newest)

    def _missing(self) -> list[str]:
        """What is here only, in words for the leg's record."""
        missing = [
            f"{prefix}/step-{step:06d}"
            for prefix, step in newest_steps(set(self.mirror.local.names())).items()
            if step > self.mirror.index.durable.get(prefix, -1)
        ]
        return missing + sorted(self.mirror.changes().changed)

    # --- the thread that says that the leg lives ----------------------------------------

    def _beat_for_ever(self) -> None:
        every = self.mirror.version.heartbeat_seconds
        while not self._stop.wait(every / 5):
            if self.clock() - self._committed_at < every or self._flush:
                continue
            try:
                alive = Batch(message=f"{self.mirror.task}: leg {self.record().number} is at work")
                self.mirror.commit(alive, self.record())
                self._committed_at = self.clock()
            except FencedError as error:
                self.fenced = error
                return
            except (BatonError, OSError) as error:
                log.debug("no heartbeat: %s", error)


@contextlib.contextmanager
def saying_alive(mirror: Mirror, record: LegRecord, now: Callable[[], str]) -> Iterator[None]:
    """Say that a leg lives while it brings what is there, which may take longer than silence may.

    A leg that has been taken over meanwhile finds out when it stores something.
    """
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(mirror.version.heartbeat_seconds):
            try:
                mirror.local.write(PROGRESS, dump_json({"time": now()}))
                mirror.commit(Batch(message=f"{mirror.task}: leg {record.number} begins"), record)
            except (BatonError, OSError) as error:
                log.debug("no heartbeat: %s", error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=_END_SECONDS)


def within(seconds: float, work: Callable[[], None]) -> bool:
    """Do `work` on a thread that may be left behind; true if it ended in time, without error."""
    done = threading.Event()

    def run() -> None:
        try:
            work()
            done.set()
        except (BatonError, OSError) as error:
            log.warning("not stored: %s", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=seconds)
    return done.is_set()
