"""What was submitted: one small record a submission, below the experiment's folder."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import NameTaken, SchedulerError
from baton.record import Record
from baton.store.local import LocalStore

_RECORD = re.compile(r"submissions/(\d{3,})\.json")
# A submission writes its record first and the job's number into it a moment later.
_UNDER_WAY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """One job array. `id` is empty until sbatch has answered; `stage` is the last it runs."""

    name: str
    id: str = ""
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class Submission(Record):
    """Element `i` of every array works on `tasks[i]`.

    Elements are found again by the jobs' names, not by their numbers: a leg that is resubmitted
    has another number, and a submission that is killed half-way never learns its own.
    """

    number: int
    submitted: str
    tasks: list[str]
    jobs: list[SubmittedJob] = field(default_factory=list)


@dataclass(frozen=True)
class Submissions:
    """The records below `submissions/` of one plan's folder."""

    store: LocalStore
    now: Callable[[], str]

    def all(self) -> list[Submission]:
        """Every submission so far, oldest first."""
        return [self._read(number) for number in self._numbers()]

    def next_number(self) -> int:
        return max(self._numbers(), default=0) + 1

    def claim(self, submission: Submission) -> None:
        """Write the record of a submission that is about to happen.

        Raises:
            SchedulerError: somebody else submits the same experiment at this moment.
        """
        if any(self._is_under_way(other) for other in self.all()):
            raise SchedulerError(_busy(self.store.root))
        try:
            name = self._name(submission.number)
            self.store.write(name, submission.to_json(), exclusive=True)
        except NameTaken:
            raise SchedulerError(_busy(self.store.root)) from None

    def note(self, submission: Submission) -> None:
        """Write what has become known."""
        self.store.write(self._name(submission.number), submission.to_json())

    def forget(self, submission: Submission) -> None:
        """Nothing came of it."""
        self.store.delete(self._name(submission.number))

    def folder(self, number: int) -> Path:
        """Where scripts and Slurm's own words of one submission lie."""
        return self.store.path(f"submissions/{number:03d}")

    def job_name(self, prefix: str, number: int, stage: str = "") -> str:
        """A job name that no other submission has, also not one to another store."""
        token = hashlib.sha256(str(self.store.root).encode()).hexdigest()[:4]
        name = f"{prefix}/{number:03d}-{token}"
        return f"{name}/{stage}" if stage else name

    def _is_under_way(self, submission: Submission) -> bool:
        if all(job.id for job in submission.jobs):
            return False
        then, now = map(datetime.datetime.fromisoformat, (submission.submitted, self.now()))
        return (now - then).total_seconds() < _UNDER_WAY_SECONDS

    def _numbers(self) -> list[int]:
        folder = self.store.root / "submissions"
        paths = folder.glob("*.json") if folder.is_dir() else ()
        found = (_RECORD.fullmatch(f"submissions/{path.name}") for path in paths)
        return sorted(int(match[1]) for match in found if match)

    def _read(self, number: int) -> Submission:
        name = self._name(number)
        return Submission.from_json(self.store.read(name), where=str(self.store.path(name)))

    def _name(self, number: int) -> str:
        return f"submissions/{number:03d}.json"


def _busy(folder: Path) -> str:
    return (
        f"{folder}: another `baton submit` of this experiment is under way; wait a moment, look"
        " with `baton status`, then submit again"
    )
