"""A task's records and what Slurm says about its jobs, as one line of `baton status`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from baton.launchers.sacct import Past, Queued
from baton.record import LegRecord
from baton.status import JobLeg, TaskStatus

# Of several jobs of a task, the one to show: at work before waiting, waiting before blocked.
_LATER = "Dependency"


def join(
    statuses: Sequence[TaskStatus],
    tasks_of: Mapping[str, Sequence[str]],
    queue: Sequence[Queued],
    history: Sequence[Past],
    records_of: Callable[[str], Sequence[LegRecord]],
) -> list[TaskStatus]:
    """Statuses with the queue's and the accounting's view.

    `tasks_of` maps job names to tasks, `records_of` a task to the records of its legs.
    """
    now: dict[str, list[Queued]] = defaultdict(list)
    then: dict[str, list[Past]] = defaultdict(list)
    for job in queue:
        now[tasks_of[job.name][job.index]].append(job)
    for leg in history:
        then[tasks_of[leg.name][leg.index]].append(leg)
    return [
        _joined(
            status,
            now[status.task],
            then[status.task],
            records_of(status.task) if then[status.task] else (),
        )
        for status in statuses
    ]


def _joined(
    status: TaskStatus,
    queue: Sequence[Queued],
    history: Sequence[Past],
    records: Sequence[LegRecord],
) -> TaskStatus:
    legs = [_job_leg(leg, _record_of(leg, records)) for leg in history]
    hours = sum(leg.seconds * leg.gpus for leg in history) / 3600 if history else None
    job = history[-1].id if history else ""
    status = replace(status, job=job, gpu_hours=hours, job_legs=legs)
    if status.state == "finished":
        return status
    if queue:
        return _in_queue(status, min(queue, key=_rank))
    return _out_of_queue(status, history[-1] if history else None)


def _record_of(leg: Past, records: Sequence[LegRecord]) -> LegRecord | None:
    """What the leg that this run of a job started has written about itself."""
    mine = [r for r in records if leg.start <= r.started[:19] <= (leg.end or r.started[:19])]
    return mine[-1] if mine else None


def _job_leg(leg: Past, record: LegRecord | None) -> JobLeg:
    reasons = dict.fromkeys((record.reason if record else "", leg.why))
    return JobLeg(
        job=leg.id,
        state=leg.state,
        why="; ".join(reason for reason in reasons if reason),
        nodes=leg.nodes,
        started=leg.start,
        ended=leg.end,
        seconds=leg.seconds,
        gpus=leg.gpus,
        leg=record.number if record else None,
        durable_step=record.durable_step if record else None,
    )


def _rank(job: Queued) -> tuple[bool, bool]:
    return (job.is_waiting, job.reason.startswith(_LATER))


def _in_queue(status: TaskStatus, job: Queued) -> TaskStatus:
    status = replace(status, job=job.id)
    if not job.is_waiting:
        if status.state == "running":
            return status
        # The interpreter starts, or the leg has ended and its script has not.
        return replace(status, state="running", reason="no step yet")
    if job.is_blocked:
        return replace(status, state="blocked", reason="the job it waits for failed")
    why = job.reason if job.start in ("N/A", "") else f"{job.reason}, starts about {job.start}Z"
    said = f"{why}; last leg: {status.reason}" if status.reason and status.legs else why
    return replace(status, state="pending", reason=said, eta_seconds=None, tokens_per_s=None)


def _out_of_queue(status: TaskStatus, last: Past | None) -> TaskStatus:
    if last is None or not last.is_over or status.state in ("cancelled", "failed"):
        return status
    if last.state == "COMPLETED" or not last.why:
        return status
    if status.state == "handed over":
        # Whatever goes on by itself is in the queue before the leg's job has left it.
        said = "nothing of it is in the queue: submit again to go on"
        return replace(status, state="left", reason=f"{status.reason}; {said}")
    said = f"job {last.id} {last.why}"
    if status.state in ("not started", "running", "lost"):
        # Whatever the records say, nothing of it is in the queue any more.
        return replace(status, state="failed", reason=said, eta_seconds=None, tokens_per_s=None)
    return replace(status, reason=f"{status.reason}; {said}" if status.reason else said)
