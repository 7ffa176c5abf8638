"""How a leg makes a task its own, where all machines can see it, and brings what is there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from baton.errors import BatonError, ExitStatus, StoreBusy
from baton.handover import StopSignal
from baton.legs import Legs
from baton.record import LegRecord, replace
from baton.store.mirror import Mirror
from baton.store.upload import saying_alive

# How often a leg that waits for another machine's to fall silent looks into a remote store.
_LOOK_SECONDS = 5.0


def claim(
    record: LegRecord,
    legs: Legs,
    mirror: Mirror | None,
    stages: Sequence[str],
    stop: StopSignal,
) -> LegRecord:
    """Claim the task of `legs`; with a remote store there, and bring what it has.

    Returns the leg's record with its number. A leg that cannot bring what is there says so in
    its record, as far as the store takes even that.

    Raises:
        FencedError: another leg is at work, or was faster.
        NoProgressError: the last legs of this submission left nothing durable behind.
        StoreError: the store did not give out what it has.
    """
    if mirror is None:
        legs.wait_for_silence(record, should_stop=lambda: stop.is_set)
        return legs.open(record)
    legs = Legs(mirror.remote, legs.task, legs.now, mirror.version.lost_after_seconds)
    legs.wait_for_silence(record, should_stop=lambda: stop.is_set, poll_seconds=_LOOK_SECONDS)
    record = legs.open(record)
    try:
        with saying_alive(mirror, record, legs.now):
            mirror.pull(stages, leg=record.number)
    except BatonError as error:
        is_stopped = isinstance(error, StoreBusy) and stop.is_set
        ended = replace(
            record,
            state="handed_over" if is_stopped else "failed",
            ended=legs.now(),
            reason=f"{type(error).__name__}: {error}",
            signal=stop.name,
            exit_status=ExitStatus.HANDED_OVER if is_stopped else error.exit_status,
        )
        # The next leg need not wait for this one to fall silent; if even that does not arrive,
        # it does.
        with contextlib.suppress(BatonError):
            legs.close(ended)
        raise
    return record
