"""How long somebody who needs an answer now goes on asking a store that is in trouble."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from baton.errors import StoreBusy

log = logging.getLogger(__name__)

T = TypeVar("T")

# Between two tries: a second at first, then twice as long each time, up to this.
_LONGEST_WAIT_SECONDS = 10.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Repeats what a busy store refused, on top of the quick tries of each store's own library.

    A person at a command line wants to know at once; a leg on a rented GPU rather waits some
    minutes than ends, unless it is asked to hand over.

    Attributes:
        seconds: how long the trouble may last; 0 does not repeat.
        should_stop: is there a reason not to wait any more?
    """

    seconds: float = 0.0
    should_stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def insist(self, request: Callable[[], T]) -> T:
        """The answer to `request`. Raises its `StoreBusy` when patience is at its end."""
        until, wait = self.clock() + self.seconds, 1.0
        while True:
            try:
                return request()
            except StoreBusy as error:
                left = until - self.clock()
                if left <= 0 or self.should_stop():
                    raise
                log.warning("%s; waiting for the store, for %.0f s at most", error, left)
            again = min(self.clock() + wait, until)
            while self.clock() < again and not self.should_stop():
                self.sleep(_LOOK_SECONDS)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


IMPATIENT = Patience()
