"""Whole runs by `sbatch slurm/job.sbatch`: arrays, several processes, crash loops, secrets."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import (
    JOB,
    LONG,
    REPOSITORY,
    TINY,
    Cluster,
    Task,
    assert_as_if_uninterrupted,
    processes_of,
    until,
    words_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAME = "smoke/medical_qa/lora_long"


def test_a_job_for_one_task_of_several_says_how_to_name_it(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.sbatch(JOB, "smoke/medical_qa", *words_of(TINY), env={"BATON_STORE": str(tmp_path)})
    assert job.wait() == "FAILED"
    assert "2 tasks (lora_a lora_b): name one, or sbatch --array=0-1" in job.output


def test_a_later_leg_keeps_to_the_plan_of_the_first(slurm: Cluster, tmp_path: Path) -> None:
    experiment = tmp_path / "mine.yaml"
    shutil.copyfile(REPOSITORY / "jobs" / "smoke" / "medical_qa.yaml", experiment)
    words = words_of(LONG | {"train.epochs": "20"})
    job = slurm.sbatch(JOB, experiment, *words, env={"BATON_STORE": str(tmp_path / "store")})
    [manifest] = until(
        lambda: list(
            tmp_path.glob("store/*/*/tasks/*/train/checkpoints/step-000010/manifest.json")
        ),
        "step 10",
    )
    text = experiment.read_text()
    assert "learning_rate: 5e-3" in text
    experiment.write_text(text.replace("learning_rate: 5e-3", "learning_rate: 1e-3"))
    with slurm.held(job):
        slurm("scontrol", "requeue", job.number)
    assert job.wait() == "COMPLETED"
    assert len(list(tmp_path.glob("store/*/*/plan.json"))) == 1
    assert len(list(manifest.parents[3].glob("legs/*.json"))) == 2


def test_two_processes_hand_over_on_one_node_and_on_two(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    task = Task(tmp_path, "lora_long")
    words = [JOB, NAME, *words_of(LONG)]
    # One node, and only the second process hears the signal. RequeueExit=75 would start a job
    # again that is to be left alone.
    job = slurm.sbatch(
        *("--nodelist=n1", "--ntasks-per-node=2", *words),
        env={"BATON_STORE": str(tmp_path), "BATON_REQUEUE": "never"},
    )
    task.wait_for_step(30)
    with slurm.held(job):
        os.kill(processes_of(job)[1], signal.SIGUSR2)
    assert job.wait() == "FAILED"
    assert (job.field("ExitCode"), job.restarts) == ("79:0", 0)
    [first] = task.legs()
    assert (first["state"], first["processes"]) == ("handed_over", 2)

    # Two nodes, of which one is taken away.
    slurm.configure(requeue_exit=False)
    job = slurm.sbatch(
        *("--partition=low", "--nodelist=n1,n2", "--nodes=2", "--exclusive", *words),
        env={"BATON_STORE": str(tmp_path)},
    )
    task.wait_for_step(first["durable_step"] + 30)
    with slurm.held(job):
        slurm.sbatch("--partition=high", "--exclusive", "--nodelist=n2", "--wrap=true")
        job.wait_for_preemption()
    assert job.wait() == "COMPLETED"
    assert job.legs() == ["PREEMPTED", "COMPLETED"]
    assert [leg["processes"] for leg in task.legs()] == [2, 2, 2]
    assert_as_if_uninterrupted(task, reference(2), legs=3)


def test_legs_that_leave_nothing_durable_behind_stop_with_the_reason(
    slurm: Cluster, tmp_path: Path
) -> None:
    words = words_of(LONG | {"train.save_every_steps": "100000"})
    task = Task(tmp_path, "lora_long")
    job = slurm.sbatch(JOB, NAME, *words, env={"BATON_STORE": str(tmp_path), "BATON_RETRIES": "10"})
    # The first leg makes the data durable, the next three nothing.
    for leg in range(1, 5):
        until(lambda leg=leg: f"starting task=lora_long leg={leg} " in task.log, f"leg {leg}")
        with slurm.held(job):
            os.kill(processes_of(job)[0], signal.SIGKILL)
    assert job.wait() == "FAILED"
    assert job.field("ExitCode") == "78:0"
    assert "3 legs in a row left nothing durable behind" in task.log
    assert "verdict=stopped" in task.log
    assert len(task.legs()) == 4


def test_a_token_stands_nowhere(slurm: Cluster, tmp_path: Path) -> None:
    exported, in_file = "hf_canaryexported", "hf_canaryinafile"
    secrets = tmp_path / "secrets.env"
    secrets.write_text(f"WANDB_API_KEY={in_file}\n")
    secrets.chmod(0o600)
    store = tmp_path / "store"
    job = slurm.sbatch(
        JOB,
        NAME,
        *words_of(LONG),
        env={"BATON_STORE": str(store), "HF_TOKEN": exported, "BATON_ENV_FILE": str(secrets)},
    )
    task = Task(store, "lora_long")
    task.wait_for_step(10)
    with slurm.held(job):
        variables = Path(f"/proc/{processes_of(job)[0]}/environ").read_text()
        shown = {
            "scontrol show job": slurm("scontrol", "show", "job", "-dd", job.number),
            "the batch script": slurm("scontrol", "write", "batch_script", job.number, "-"),
            "sacct": slurm("sacct", "-j", job.number, "--format=ALL"),
            "argv": "\n".join(_arguments()),
        }
        slurm("scancel", job.number)
    assert exported in variables, "the leg itself must have them"
    assert in_file in variables
    job.wait()
    shown["the job's output"] = job.output
    for path in (*store.rglob("*"), *(slurm.folder / "log").iterdir()):
        if path.is_file():
            shown[str(path)] = path.read_bytes().decode("latin-1")
    assert len(shown) > 20
    found = [name for name, text in shown.items() if re.search("hf_canary", text)]
    assert not found, f"a token stands in {found}"
    # Slurm keeps the exported one with the job, for itself; the one in a file is not even there.
    kept = [path for path in (slurm.folder / "state").rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if in_file.encode() in path.read_bytes()]


def _arguments() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode("latin-1"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
