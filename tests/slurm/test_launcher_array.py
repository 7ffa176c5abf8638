"""`baton submit` on a real Slurm: one array for a matrix, its status, its logs, its end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import LONG, REPOSITORY, TINY, Cluster, Task, until, words_of

pytestmark = pytest.mark.slow
MATRIX = "smoke/medical_qa"
TOKEN = "hf_canary0123456789"
SITE = """\
launcher: slurm
store: STORE
partition: PARTITION
gpu_types: {fake: {gres: gpu:fake}}
gpu: fake
cpus: 1
memory_gb: 1
time: "0:20:00"
grace_seconds: 15
env: [PYTHONPATH, BATON_DEVICE, HF_TOKEN]
price_per_gpu_hour: 2
"""


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Site:
    """A project's folder whose site `here` is the real cluster."""

    slurm: Cluster
    home: Path

    @property
    def store(self) -> Path:
        return self.home / "store"

    def describe(self, more: str = "", *, partition: str = "main") -> None:
        text = SITE.replace("STORE", str(self.store)).replace("PARTITION", partition)
        (self.home / "launch" / "here.yaml").write_text(text + more, encoding="utf-8")

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "baton", *words, "--site", "here"],
            env=self.slurm.environment | {"BATON_HOME": str(self.home), "HF_TOKEN": TOKEN},
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str) -> Ended:
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        return Ended(process.returncode, out, err)

    def status(self, name: str, settings: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        ended = self("status", name, "--json", *words_of(settings))
        assert ended.status == 0, ended.err
        return {row["task"]: row for row in json.loads(ended.out)}

    def submit(self, name: str, settings: Mapping[str, str]) -> Ended:
        ended = self("submit", name, *words_of(settings))
        assert ended.status == 0, ended.err
        return ended

    def jobs(self) -> list[str]:
        """Numbers of all arrays submitted so far."""
        records = sorted(self.store.glob("**/submissions/*.json"))
        return [job["id"] for path in records for job in json.loads(path.read_bytes())["jobs"]]

    def wait(self) -> None:
        until(lambda: not self.slurm("squeue", "-h"), "the queue to be empty")

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in self.store.glob("**/log.txt"))


