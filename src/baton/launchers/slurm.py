"""Tasks as the elements of one Slurm job array; `slurm/leg.sh` is what an element runs.

submitit writes the `#SBATCH` lines, submits and knows the jobs' numbers and files. Its own way of
running a job (a pickled function, checkpoint and requeue inside Python) is left out: docs/slurm.md
says why.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from baton.config.home import home
from baton.config.slurm_site import SlurmSite
from baton.errors import BatonError, ConfigError, ExitStatus, SchedulerError
from baton.launchers import slurm_commands
from baton.launchers.base import Request, View, last_error
from baton.launchers.batch import COLLECT, Batch, refuse_secrets
from baton.launchers.chain import Chain, plan_chain
from baton.launchers.sacct import past, queued
from baton.launchers.saving import slowest_save
from baton.launchers.slurm_status import join
from baton.launchers.submissions import Submissions
from baton.legs import Legs, utc_now
from baton.record import LegRecord, dump_json
from baton.runner import task_store
from baton.status import TaskStatus
from baton.store.local import LocalStore
from baton.store.task_names import CANCELLED

# A command line has a limit, and a matrix may have thousands of tasks.
_AT_ONCE = 500


@dataclass
class SlurmLauncher:
    """Submits and leaves; Slurm and `slurm/leg.sh` carry a task through its legs."""

    site: SlurmSite
    max_parallel: int | None = None
    now: Callable[[], str] = utc_now
    waits: bool = field(default=False, init=False)
    # squeue is a question to a controller that thousands of jobs depend on.
    look_every_seconds: float = field(default=15.0, init=False)

    def submit(self, request: Request, view: View) -> dict[str, ExitStatus]:
        """One array for all tasks, or one a stage where the site says so.

        Raises:
            ConfigError, SchedulerError: sbatch refused; nothing of it stays behind.
        """
        if request.drills:
            raise ConfigError("--drill is for the local site; on Slurm use `scancel --signal`")
        if not request.tasks:
            return {}
        slurm_commands.require("sbatch")
        chain = self._chain(request)
        scripts = [script_of(batch) for batch in chain.batches]
        for place, script in enumerate(scripts):
            refuse_secrets(script)
            # sbatch takes a job that waits for another without a look at what it asks for.
            if place:
                with contextlib.suppress(SchedulerError):
                    _test(script)
        submissions = self._submissions(request)
        submissions.claim(chain.submission)
        for warning in self._warnings(request):
            view.event(request.plan.experiment, f"warning: {warning}")
        numbers: list[str] = []
        try:
            self._make_ready(request, chain)
            for place, batch in enumerate(chain.batches):
                after = chain.waits_for(place, numbers[-1]) if numbers else None
                numbers.append(_sbatch(replace(batch, after=after)))
        except BaseException:
            with contextlib.suppress(BatonError):
                if numbers:
                    slurm_commands.run("scancel", *numbers)
            submissions.forget(chain.submission)
            raise
        jobs = [
            replace(job, id=number)
            for job, number in zip(chain.submission.jobs, numbers, strict=True)
        ]
        submissions.note(replace(chain.submission, jobs=jobs))
        for job in jobs:
            view.event(request.plan.experiment, f"submitted as job {job.id} ({job.name})")
        return {}

    def cancel(self, request: Request, view: View) -> None:
        """Mark the tasks, take waiting jobs from the queue, and ask running legs to save."""
        for task in request.tasks:
            store = task_store(request.store_root, request.plan, task)
            store.write(CANCELLED, dump_json({"time": self.now()}))
        tasks_of = self._tasks_by_job_name(request)
        wanted = set(request.tasks)
        found = [job for job in queued(list(tasks_of)) if tasks_of[job.name][job.index] in wanted]
        waiting = [job.id for job in found if job.is_waiting]
        running = [job.id for job in found if not job.is_waiting]
        for some in _in_groups(waiting):
            slurm_commands.run("scancel", *some)
        for some in _in_groups(running):
            # To the batch script alone: it passes the signal on, waits for the save, and the
            # leg ends in 78, which is not requeued. A plain scancel would kill after KillWait.
            slurm_commands.run("scancel", "--batch", "--signal=TERM", *some)
        for job in found:
            said = "taken from the queue" if job.is_waiting else "asked to save and stop"
            view.event(tasks_of[job.name][job.index], f"job {job.id} {said}")
        for task in sorted(wanted - {tasks_of[job.name][job.index] for job in found}):
            view.event(task, "was not in the queue; it will not be started")

    def preview(self, request: Request) -> str:
        """The scripts that would be submitted, Slurm's verdict on each, and what they ask for."""
        if not request.tasks:
            return "nothing to submit"
        chain = self._chain(request)
        lines = [f"array element {i}: {task}" for i, task in enumerate(request.tasks)]
        for place, batch in enumerate(chain.batches):
            script = script_of(batch)
            refuse_secrets(script)
            lines += [f"--- {batch.script}", script.rstrip(), "---"]
            lines += [f"sbatch --test-only: {verdict(script)}"]
            if place:
                before = f"<job of {chain.batches[place - 1].stage}>"
                lines += [f"and --dependency={chain.waits_for(place, before)}"]
        lines += [f"warning: {warning}" for warning in self._warnings(request)]
        return "\n".join([*lines, chain.cost(), "nothing was submitted"])

    def look(self, request: Request, statuses: Sequence[TaskStatus]) -> list[TaskStatus]:
        """The records with what squeue and sacct know.

        Raises:
            ConfigError, SchedulerError: Slurm is not here, or does not answer.
        """
        tasks_of = self._tasks_by_job_name(request)
        if not tasks_of:
            return list(statuses)
        since = min(record.submitted for record in self._submissions(request).all())
        names = list(tasks_of)

        def records_of(task: str) -> Sequence[LegRecord]:
            store = task_store(request.store_root, request.plan, task)
            return Legs(store, task, self.now).history()

        joined = join(statuses, tasks_of, queued(names), past(names, since=since), records_of)
        return [self._with_last_words(request, status) for status in joined]

    def _with_last_words(self, request: Request, status: TaskStatus) -> TaskStatus:
        """A leg that failed before it had a record left its reason in the log alone."""
        if status.state != "failed" or status.legs:
            return status
        said = last_error(task_store(request.store_root, request.plan, status.task).root)
        return replace(status, reason=f"{status.reason}: {said}" if said else status.reason)

    def _chain(self, request: Request) -> Chain:
        submissions = self._submissions(request)
        return plan_chain(request, self.site, submissions, home().absolute(), self.max_parallel)

    def _make_ready(self, request: Request, chain: Chain) -> None:
        """What the jobs find in the store."""
        tasks_file = chain.batches[0].tasks_file
        tasks_file.parent.mkdir(parents=True, exist_ok=True)
        tasks_file.write_text("".join(f"{task}\n" for task in request.tasks), encoding="utf-8")
        for task in request.tasks:
            path = task_store(request.store_root, request.plan, task).path(CANCELLED)
            path.unlink(missing_ok=True)

    def _submissions(self, request: Request) -> Submissions:
        return Submissions(LocalStore(request.plan_path.parent), self.now)

    def _tasks_by_job_name(self, request: Request) -> dict[str, list[str]]:
        """Which task an element of a job works on, for every job there ever was."""
        records = self._submissions(request).all()
        jobs = [(job, record.tasks) for record in records for job in record.jobs]
        return {job.name: tasks for job, tasks in jobs if job.stage != COLLECT}

    def _warnings(self, request: Request) -> Iterator[str]:
        slowest = slowest_save(request.store_root, request.plan)
        if slowest is not None and slowest.seconds > self.site.grace_seconds:
            yield (
                f"saving took {slowest.seconds:.0f} s after a signal ({slowest.where}), but"
                f" grace_seconds is {self.site.grace_seconds}: a leg at its time limit would lose"
                " what it did since its last save; raise grace_seconds"
            )
        missing = [name for name in self.site.env if name not in os.environ]
        if missing:
            yield f"not set here, so the jobs will not have it either: {', '.join(missing)}"


