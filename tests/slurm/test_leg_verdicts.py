"""What leg.sh makes of every exit status; a script stands in for baton, Slurm is real."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import HERE, LEG, Cluster, Job, processes_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Scripted:
    """Tasks whose legs end as their script says."""

    slurm: Cluster
    store: Path

    def task(self, name: str, script: str) -> None:
        (self.store / f"{name}.script").write_text(f"{script}\n")

    def legs(self, name: str) -> list[str]:
        path = self.store / f"{name}.legs"
        return path.read_text().splitlines() if path.exists() else []

    def log(self, name: str) -> str:
        return (self.store / "tasks" / name / "log.txt").read_text()

    def submit(self, *options: str, tasks: str = "", env: Mapping[str, str] | None = None) -> Job:
        settings = {
            "BATON_PYTHON": str(HERE / "stub.sh"),
            "BATON_STORE": str(self.store),
            "BATON_GRACE_SECONDS": "10",
            **(env or {}),
        }
        words = [str(self.store / "plan.json"), *([tasks] if tasks else [])]
        return self.slurm.sbatch("--signal=B:USR2@10", *options, LEG, *words, env=settings)


@pytest.fixture
def scripted(slurm: Cluster, tmp_path: Path) -> Scripted:
    # Most sites have no RequeueExit; what works without works with it, not the reverse.
    slurm.configure(requeue_exit=False)
    (tmp_path / "plan.json").write_text("{}")
    return Scripted(slurm, tmp_path)


def test_exit_statuses_end_a_job_as_their_table_says(scripted: Scripted) -> None:
    scripted.task("crash", "1 1 1 1")
    scripted.task("mixed", "1 75 1 1 75 1 0")
    scripted.task("wrong", "78 0")
    scripted.task("early", "deaf 0")
    scripted.task("late", "late 0")
    scripted.task("left", "75 0")
    scripted.task("once", "1 0")
    jobs = {
        name: scripted.submit(tasks=name) for name in ("crash", "mixed", "wrong", "early", "late")
    }
    jobs["left"] = scripted.submit(tasks="left", env={"BATON_REQUEUE": "never"})
    jobs["once"] = scripted.submit(tasks="once", env={"BATON_RETRIES": "0"})
    collect = scripted.slurm.sbatch(
        f"--dependency=afterok:{jobs['wrong'].number}",
        "--kill-on-invalid-dep=yes",
        "--wrap=true",
    )
    until(lambda: scripted.legs("early"), "a leg that hears nothing")
    scripted.slurm("scancel", "--batch", "--signal=USR2", jobs["early"].number)
    until(lambda: scripted.legs("late"), "a leg that saves for longer than its grace")
    scripted.slurm("scontrol", "update", f"jobid={jobs['late'].number}", "EndTime=now+1")
    ended = {name: job.wait() for name, job in jobs.items()}
    assert ended == {
        "crash": "FAILED",
        "mixed": "COMPLETED",
        "wrong": "FAILED",
        "early": "COMPLETED",
        "late": "COMPLETED",
        "left": "FAILED",
        "once": "FAILED",
    }
    # A failure may be tried twice more; a handover in between makes the count start anew.
    counts = {name: len(scripted.legs(name)) for name in jobs}
    assert counts == {
        "crash": 3,
        "mixed": 7,
        "wrong": 1,
        "early": 2,
        "late": 2,
        "left": 1,
        "once": 1,
    }
    exits = {name: job.field("ExitCode") for name, job in jobs.items()}
    assert exits["crash"] == "1:0"
    assert exits["wrong"] == "78:0"
    assert exits["left"] == "79:0"
    assert "retries were used up" in scripted.log("crash")
    assert "deaf" in scripted.legs("early")[0]
    assert "signal=TERM" in scripted.log("late"), "it was asked before it was out of time"
    assert collect.wait() == "CANCELLED", "a dependent of a stopped job must not wait for ever"


def test_one_element_of_an_array_goes_on_alone(scripted: Scripted) -> None:
    scripted.task("a", "75 0")
    scripted.task("b", "78 0")
    scripted.task("c", "0")
    array = scripted.submit("--array=0-2%3", env={"BATON_TASKS": "a b c"})
    after = scripted.slurm.sbatch(
        "--array=0-2",
        f"--dependency=aftercorr:{array.number}",
        "--kill-on-invalid-dep=yes",
        f"--wrap=cp {scripted.store}/$(echo a b c | cut -d' ' -f$((SLURM_ARRAY_TASK_ID + 1))).legs"
        f" {scripted.store}/seen.$SLURM_ARRAY_TASK_ID",
    )
    elements = [Job(scripted.slurm, f"{array.number}_{index}") for index in range(3)]
    assert [job.wait() for job in elements] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [job.restarts for job in elements] == [1, 0, 0]
    assert [len(scripted.legs(name)) for name in "abc"] == [2, 1, 1]
    afterwards = [Job(scripted.slurm, f"{after.number}_{index}").wait() for index in range(3)]
    assert afterwards == ["COMPLETED", "CANCELLED", "COMPLETED"]
    # It started when its element was finished, not when that handed over.
    assert len((scripted.store / "seen.0").read_text().splitlines()) == 2
    assert f"submission=slurm:{array.number}_0" in scripted.legs("a")[1]


def test_where_a_requeue_is_refused_the_element_is_submitted_again(scripted: Scripted) -> None:
    """A `scontrol` that refuses to requeue stands for a site that does."""
    folder = scripted.store / "bin"
    folder.mkdir()
    real = scripted.slurm("sh", "-c", "command -v scontrol")
    (folder / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" != requeue ] || {{ echo not here >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    (folder / "scontrol").chmod(0o755)
    scripted.task("a", "0")
    scripted.task("b", "75 0")
    # Held until those who wait for it are there.
    array = scripted.submit(
        "--array=0-1",
        "--hold",
        "--job-name=refused",
        env={"BATON_TASKS": "a b", "PATH": f"{folder}:{os.environ['PATH']}"},
    )
    after = scripted.slurm.sbatch(
        "--array=0-1",
        f"--dependency=aftercorr:{array.number}",
        "--kill-on-invalid-dep=yes",
        f"--wrap=wc -l < {scripted.store}/b.legs > {scripted.store}/seen.$SLURM_ARRAY_TASK_ID",
    )
    report = scripted.slurm.sbatch(
        f"--dependency=afterany:{array.number}",
        f"--wrap=wc -l < {scripted.store}/b.legs > {scripted.store}/seen.report",
    )
    scripted.slurm("scontrol", "release", array.number)
    assert Job(scripted.slurm, f"{array.number}_1").wait() == "FAILED"
    for index in range(2):
        assert Job(scripted.slurm, f"{after.number}_{index}").wait() == "COMPLETED"
    assert report.wait() == "COMPLETED"
    assert (scripted.store / "seen.report").read_text().strip() == "2", "the report came too early"
    assert "requeue was refused: not here" in scripted.log("b")
    first, second = scripted.legs("b")
    assert (scripted.store / "seen.1").read_text().strip() == "2", "it waited for the new job"
    # The legs of one submission, as the crash-loop rule counts them.
    assert first.split()[2] == second.split()[2] == f"submission=slurm:{array.number}_1"


def test_where_nothing_can_be_submitted_either_a_person_is_told(scripted: Scripted) -> None:
    """An `sbatch` that refuses what leg.sh submits stands for a limit of an account."""
    folder = scripted.store / "bin"
    folder.mkdir()
    real = scripted.slurm("sh", "-c", "command -v sbatch")
    (folder / "sbatch").write_text(
        '#!/bin/sh\ncase " $* " in *" --dependency= "*) echo too many jobs >&2; exit 1 ;; esac\n'
        f'exec {real} "$@"\n'
    )
    (folder / "sbatch").chmod(0o755)
    scripted.task("a", "75 0")
    path = f"{folder}:{os.environ['PATH']}"
    job = scripted.submit(tasks="a", env={"BATON_REQUEUE": "resubmit", "PATH": path})
    assert job.wait() == "FAILED"
    assert job.field("ExitCode") == "79:0"
    assert "too many jobs" in scripted.log("a")
    assert "verdict=left reason='it could not be submitted again, see above" in scripted.log("a")


def test_a_controller_that_is_away_for_a_moment_is_waited_for(scripted: Scripted) -> None:
    scripted.task("a", "listen 0")
    # A store may be named from the folder of the submission.
    store = os.path.relpath(scripted.store, scripted.slurm.folder)
    job = scripted.submit(tasks="a", env={"BATON_STORE": store})
    until(lambda: scripted.legs("a"), "the leg")
    [process] = processes_of(job).values()
    scripted.slurm.stop_controller()
    try:
        os.kill(process, signal.SIGUSR2)
        until(lambda: not Path(f"/proc/{process}").exists(), "the end of the leg")
    finally:
        scripted.slurm("slurmctld")
    assert job.wait() == "COMPLETED"
    assert [leg.split()[0] for leg in scripted.legs("a")] == ["listen", "0"]


def test_what_cannot_run_is_said_and_not_tried_again(scripted: Scripted) -> None:
    scripted.task("a", "0")
    jobs = {
        "2 tasks (a b): name one, or sbatch --array=0-1": scripted.submit(
            env={"BATON_TASKS": "a b"}
        ),
        "no task for array index 7": scripted.submit("--array=7", env={"BATON_TASKS": "a b"}),
        "BATON_RUNTIME=apptainer needs BATON_IMAGE": scripted.submit(
            tasks="a", env={"BATON_RUNTIME": "apptainer"}
        ),
        "BATON_RUNTIME=lxc: expected none, apptainer": scripted.submit(
            tasks="a", env={"BATON_RUNTIME": "lxc", "BATON_IMAGE": "x"}
        ),
        "one process for 2 GPUs a node; add --ntasks-per-node=2": scripted.submit(
            "--gpus-per-node=2", tasks="a"
        ),
    }
    # Another node may have it, so this may be tried again.
    elsewhere = scripted.submit(
        tasks="a",
        env={"BATON_RUNTIME": "apptainer", "BATON_IMAGE": "x", "BATON_RETRIES": "0"},
    )
    for said, job in jobs.items():
        element = Job(scripted.slurm, f"{job.number}_7") if "index 7" in said else job
        assert element.wait() == "FAILED"
        log = scripted.store / "tasks" / "a" / "log.txt"
        assert said in element.output + (log.read_text() if log.exists() else "")
        assert element.field("ExitCode") == "78:0"
    assert elsewhere.wait() == "FAILED"
    assert elsewhere.field("ExitCode") == "127:0"
    missing = f"error: there is no apptainer on {elsewhere.field('NodeList')}, which BATON_RUNTIME="
    assert missing in scripted.log("a")
    assert scripted.legs("a") == []


def test_processes_of_two_nodes_know_their_ranks(scripted: Scripted) -> None:
    (scripted.store / "wide.script").write_text("0\n")
    job = scripted.submit("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", tasks="wide")
    assert job.wait() == "COMPLETED"
    assert "rank=0/4/0" in scripted.legs("wide")[0]


@pytest.mark.parametrize("engine", ["docker", "podman", "apptainer"])
def test_a_container_gets_signals_ranks_and_tokens_but_no_token_in_its_command(
    scripted: Scripted, engine: str
) -> None:
    """A stub of the engine writes down its words and starts what the image would."""
    folder = scripted.store / "bin"
    folder.mkdir()
    (folder / engine).write_text(
        '#!/bin/bash\necho "$*" >> "$BATON_STORE/words"\n'
        f'[ "$1" != rm ] || exit 0\nexec {HERE}/stub.sh "$@"\n'
    )
    (folder / engine).chmod(0o755)
    scripted.task("a", "listen 0")
    secret = scripted.store / "secrets.env"
    secret.write_text("HF_TOKEN=hf_canary_in_a_file\n")
    secret.chmod(0o600)
    job = scripted.submit(
        "--gpus-per-node=1",
        tasks="a",
        env={
            "BATON_RUNTIME": engine,
            "BATON_IMAGE": "baton:cuda",
            "BATON_MOUNTS": "/data:/data:ro",
            "BATON_ENV_FILE": str(secret),
            "PATH": f"{folder}:{os.environ['PATH']}",
        },
    )
    until(lambda: scripted.legs("a"), "the container")
    scripted.slurm("scancel", "--batch", "--signal=USR2", job.number)
    assert job.wait() == "COMPLETED"
    assert [leg.split()[0] for leg in scripted.legs("a")] == ["listen", "0"]
    assert "token=given" in scripted.legs("a")[0]
    words = (scripted.store / "words").read_text()
    assert "canary" not in words
    assert "/data:/data:ro" in words
    run = f"run {scripted.store}/plan.json --task a --store {scripted.store}"
    if engine == "apptainer":
        assert "exec --nv --bind" in words
        assert f"baton:cuda baton {run}" in words
    else:
        assert f"baton:cuda {run}" in words
        assert f"run --name baton-{job.number}-0 " in words
        assert f"rm --force baton-{job.number}-0" in words
        assert "--init" in words
        assert "--env=HF_TOKEN " in words
        assert "--env=RANK " in words
        assert "--stop-timeout=10" in words
