"""Jobs that are taken away in every way Slurm has, and what is left of their work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import JOB, LONG, LONG_STEPS, Cluster, Job, Task, assert_as_if_uninterrupted, words_of

pytestmark = pytest.mark.slow
NAME = "smoke/medical_qa/lora_long"


def start(
    slurm: Cluster, store: Path, *options: str, node: str = "n1", env: dict[str, str] | None = None
) -> tuple[Job, Task]:
    """The long task in a job that has a node to itself."""
    where = ("--exclusive", f"--nodelist={node}") if node else ()
    settings = {"BATON_STORE": str(store), **(env or {})}
    job = slurm.sbatch(*where, *options, JOB, NAME, *words_of(LONG), env=settings)
    return job, Task(store, "lora_long")


def preempt(slurm: Cluster, node: str = "n1", seconds: int = 1) -> Job:
    """Somebody more important needs the node for a moment."""
    return slurm.sbatch(
        "--partition=high", "--exclusive", f"--nodelist={node}", f"--wrap=sleep {seconds}"
    )


def never_completed_before_the_end(states: list[str]) -> None:
    assert states[-1] == "COMPLETED", states
    assert "COMPLETED" not in states[:-1]
    assert "FAILED" not in states, "a dependent with afterok would have been given up"


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
    preempt(slurm)
    never_completed_before_the_end(job.states_until_end())
    assert_as_if_uninterrupted(task, reference(), legs=2)
    [first, second] = task.legs()
    assert (first["state"], first["exit_status"]) == ("handed_over", 75)
    assert second["from_step"] == first["durable_step"] >= 30
    assert "signal=" in task.log
    assert job.restarts == 1, "requeued by Slurm or by leg.sh, not by both"


def test_the_signal_before_the_time_limit_hands_over(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    slurm.configure(requeue_exit=False)
    job, task = start(slurm, tmp_path)
    task.wait_for_step(30)
    slurm("scontrol", "update", f"jobid={job.number}", "EndTime=now+8")
    never_completed_before_the_end(job.states_until_end())
    assert_as_if_uninterrupted(task, reference(), legs=2)
    assert task.legs()[0]["signal"] == "SIGUSR2"
    assert "verdict=requeued by=leg.sh" in task.log


def test_a_job_that_is_requeued_again_and_again_uses_nothing_up(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    # More often than legs may fail, or end without anything durable.
    job, task = start(slurm, tmp_path)
    for step in (20, 70, 120, 170):
        task.wait_for_step(step)
        slurm("scontrol", "requeue", job.number)
    never_completed_before_the_end(job.states_until_end())
    assert_as_if_uninterrupted(task, reference(), legs=5)
    assert job.restarts == 4, "requeued by the person, not once more by leg.sh"


def test_a_lost_node_costs_no_more_than_the_steps_since_the_last_save(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    # Either of two nodes; the one it starts on is lost.
    job, task = start(slurm, tmp_path, "--nodelist=", "--exclude=n3", node="")
    task.wait_for_step(30)
    node = job.field("NodeList")
    slurm.lose_node(node)
    try:
        never_completed_before_the_end(job.states_until_end())
    finally:
        slurm.bring_back(node)
    assert_as_if_uninterrupted(task, reference(), legs=2)
    [first, second] = task.legs()
    assert first["state"] == "lost"
    assert second["from_step"] >= 30


@pytest.mark.parametrize("partition", ["lowcancel", "low"])
def test_a_job_that_may_not_be_requeued_is_requeued_all_the_same(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task], partition: str
) -> None:
    # --no-requeue makes Slurm cancel a preempted job, PreemptMode=CANCEL does so anyway.
    slurm.configure(requeue_exit=False, user_signal=False)
    job, task = start(slurm, tmp_path, f"--partition={partition}", "--no-requeue")
    task.wait_for_step(30)
    preempt(slurm)
    assert job.states_until_end()[-1] == "COMPLETED"
    assert_as_if_uninterrupted(task, reference(), legs=2)


def test_where_nothing_is_requeued_the_task_goes_on_in_a_new_job(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    job, task = start(slurm, tmp_path, env={"BATON_REQUEUE": "resubmit"})
    waiting = slurm.sbatch(
        f"--dependency=afterok:{job.number}",
        "--kill-on-invalid-dep=yes",
        f"--wrap=cp -r {tmp_path}/smoke {tmp_path}/seen",
    )
    task.wait_for_step(30)
    slurm("scancel", "--batch", "--signal=USR2", job.number)
    assert job.wait() == "FAILED"
    assert "verdict=resubmitted as=" in task.log
    assert waiting.wait() == "COMPLETED"
    assert_as_if_uninterrupted(task, reference(), legs=2)
    [seen] = Path(tmp_path, "seen").glob("medical_qa/*/tasks/lora_long/eval/eval.json")
    assert seen.exists(), "the dependent job started before the task was finished"


def test_a_cancelled_job_keeps_its_work_and_stays_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    job, task = start(slurm, tmp_path)
    task.wait_for_step(30)
    slurm("scancel", job.number)
    assert job.wait() == "CANCELLED"
    assert task.legs()[0]["state"] == "handed_over"
    assert job.restarts == 0
    assert task.step < LONG_STEPS
