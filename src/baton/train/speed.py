"""How long training takes, without forcing the device to wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Speed:
    """Seconds spent training and tokens trained.

    The clock runs from one pause to the next rather than around each step: work that a GPU
    still does when a step returns is waited for, and so counted, when losses are read.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds = 0.0
        self._taken = 0.0
        self._marked = (0.0, 0)
        self._tokens = 0
        self._steps = 0

    @property
    def seconds(self) -> float:
        return self._seconds + time.monotonic() - self._started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is evaluation or saving, not training."""
        self._seconds = self.seconds
        try:
            yield
        finally:
            self._started = time.monotonic()

    def count(self, tokens: int) -> None:
        """One more step, of so many tokens."""
        self._tokens += tokens
        self._steps += 1

    def recent(self) -> float:
        """Tokens a second since the last call."""
        seconds, tokens = self.seconds - self._marked[0], self._tokens - self._marked[1]
        self._marked = self.seconds, self._tokens
        return tokens / seconds if seconds else 0.0

    def seconds_per_step(self) -> float:
        return self.seconds / self._steps if self._steps else 0.0

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = self.seconds - self._taken
        self._taken += seconds
        return seconds
