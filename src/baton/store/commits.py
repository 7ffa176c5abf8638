"""How many commits an hour a repository of the Hub takes, shared by all who write to it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.errors import ConfigError
from baton.record import dump_json

_HOUR = 3600.0


@dataclass
class CommitBudget:
    """Paces ordinary commits so that a handover always finds room for its own.

    The Hub takes 128 commits an hour from one user. Saves may use 100 of them: 30 in a row,
    then one every 51 seconds; saves that come faster are joined. Every commit carries the
    times of those before it, so several tasks in one repository share the budget.
    """

    per_hour: int = 128
    clock: Callable[[], float] = time.time
    times: list[float] = field(default_factory=list)
    _full_until: float = 0.0

    @classmethod
    def from_environment(cls) -> CommitBudget:
        """`BATON_HUB_COMMITS_PER_HOUR` is for accounts with another limit."""
        text = os.environ.get("BATON_HUB_COMMITS_PER_HOUR", "128")
        if not text.isdigit() or not int(text):
            raise ConfigError(f"BATON_HUB_COMMITS_PER_HOUR={text}: expected a number of commits")
        return cls(per_hour=int(text))

    @property
    def burst(self) -> int:
        """Commits an hour that need not wait for each other."""
        return self.per_hour * 30 // 128

    @property
    def ordinary(self) -> int:
        """Commits an hour that are not urgent."""
        return max(1, self.per_hour * 100 // 128)

    def wait_seconds(self) -> float:
        """How long an ordinary commit has to wait now."""
        now = self.clock()
        self._forget(now)
        waits = [self._full_until - now]
        if len(self.times) >= self.ordinary:
            waits.append(self.times[-self.ordinary] + _HOUR - now)
        elif len(self.times) >= self.burst:
            spacing = _HOUR / max(1, self.ordinary - self.burst)
            waits.append(self.times[-1] + spacing - now)
        return max(0.0, *waits)

    def add(self) -> None:
        """Count a commit that was made."""
        self.times.append(self.clock())

    def full_for(self, seconds: float) -> None:
        """The Hub says that the limit is reset in so many seconds."""
        self._full_until = self.clock() + seconds

    def noted(self) -> bytes:
        """The times of the last hour with this commit's, as the next one will read them."""
        now = self.clock()
        self._forget(now)
        return dump_json([round(moment, 1) for moment in (*self.times, now)][-self.per_hour :])

    def read(self, data: bytes) -> None:
        """Take over what the newest commit noted; whatever else somebody wrote is ignored."""
        try:
            times = json.loads(data)
        except ValueError:
            return
        if isinstance(times, list):
            self.times = sorted(float(t) for t in times if isinstance(t, int | float))

    def _forget(self, now: float) -> None:
        self.times = [moment for moment in self.times if now - _HOUR < moment <= now]
