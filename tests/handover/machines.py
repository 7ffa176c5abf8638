"""Machines that take turns with one task, lose what they had, and have a bad line to the store."""

from __future__ import annotations

import itertools
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from far import Far
from lab import Task
from tally import Tally

from baton.legs import NO_PROGRESS_LEGS

# After so many legs in a row that began at the same place the next one must get somewhere:
# baton rightly gives up after another.
BARREN_LEGS = NO_PROGRESS_LEGS - 1


@dataclass
class Machines:
    """One task on the machines that take turns; one machine where the store is a folder."""

    tasks: list[Task]
    far: Far | None
    rng: random.Random
    folder: Path
    tally: Tally
    at: int = 0
    _begun: dict[int, list[int]] = field(default_factory=dict)
    _unseen: int = 0

    def __post_init__(self) -> None:
        self.plan = self.tasks[0].plan.read_bytes()

    def next_machine(self) -> Task:
        """Mostly the same again, as after a requeue; sometimes another, or an empty one.

        The same for sure after a leg that had to get somewhere: only there is what it did.
        """
        if self.far is None:
            return self.tasks[0]
        if self.barren_legs < BARREN_LEGS:
            if self.rng.random() < 0.3:
                self.at = 1 - self.at
            if self.rng.random() < 0.15:
                shutil.rmtree(self.tasks[self.at].store / "smoke", ignore_errors=True)
                self.tally.lost_machines += 1
        task = self.tasks[self.at]
        task.plan.parent.mkdir(parents=True, exist_ok=True)
        task.plan.write_bytes(self.plan)
        self._break_things()
        return task

    def note_leg(self, task: Task) -> None:
        """Remember where legs began; one that was killed early is known to the store only."""
        before = max(self._begun, default=0)
        self._begun.update({leg["number"]: leg["position"] for leg in task.legs()})
        self._unseen = 0 if max(self._begun, default=0) > before else self._unseen + 1

    @property
    def barren_legs(self) -> int:
        """How many legs up to the newest began at the same place, as far as one can know."""
        begun = [self._begun[number] for number in sorted(self._begun, reverse=True)]
        same = itertools.takewhile(lambda place: place == begun[0], begun)
        return self._unseen + sum(1 for _ in same)

    def _break_things(self) -> None:
        assert self.far is not None
        proxy, rng = self.far.proxy, self.rng
        if rng.random() < 0.5:
            return
        self.tally.faults += 1
        method = rng.choice(("PUT|POST", "GET", ".*"))
        action = rng.choice(("status", "reset", "reset_request", "swallow", "truncate", "corrupt"))
        options: dict[str, object] = {}
        path = ".*"
        if action == "status":
            options = {"status": rng.choice((500, 503))}
        elif action == "corrupt":
            # What a store keeps, not what it says about it: that is TLS's to protect.
            method, path = "GET", r"/resolve/|/lfs-get/|/blobs/|\.json"
            options = {"at": rng.randint(0, 2000)}
        proxy.rule(
            action=action,
            method=method,
            path=path,
            times=rng.randint(1, 3),
            skip=rng.randint(0, 60),
            **options,
        )
        proxy.rule(action="delay", seconds=rng.uniform(0, 0.3), times=5, skip=rng.randint(0, 60))

    def result(self) -> Task:
        """What there is in the end: in the folder, or in the store for an empty machine."""
        if self.far is None:
            return self.tasks[0]
        self.far.proxy.clear()
        return self.far.on_empty_machine(self.tasks[0], self.folder / "result")
