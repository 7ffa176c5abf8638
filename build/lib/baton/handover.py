"""The signal to stop early with work saved, as a flag the loop asks for between steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

# TERM is what Slurm and Docker send; USR2 what our batch script asks Slurm for (NCCL has
# claimed USR1 before); USR1 what other people's scripts use; INT is Ctrl-C in a terminal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Set by the first signal; a second one means now: do not even finish the step."""

    def __init__(
        self, *, grace_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.grace_seconds = grace_seconds
        self._clock = clock
        self._received: tuple[tuple[int, float], ...] = ()

    def install(self) -> StopSignal:
        """Take over the stop signals of this process; call before any slow import."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # One assignment and nothing else: a handler can interrupt a save half-way.
        self._received = (*self._received, (number, self._clock()))

    @property
    def is_set(self) -> bool:
        return bool(self._received)

    @property
    def is_urgent(self) -> bool:
        """Has a second signal come, a moment after the first?

        Slurm sends TERM to every process of a step and CONT/USR pairs within milliseconds;
        only a repeat after a second is somebody insisting.
        """
        return len(self._received) > 1 and self._received[-1][1] - self._received[0][1] > 1.0

    @property
    def name(self) -> str:
        """`SIGTERM`, or an empty text while none has come."""
        return signal.Signals(self._received[0][0]).name if self._received else ""

    @property
    def deadline(self) -> float | None:
        """Clock reading at which the grace is over, None while no signal has come."""
        return self._received[0][1] + self.grace_seconds if self._received else None

    def seconds_since(self) -> float:
        """Seconds since the first signal; 0 while none has come."""
        return self._clock() - self._received[0][1] if self._received else 0.0