class _Executor(SlurmExecutor):
    """submitit's way to submit a command, with our script around it."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.folder)
        self._batch = batch

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return script_of(self._batch)


def script_of(batch: Batch) -> str:
    """The batch script, ready for sbatch."""
    return _make_sbatch_string(
        command=batch.command(), folder=batch.folder, setup=batch.setup(), **batch.parameters()
    )


def verdict(script: str) -> str:
    """What `sbatch --test-only` says about a script, as a line; submits nothing."""
    try:
        return _test(script)
    except BatonError as error:
        return f"would be refused: {error}"


def _test(script: str) -> str:
    """Slurm's yes with details. Raises `ConfigError` or `SchedulerError`."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        return slurm_commands.test_only(file.name)


def _sbatch(batch: Batch) -> str:
    """Submit one array; returns its number. Raises `ConfigError` or `SchedulerError`."""
    script = script_of(batch)
    batch.script.write_text(script, encoding="utf-8")
    said = io.StringIO()
    try:
        # submitit prints sbatch's words as they are; they come with advice instead.
        with contextlib.redirect_stderr(said):
            return str(_Executor(batch)._submit_command("").job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise slurm_commands.refusal("sbatch", str(error)) from None


def _in_groups(words: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(words), _AT_ONCE):
        yield words[start : start + _AT_ONCE]