@pytest.fixture
def site(slurm: Cluster, tmp_path: Path) -> Site:
    (tmp_path / "launch").mkdir()
    for name in ("jobs", "slurm"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    found = Site(slurm, tmp_path)
    found.describe()
    return found


def test_a_matrix_runs_as_one_array_through_a_preemption_and_leaves_no_secret(site: Site) -> None:
    settings = {"eval.max_samples": "4", "eval.bootstrap_resamples": "100"}
    examined = site("doctor")
    assert examined.status == 0, examined.out
    shown = site("submit", MATRIX, "--dry-run", *words_of(settings))
    assert "sbatch --test-only: Job" in shown.out
    assert "6 tasks, at most 2.0 GPU-hours (4.00 at the site's price)" in shown.out
    ended = site.submit(MATRIX, settings)
    [array] = site.jobs()
    described = site.slurm("scontrol", "show", "job", "-dd", array)
    script = site.slurm("scontrol", "write", "batch_script", f"{array}_0", "-")
    assert len(set(re.findall(r"ArrayTaskId=(\d+)", described))) >= 1

    first = Task(site.store, "lora_20k")
    until(lambda: first.step >= 5, f"step 5: {first.log[-2000:]}")
    follower = site.start("logs", f"{MATRIX}/lora_20k", "-f", *words_of(settings))
    site.slurm("scancel", "--batch", "--signal=USR2", f"{array}_0")
    again = site("submit", MATRIX, *words_of(settings))
    assert "0 of 6 tasks to run" in again.out, again.out + again.err

    site.wait()
    rows = site.status(MATRIX, settings)
    assert {task: row["state"] for task, row in rows.items()} == dict.fromkeys(rows, "finished"), (
        site.logs()
    )
    assert len(rows) == 6
    assert rows["lora_20k"]["legs"] == 2
    assert [leg["state"] for leg in rows["lora_20k"]["job_legs"]] == ["REQUEUED", "COMPLETED"]
    assert all(row["gpu_hours"] > 0 for row in rows.values())
    followed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert " leg=1 " in followed
    assert "leg ended task=lora_20k leg=2 state=finished" in followed

    accounted = site.slurm("sacct", "-D", "-P", "-j", array, "-o", "ALL")
    said = [shown.out, ended.out + ended.err, described, script, accounted, followed, examined.out]
    files = [path for path in site.store.rglob("*") if path.is_file()]
    assert not [text[:200] for text in said if TOKEN in text]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [path for path in files if path.suffix == ".pkl"]


def test_cancel_saves_what_runs_and_takes_what_waits_out_of_the_queue(site: Site) -> None:
    settings = LONG | {"matrix.data.rows": "{long: 40, later: 48}"}
    site.describe("max_parallel: 1\n")
    site.submit(MATRIX, settings)
    task = Task(site.store, "lora_long")
    task.wait_for_step(20)
    rows = site.status(MATRIX, settings)
    assert [(row["state"], row["reason"]) for row in rows.values()] == [
        ("running", ""),
        ("pending", "JobArrayTaskLimit"),
    ]
    ended = site("cancel", MATRIX, *words_of(settings))
    assert "lora_long: job " in ended.out
    assert "asked to save and stop" in ended.out
    assert "taken from the queue" in ended.out
    site.wait()
    rows = site.status(MATRIX, settings)
    assert {row["state"] for row in rows.values()} == {"cancelled"}
    assert rows["lora_long"]["durable_step"] == rows["lora_long"]["step"] > 20
    [leg] = task.legs()
    assert (leg["state"], leg["exit_status"]) == ("cancelled", 78)
    assert [each["state"] for each in rows["lora_long"]["job_legs"]] == ["FAILED"]


def test_stages_run_as_jobs_of_their_own_and_the_report_comes_last(site: Site) -> None:
    site.describe("stages: {data: {partition: low, gpus_per_task: 0}}\ncollect: true\n")
    site.submit(MATRIX, TINY)
    data, rest, collect = site.jobs()
    site.wait()
    rows = site.status(MATRIX, TINY)
    assert {task: row["state"] for task, row in rows.items()} == dict.fromkeys(
        ("lora_a", "lora_b"), "finished"
    ), site.logs()
    assert [leg["stage"] for leg in Task(site.store, "lora_a").legs()] == ["data", "eval"]
    jobs = [(leg["job"], leg["gpus"]) for leg in rows["lora_a"]["job_legs"]]
    assert jobs == [(f"{data}_0", 0), (f"{rest}_0", 1)]
    [log] = site.store.glob("**/submissions/001/collect-0.log")
    assert "wrote results/smoke/medical_qa/report.html" in log.read_text()
    assert (site.home / "results" / "smoke" / "medical_qa" / "report.html").exists()
    assert collect not in str(rows)


def test_the_next_stage_does_not_start_where_a_stage_failed(site: Site) -> None:
    site.describe("stages: {data: {}}\nsetup: ['test \"$task\" = lora_b']\nretries: 0\n")
    settings = TINY | {"train.epochs": "1"}
    site.submit(MATRIX, settings)
    data, _ = site.jobs()
    site.wait()
    rows = site.status(MATRIX, settings)
    assert (rows["lora_a"]["state"], rows["lora_a"]["reason"]) == (
        "failed",
        f"job {data}_0 failed, exit status 1",
    )
    assert rows["lora_b"]["state"] == "finished", site.logs()


@pytest.mark.parametrize(
    ("more", "partition", "words"),
    [
        ("", "nope", ("no such partition", "`partition`")),
        ("stages: {eval: {cpus: 99}}\n", "main", ("no node has this many", "`cpus`")),
    ],
    ids=["partition", "cpus of a later stage"],
)
def test_a_refusal_of_the_real_sbatch_is_explained_and_leaves_nothing(
    site: Site, more: str, partition: str, words: tuple[str, ...]
) -> None:
    site.describe(more, partition=partition)
    for command in (("submit", MATRIX), ("doctor",)):
        ended = site(*command)
        assert ended.status == 78, ended.out + ended.err
        if command[0] == "submit":
            assert all(word in ended.err for word in words), ended.err
    assert not site.jobs()
    assert not site.slurm("squeue", "-h", "-t", "PENDING")
