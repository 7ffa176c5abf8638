"""What Slurm knows about an experiment's jobs: those in the queue, and every past leg."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import BatonError
from baton.launchers.slurm_commands import lines_of, run

# A job in one of these states will still do something by itself.
_AT_WORK = ("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED")
_WAITING = ("PENDING", "SUSPENDED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
# What slurm/leg.sh ends a job with that Slurm then calls FAILED.
_HANDED_OVER = {"75": "handed over", "79": "handed over to another job, or to a person"}
_WHY = {
    "TIMEOUT": "reached its time limit",
    "OUT_OF_MEMORY": "needed more memory than memory_gb gives",
    "NODE_FAIL": "its node was lost",
    "PREEMPTED": "was preempted",
    "REQUEUED": "was requeued",
    "CANCELLED": "was cancelled in Slurm",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "missed its deadline",
}


@dataclass(frozen=True, kw_only=True)
class Queued:
    """An array element that squeue shows."""

    array: str
    index: int
    name: str
    state: str
    start: str
    reason: str

    @property
    def id(self) -> str:
        """`1234_5`, as every Slurm command takes it."""
        return f"{self.array}_{self.index}"

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITING

    @property
    def is_blocked(self) -> bool:
        """Does it wait for something that will never come?"""
        return self.reason == "DependencyNeverSatisfied"


@dataclass(frozen=True, kw_only=True)
class Past:
    """One leg of an array element, in the accounting."""

    array: str
    index: int
    name: str
    state: str
    exit_code: str
    start: str
    end: str
    seconds: int
    gpus: int
    nodes: str

    @property
    def id(self) -> str:
        return f"{self.array}_{self.index}"

    @property
    def is_over(self) -> bool:
        return self.state not in (*_AT_WORK, "PENDING")

    @property
    def why(self) -> str:
        """Why it ended, in words; empty for what is at work or went well."""
        if not self.is_over or self.state == "COMPLETED":
            return ""
        status, _, signal = self.exit_code.partition(":")
        how = f"signal {signal}" if signal not in ("", "0") else f"exit status {status}"
        if self.state == "FAILED" and status in _HANDED_OVER:
            return _HANDED_OVER[status]
        return _WHY.get(self.state, f"{self.state.lower().replace('_', ' ')}, {how}")


def queued(names: Sequence[str]) -> list[Queued]:
    """Elements of the jobs with these names that wait or run, one by one.

    Raises:
        ConfigError, SchedulerError: squeue is not here, or does not answer.
    """
    if not names:
        return []
    text = run("squeue", "-h", "-r", f"--name={','.join(names)}", "-o", "%F|%K|%j|%T|%S|%r")
    rows = [row for row in lines_of(text, 6) if row[1].isdigit()]
    return [
        Queued(array=array, index=int(index), name=name, state=state, start=start, reason=reason)
        for array, index, name, state, start, reason in rows
    ]


def past(names: Sequence[str], *, since: str) -> list[Past]:
    """Every leg since a moment (UTC, ISO 8601), oldest first; empty without accounting."""
    if not names:
        return []
    columns = "JobID,JobName,State,ExitCode,Start,End,ElapsedRaw,AllocTRES,NodeList"
    words = ("-D", "-X", "-n", "-P", f"--name={','.join(names)}", "-S", since[:19], "-o", columns)
    try:
        text = run("sacct", *words)
    except BatonError:
        return []  # many a cluster has none; our own leg records say the most important
    found = [_past(row) for row in lines_of(text, 9)]
    return sorted((leg for leg in found if leg), key=lambda leg: leg.start)


def _past(row: Sequence[str]) -> Past | None:
    element = re.fullmatch(r"(\d+)_(\d+)", row[0])
    if element is None or row[4] in ("Unknown", "None"):
        return None  # an element that never started
    gpus = re.search(r"gres/gpu=(\d+)", row[7])
    return Past(
        array=element[1],
        index=int(element[2]),
        name=row[1],
        state=row[2].partition(" ")[0],  # `CANCELLED by 1000`
        exit_code=row[3],
        start=row[4],
        end="" if row[5] == "Unknown" else row[5],
        seconds=int(row[6] or 0),
        gpus=int(gpus[1]) if gpus else 0,
        nodes=row[8],
    )
