"""What every launcher is asked for, and what it tells while tasks run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from baton.errors import ConfigError, ExitStatus
from baton.record import Plan
from baton.status import TaskStatus

# In a task's folder: what all legs print, whoever launches them.
LOG = "log.txt"
_LAST_BYTES = 65536


@dataclass(frozen=True)
class Drill:
    """A fire drill: send `signal` to a task's leg once it has reached `step`."""

    task: str
    signal: str
    step: int

    @classmethod
    def parse(cls, text: str) -> Drill:
        """Read `TASK=SIGNAL@STEP`, e.g. `lora_20k=TERM@5`. Raises `ConfigError`."""
        task, _, rest = text.partition("=")
        signal, _, step = rest.partition("@")
        if (
            not task
            or signal not in ("TERM", "KILL", "USR1", "USR2", "INT")
            or not re.fullmatch("[0-9]+", step)
        ):
            raise ConfigError(
                f"--drill {text}: expected TASK=SIGNAL@STEP with TERM, KILL, USR1, USR2 or INT,"
                " e.g. lora_20k=TERM@5"
            )
        return cls(task, signal, int(step))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run: a frozen plan, tasks of it by name, and where it is stored.

    `store_root` is the folder that is worked in, `store_url` what legs are given as `--store`.
    """

    plan: Plan
    plan_path: Path
    store_root: Path
    store_url: str
    tasks: Sequence[str]
    drills: Sequence[Drill] = field(default_factory=tuple)


class View(Protocol):
    """Somebody who is told what happens; the command line draws it."""

    def event(self, task: str, text: str) -> None:
        """Something worth a line: started, handed over, finished, failed, drill."""
        ...

    def progress(self, task: str, values: Mapping[str, Any]) -> None:
        """How far a task is, about once a second."""
        ...


class Launcher(Protocol):
    """Starts and stops tasks somewhere; everything else a launcher does is its own affair."""

    @property
    def waits(self) -> bool:
        """Does `submit` return only when the tasks have ended?"""
        ...

    @property
    def look_every_seconds(self) -> float:
        """How often a person who follows a task may ask `look` without being a nuisance."""
        ...

    def submit(self, request: Request, view: View) -> dict[str, ExitStatus]:
        """Start the tasks; returns how each ended, as far as it waits for them."""
        ...

    def cancel(self, request: Request, view: View) -> None:
        """Stop the tasks with their work saved, and do not start them again."""
        ...

    def preview(self, request: Request) -> str:
        """What `submit` would do, for people; starts nothing."""
        ...

    def look(self, request: Request, statuses: Sequence[TaskStatus]) -> list[TaskStatus]:
        """What the records say, with what only the place where the tasks run knows."""
        ...


def last_error(folder: Path) -> str:
    """What the last error line in a task's log says; empty if there is none."""
    path = folder / LOG
    if not path.exists():
        return ""
    with open(path, "rb") as log:
        log.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else ""
