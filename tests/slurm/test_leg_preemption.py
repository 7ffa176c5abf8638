"""Jobs that are taken away in every way Slurm has, and what is left of their work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import (
    JOB,
    LONG,
    LONG_STEPS,
    Cluster,
    Job,
    Task,
    assert_as_if_uninterrupted,
    until,
    words_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAME = "smoke/medical_qa/lora_long"


def start(
    slurm: Cluster, store: Path, *options: str, node: str = "n1", env: dict[str, str] | None = None
) -> tuple[Job, Task]:
    """The long task in a job that has a node to itself."""
    where = ("--exclusive", f"--nodelist={node}") if node else ()
    settings = {"BATON_STORE": str(store), **(env or {})}
    job = slurm.sbatch(*where, *options, JOB, NAME, *words_of(LONG), env=settings)
    return job, Task(store, "lora_long")


def preempt(slurm: Cluster, node: str = "n1") -> Job:
    """Somebody more important needs the node for a moment."""
    return slurm.sbatch("--partition=high", "--exclusive", f"--nodelist={node}", "--wrap=true")


def assert_completed_at_the_end_alone(job: Job, *before: str) -> None:
    """The accounting keeps how each start of a job ended; the first in one of the ways named."""
    assert job.wait() == "COMPLETED"
    first, last = job.legs()
    assert last == "COMPLETED"
    assert first in before


@pytest.mark.parametrize("user_signal", [True, False], ids=["user-signal", "term-alone"])
@pytest.mark.parametrize("requeue_exit", [True, False], ids=["RequeueExit", "no-RequeueExit"])
def test_a_preempted_job_goes_on_as_if_nothing_had_happened(
    slurm: Cluster,
    tmp_path: Path,
    reference: Callable[..., Task],
    user_signal: bool,
    requeue_exit: bool,
) -> None:
    slurm.configure(requeue_exit=requeue_exit, user_signal=user_signal)
    partition = "lowgrace" if requeue_exit else "low"
    job, task = start(slurm, tmp_path, f"--partition={partition}")
    task.wait_for_step(30)
    with slurm.held(job):
        preempt(slurm)
        job.wait_for_preemption()
    # Requeued by Slurm, or by leg.sh before the grace was over.
    assert_completed_at_the_end_alone(job, "PREEMPTED", "REQUEUED")
    assert_as_if_uninterrupted(task, reference(), legs=2)
    [first, second] = task.legs()
    assert (first["state"], first["exit_status"]) == ("handed_over", 75)
    assert second["from_step"] == first["durable_step"] >= 30
    assert first["signal"] in ("SIGUSR2", "SIGTERM")
    assert job.restarts == 1, "requeued by Slurm or by leg.sh, not by both"


def test_the_signal_before_the_time_limit_hands_over(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    slurm.configure(requeue_exit=False)
    job, task = start(slurm, tmp_path)
    task.wait_for_step(30)
    with slurm.held(job):
        # Within the 120 s before which the script asks for its signal, which Slurm then sends
        # at its next look at time limits; long enough for a save on a busy machine.
        slurm("scontrol", "update", f"jobid={job.number}", "EndTime=now+100")
        until(lambda: " signal=USR2" in task.log, "the signal")
        # The next leg is to have the time that this one began with.
        slurm("scontrol", "update", f"jobid={job.number}", "TimeLimit=30")
    assert_completed_at_the_end_alone(job, "REQUEUED")
    assert_as_if_uninterrupted(task, reference(), legs=2)
    assert task.legs()[0]["signal"] == "SIGUSR2"
    assert "verdict=requeued by=leg.sh" in task.log


def test_a_job_that_a_person_requeues_goes_on(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    job, task = start(slurm, tmp_path)
    task.wait_for_step(20)
    with slurm.held(job):
        slurm("scontrol", "requeue", job.number)
    assert_completed_at_the_end_alone(job, "REQUEUED")
    assert_as_if_uninterrupted(task, reference(), legs=2)
    assert job.restarts == 1, "requeued by the person, not once more by leg.sh"


def test_a_lost_node_costs_no_more_than_the_steps_since_the_last_save(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    # Either of two nodes; the one it starts on is lost.
    job, task = start(slurm, tmp_path, "--exclude=n3", node="")
    task.wait_for_step(30)
    with slurm.held(job):
        node = job.field("NodeList")
        slurm.lose_node(node)
    try:
        assert_completed_at_the_end_alone(job, "NODE_FAIL")
    finally:
        slurm.bring_back(node)
    assert_as_if_uninterrupted(task, reference(), legs=2)
    [first, second] = task.legs()
    assert first["state"] == "lost"
    assert second["from_step"] >= 30


def test_a_job_that_slurm_would_cancel_for_another_is_requeued_in_time(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    slurm.configure(requeue_exit=False, user_signal=False)
    job, task = start(slurm, tmp_path, "--partition=lowcancel")
    task.wait_for_step(30)
    with slurm.held(job):
        preempt(slurm)
        job.wait_for_preemption()
    assert job.wait() == "COMPLETED"
    assert_as_if_uninterrupted(task, reference(), legs=2)


def test_a_job_with_no_requeue_goes_on_in_a_job_of_another_number(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    """Taken at its word even when preempted, where Slurm then cancels it."""
    slurm.configure(user_signal=False)
    job, task = start(slurm, tmp_path, "--partition=low", "--no-requeue", "--job-name=mine")
    waiting = slurm.sbatch(
        f"--dependency=afterok:{job.number}",
        "--kill-on-invalid-dep=yes",
        f"--wrap=cp -r {tmp_path}/smoke {tmp_path}/seen",
    )
    task.wait_for_step(30)
    with slurm.held(job):
        preempt(slurm)
        job.wait_for_preemption()
    assert job.wait() in ("PREEMPTED", "FAILED")
    assert job.restarts == 0
    assert "this job may not be requeued (--no-requeue)" in task.log
    assert "verdict=resubmitted as=" in task.log
    again = Job(slurm, task.log.partition("verdict=resubmitted as=")[2].split()[0])
    assert (again.field("JobName"), again.field("Partition")) == ("mine", "low")
    assert (again.field("Requeue"), again.field("OverSubscribe")) == ("0", "NO")
    assert again.field("ReqNodeList") == "n1"
    assert again.wait() == "COMPLETED"
    assert waiting.wait() == "COMPLETED"
    assert_as_if_uninterrupted(task, reference(), legs=2)
    [seen] = Path(tmp_path, "seen").glob("medical_qa/*/tasks/lora_long/eval/eval.json")
    assert seen.exists(), "the dependent job started before the task was finished"


def test_a_cancelled_job_keeps_its_work_and_stays_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    job, task = start(slurm, tmp_path)
    task.wait_for_step(30)
    with slurm.held(job):
        slurm("scancel", job.number)
    assert job.wait() == "CANCELLED"
    until(lambda: task.legs()[0]["state"] != "active", "the end of the leg")
    assert task.legs()[0]["state"] == "handed_over"
    assert job.restarts == 0
    assert task.step < LONG_STEPS
