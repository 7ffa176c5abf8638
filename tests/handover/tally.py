"""What a storm of kills has done and found so far."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

# What storms one after the other have in common.
_COUNTED = (
    "kills",
    "unresumable",
    "different",
    "broken",
    "compared",
    "max_lost_steps",
    "lost_machines",
    "faults",
    "durable_seconds",
    "kinds",
)


@dataclass
class Tally:
    """What the storm has done and found so far; shared by the tasks that run side by side."""

    wanted: int
    most_seconds: float = math.inf
    kills: int = 0
    unresumable: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    compared: int = 0
    max_lost_steps: int = 0
    lost_machines: int = 0
    faults: int = 0
    durable_seconds: list[float] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    file: Path | None = None
    earlier_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    @property
    def is_enough(self) -> bool:
        return self.kills >= self.wanted or time.monotonic() - self.started > self.most_seconds

    @property
    def is_clean(self) -> bool:
        return not (self.unresumable or self.different or self.broken)

    def kill(self, kind: str) -> None:
        with self.lock:
            self.kills += 1
            self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def keep(self) -> None:
        """Write what was counted to the file, if there is one."""
        if self.file is None:
            return
        with self.lock:
            counted = {name: getattr(self, name) for name in _COUNTED} | {"seconds": self.seconds}
            beside = self.file.with_name(f"{self.file.name}.new")
            beside.write_text(json.dumps(counted))
            beside.replace(self.file)

    def go_on(self) -> None:
        """Add to what an earlier storm left in the file."""
        if self.file is None or not self.file.exists():
            return
        counted = json.loads(self.file.read_bytes())
        for name in _COUNTED:
            setattr(self, name, counted[name])
        self.earlier_seconds = counted["seconds"]

    def verdict(self) -> str:
        """The line that others quote; its format is fixed."""
        return (
            f"kill-storm: kills={self.kills} unresumable={len(self.unresumable)}"
            f" identical={'no' if self.different or not self.compared else 'yes'}"
            f" max_lost_steps={self.max_lost_steps}"
            f" p50_signal_to_durable_s={self._percentile(0.50)}"
            f" p99_signal_to_durable_s={self._percentile(0.99)}"
        )

    def _percentile(self, share: float) -> str:
        if not self.durable_seconds:
            return "none"
        ordered = sorted(self.durable_seconds)
        return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.3f}"
