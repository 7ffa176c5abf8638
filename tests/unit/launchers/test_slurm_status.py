"""`baton status`, `logs` and `cancel` on a Slurm site: the records joined with squeue and sacct."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.identity import started_ticks, this_runner


@pytest.fixture
def submitted(site: Any) -> Any:
    ended = site("submit", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    return site


def name(site: Any) -> str:
    return site.submissions()[-1]["jobs"][0]["name"]


def queue(site: Any, *rows: str) -> None:
    """Rows as `ARRAY|INDEX|STATE|START|REASON`."""
    cells = [row.split("|") for row in rows]
    text = "".join(f"{a}|{i}|{name(site)}|{state}|{t}|{why}\n" for a, i, state, t, why in cells)
    site.answer("squeue", text)


def accounting(site: Any, *rows: str) -> None:
    """Rows as `JOBID|STATE|EXIT|START|END|SECONDS|TRES|NODES`."""
    split = [row.partition("|") for row in rows]
    site.answer("sacct", "".join(f"{job}|{name(site)}|{rest}\n" for job, _, rest in split))


def leg(site: Any, task: str, **changes: Any) -> None:
    [plan] = site.home.glob("runs/trial/*/plan.json")
    folder = plan.parent / "tasks" / task / "legs"
    folder.mkdir(parents=True, exist_ok=True)
    runner = {"host": "n1", "pid": 1, "started_ticks": 1, "boot": "b", "pid_namespace": ""}
    record = {"task": task, "number": 1, "state": "handed_over", "runner": runner}
    record |= {"position": [1, 0, 0], "started": "2026-01-01T00:00:00.000+00:00"}
    record |= {"reason": "SIGUSR2 asked to stop"}
    (folder / "001.json").write_text(json.dumps({"schema": 1, "notice": ""} | record | changes))


def status(site: Any) -> dict[str, dict[str, Any]]:
    ended = site("status", "trial", "--site", "here", "--json")
    assert ended.status == 0, ended.err
    return {row["task"]: row for row in json.loads(ended.out)}


def test_what_waits_says_why_and_until_when(submitted: Any) -> None:
    queue(
        submitted,
        "70|0|RUNNING|2026-01-01T00:00:00|None",
        "70|1|PENDING|N/A|Priority",
        "70|2|PENDING|2026-01-02T03:04:05|Resources",
    )
    rows = status(submitted)
    assert {task: (row["state"], row["job"], row["reason"]) for task, row in rows.items()} == {
        "one": ("running", "70_0", "no step yet"),
        "two": ("pending", "70_1", "Priority"),
        "three": ("pending", "70_2", "Resources, starts about 2026-01-02T03:04:05Z"),
    }


def test_a_requeued_task_says_how_its_last_leg_ended(submitted: Any) -> None:
    leg(submitted, "one")
    queue(submitted, "70|0|PENDING|N/A|BeginTime")
    assert status(submitted)["one"]["reason"] == "BeginTime; last leg: SIGUSR2 asked to stop"


def test_gpu_hours_are_summed_over_all_legs(submitted: Any) -> None:
    leg(submitted, "one")
    gpus = "billing=8,cpu=8,gres/gpu:a100=2,gres/gpu=2,mem=64G,node=1"
    accounting(
        submitted,
        f"70_0|PREEMPTED|0:15|2026-01-01T00:00:00|2026-01-01T01:00:00|3600|{gpus}|n1",
        f"70_0|RUNNING|0:0|2026-01-01T02:00:00|Unknown|1800|{gpus}|n2",
        "70_[1-2%2]|PENDING|0:0|Unknown|Unknown|0||None assigned",
    )
    queue(submitted, "70|0|RUNNING|2026-01-01T02:00:00|None")
    row = status(submitted)["one"]
    assert row["gpu_hours"] == 3.0
    assert [(each["state"], each["why"], each["nodes"]) for each in row["job_legs"]] == [
        ("PREEMPTED", "SIGUSR2 asked to stop; was preempted", "n1"),
        ("RUNNING", "", "n2"),
    ]
    shown = submitted("status", "trial/one", "--site", "here").out
    assert "was preempted" in shown
    assert "3.00" in shown


def test_every_leg_says_why_it_ended_and_what_was_durable(submitted: Any) -> None:
    leg(submitted, "one", started="2026-01-01T00:00:09.500+00:00", durable_step=40)
    accounting(
        submitted,
        "70_0|REQUEUED|0:15|2026-01-01T00:00:00|2026-01-01T01:00:00|3600||n1",
        "70_0|NODE_FAIL|0:0|2026-01-01T02:00:00|2026-01-01T02:00:05|5||n2",
        "912_0|FAILED|79:0|2026-01-01T03:00:00|2026-01-01T03:00:05|5||n2",
    )
    [first, second, third] = status(submitted)["one"]["job_legs"]
    assert (first["leg"], first["durable_step"]) == (1, 40)
    assert first["why"] == "SIGUSR2 asked to stop; was requeued"
    assert (second["leg"], second["why"]) == (None, "its node was lost")
    assert third["why"] == "handed over to another job, or to a person"
    shown = submitted("status", "trial/one", "--site", "here").out
    assert "SIGUSR2 asked to stop" in shown


def test_a_task_that_nobody_starts_again_is_left(submitted: Any) -> None:
    leg(submitted, "one")
    accounting(submitted, "70_0|FAILED|79:0|2026-01-01T00:00:00|2026-01-01T00:00:05|5||n1")
    found = status(submitted)["one"]
    assert (found["state"], found["reason"]) == (
        "left",
        "SIGUSR2 asked to stop; nothing of it is in the queue: submit again to go on",
    )
    assert submitted("logs", "trial/one", "--site", "here", "-f").status == 78, "it has no log"
    assert "one: left -> run" in submitted("plan", "trial", "--site", "here").out


@pytest.mark.parametrize(
    ("state", "code", "why"),
    [
        ("TIMEOUT", "0:15", "reached its time limit"),
        ("OUT_OF_MEMORY", "0:125", "needed more memory than memory_gb gives"),
        ("NODE_FAIL", "0:0", "its node was lost"),
        ("CANCELLED by 1000", "0:0", "was cancelled in Slurm"),
        ("FAILED", "78:0", "failed, exit status 78"),
        ("FAILED", "0:9", "failed, signal 9"),
    ],
)
def test_a_task_that_left_the_queue_without_a_word_says_what_slurm_knows(
    submitted: Any, state: str, code: str, why: str
) -> None:
    row = f"70_0|{state}|{code}|2026-01-01T00:00:00|2026-01-01T01:00:00|3600||n1"
    accounting(submitted, row)
    found = status(submitted)["one"]
    assert (found["state"], found["reason"]) == ("failed", f"job 70_0 {why}")


def test_a_leg_that_failed_before_it_had_a_record_is_quoted_from_the_log(submitted: Any) -> None:
    accounting(submitted, "70_0|FAILED|78:0|2026-01-01T00:00:00|2026-01-01T01:00:00|9||n1")
    [plan] = submitted.home.glob("runs/trial/*/plan.json")
    folder = plan.parent / "tasks" / "one"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("starting\nerror: no model there\nsrun: task 0 exited\n")
    assert status(submitted)["one"]["reason"] == ("job 70_0 failed, exit status 78: no model there")


def test_a_finished_task_is_finished_whatever_slurm_says(submitted: Any) -> None:
    [plan] = submitted.home.glob("runs/trial/*/plan.json")
    for stage in ("data", "train", "eval"):
        (plan.parent / "tasks" / "one" / stage).mkdir(parents=True)
        (plan.parent / "tasks" / "one" / stage / "done.json").write_text("{}")
    queue(submitted, "70|0|COMPLETING|2026-01-01T00:00:00|None")
    assert status(submitted)["one"]["state"] == "finished"


def test_a_stage_that_is_done_is_not_a_finished_task(submitted: Any) -> None:
    leg(submitted, "one", state="finished", stage="data", reason="")
    [plan] = submitted.home.glob("runs/trial/*/plan.json")
    (plan.parent / "tasks" / "one" / "data").mkdir(parents=True)
    (plan.parent / "tasks" / "one" / "data" / "done.json").write_text("{}")
    row = status(submitted)["one"]
    assert row["state"] == "stage done"
    assert row["reason"] == "data is done, the next stage has not started"


def test_of_the_jobs_of_a_chain_the_one_at_work_is_shown(site: Any) -> None:
    site.describe("stages: {data: {cpus: 2}}\n")
    site("submit", "trial", "--site", "here")
    data, evaluation = [job["name"] for job in site.submissions()[0]["jobs"]]
    site.answer(
        "squeue",
        f"71|0|{evaluation}|PENDING|N/A|Dependency\n"
        f"70|0|{data}|RUNNING|2026-01-01T00:00:00|None\n"
        f"71|1|{evaluation}|PENDING|N/A|DependencyNeverSatisfied\n",
    )
    rows = status(site)
    assert (rows["one"]["job"], rows["one"]["state"]) == ("70_0", "running")
    assert (rows["two"]["state"], rows["two"]["reason"]) == (
        "blocked",
        "the job it waits for failed",
    )


def test_status_without_slurm_shows_the_records_and_says_so(
    submitted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leg(submitted, "one")
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = submitted("status", "trial", "--site", "here")
    assert ended.status == 0
    assert ended.err.startswith("note: only what the records say; there is no squeue on this")
    assert "SIGUSR2 asked to stop" in ended.out


def test_a_cluster_without_accounting_still_has_a_status(submitted: Any) -> None:
    queue(submitted, "70|0|PENDING|N/A|Priority")
    submitted.answer("sacct", err="Slurm accounting storage is disabled", status=1)
    assert status(submitted)["one"]["state"] == "pending"


def test_plan_says_what_a_submission_would_leave_alone(submitted: Any) -> None:
    queue(submitted, "70|0|RUNNING|N/A|None", "70|1|PENDING|N/A|Priority")
    out = submitted("plan", "trial", "--site", "here").out
    assert "one: running -> leave running" in out
    assert "two: pending -> leave in the queue" in out
    assert "three: not started -> run" in out


def test_cancel_takes_waiting_jobs_out_and_asks_running_ones_to_save(submitted: Any) -> None:
    queue(submitted, "70|0|RUNNING|N/A|None", "70|1|PENDING|N/A|Priority")
    ended = submitted("cancel", "trial", "--site", "here")
    assert ended.status == 0, ended.err
    assert submitted.calls("scancel") == ["scancel 70_1", "scancel --batch --signal=TERM 70_0"]
    for said in (
        "one: job 70_0 asked to save and stop",
        "two: job 70_1 taken from the queue",
        "three: was not in the queue; it will not be started",
    ):
        assert said in ended.out
    # The marker is what keeps leg.sh and everybody else from starting them again.
    for task in ("one", "two", "three"):
        assert (submitted.task_folder(task) / "cancelled.json").exists()


def test_cancelling_one_task_leaves_the_others_alone(submitted: Any) -> None:
    queue(submitted, "70|0|RUNNING|N/A|None", "70|1|RUNNING|N/A|None")
    submitted("cancel", "trial/two", "--site", "here")
    assert submitted.calls("scancel") == ["scancel --batch --signal=TERM 70_1"]


def test_submitting_a_cancelled_task_takes_it_up_again(submitted: Any) -> None:
    submitted("cancel", "trial", "--site", "here")
    ended = submitted("submit", "trial", "--site", "here")
    assert "3 of 3 tasks to run" in ended.out
    assert not list(submitted.home.glob("runs/**/cancelled.json"))


def test_logs_follow_across_legs_until_the_task_has_ended(submitted: Any) -> None:
    [plan] = submitted.home.glob("runs/trial/*/plan.json")
    folder = plan.parent / "tasks" / "one"
    leg(submitted, "one", state="failed", reason="ValueError: 3")
    (folder / "log.txt").write_text("leg 1\nleg 2 äöü\n", encoding="utf-8")
    ended = submitted("logs", "trial/one", "--site", "here", "-f")
    assert ended.status == 0, ended.err
    assert ended.out == "leg 1\nleg 2 äöü\n"


LAST_WORDS = """\
import sys, time
print(flush=True)
time.sleep(3)
with open(sys.argv[1], "a") as log:
    log.write("last words\\n")
"""


def test_logs_follow_a_leg_that_says_its_last_words_after_its_record(submitted: Any) -> None:
    [plan] = submitted.home.glob("runs/trial/*/plan.json")
    log = plan.parent / "tasks" / "one" / "log.txt"
    with subprocess.Popen(
        [sys.executable, "-c", LAST_WORDS, str(log)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = started_ticks(process.pid)
        runner = dataclasses.replace(this_runner(), pid=process.pid, started_ticks=started)
        leg(submitted, "one", state="failed", runner=dataclasses.asdict(runner))
        log.write_text("leg 1\n", encoding="utf-8")
        ended = submitted("logs", "trial/one", "--site", "here", "-f")
    assert ended.status == 0, ended.err
    assert ended.out == "leg 1\nlast words\n"


def test_the_plan_file_names_an_experiment_as_well(submitted: Any) -> None:
    [plan] = submitted.home.glob("runs/trial/*/plan.json")
    ended = submitted("status", str(plan), "--site", "here", "--json")
    assert [row["task"] for row in json.loads(ended.out)] == ["one", "two", "three"]
