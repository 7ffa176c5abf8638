"""`baton submit` on a real Slurm: one array for a matrix, its status, its logs, its end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import (
    JOB,
    LONG,
    LONG_STEPS,
    PATIENCE_SECONDS,
    REPOSITORY,
    TINY,
    Cluster,
    Job,
    Task,
    processes_of,
    until,
    words_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
MATRIX = "smoke/medical_qa"
TOKEN = "hf_canary0123456789"
SIX = ("lora_20k", "lora_50k", "lora_100k", "qlora_20k", "qlora_50k", "qlora_100k")
SITE = """\
launcher: slurm
store: STORE
partition: PARTITION
account: test
gpu_types: {fake: {gres: gpu:fake}}
gpu: fake
cpus: 1
memory_gb: 1
time: "0:30:00"
grace_seconds: 60
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

    def describe(self, more: str = "", *, partition: str = "main", gpus: int = 1) -> None:
        text = SITE.replace("STORE", str(self.store)).replace("PARTITION", partition)
        if gpus > 1:
            text = text.replace("gpu:fake", f'"gpu:fake:{gpus}"')
        if "account:" in more:
            text = text.replace("account: test\n", "")
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
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
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
        until(lambda: not self.slurm("squeue", "-h"), "the queue to be empty", every_seconds=0.5)

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


def test_six_tasks_run_as_one_array_by_both_paths_and_leave_no_secret(site: Site) -> None:
    """Through `baton submit`, and through `sbatch slurm/job.sbatch`; the results are the same."""
    settings = {
        "train.epochs": "1",
        "train.log_every_steps": "1",
        "eval.max_samples": "2",
        "eval.generate.max_new_tokens": "4",
        "eval.bootstrap_resamples": "100",
    }
    # Twelve tasks at once would ask for more memory than a small machine has.
    site.describe("max_parallel: 3\n")
    examined = site("doctor")
    assert examined.status == 0, examined.out
    shown = site("submit", MATRIX, "--dry-run", *words_of(settings))
    assert "sbatch --test-only: Job" in shown.out
    assert "6 tasks, at most 3.0 GPU-hours (6.00 at the site's price)" in shown.out
    ended = site.submit(MATRIX, settings)
    [array] = site.jobs()
    described = site.slurm("scontrol", "show", "job", "-dd", array)
    script = site.slurm("scontrol", "write", "batch_script", f"{array}_0", "-")
    by_hand = site.slurm.sbatch(
        "--array=0-5%3",
        JOB,
        MATRIX,
        *words_of(settings),
        env={"BATON_STORE": str(site.home / "by-hand")},
    )

    # Of the first array an element is asked to save; of the second, another one is requeued.
    first, last = Task(site.store, SIX[0]), Task(site.home / "by-hand", SIX[5])
    first.wait_for_step(5)
    with site.slurm.held(Job(site.slurm, f"{array}_0")):
        site.slurm("scancel", "--batch", "--signal=USR2", f"{array}_0")
        follower = site.start("logs", f"{MATRIX}/{SIX[0]}", "-f", *words_of(settings))
        again = site("submit", MATRIX, *words_of(settings))
        assert "0 of 6 tasks to run" in again.out, again.out + again.err
    last.wait_for_step(5)
    with site.slurm.held(Job(site.slurm, f"{by_hand.number}_5")):
        site.slurm("scontrol", "requeue", f"{by_hand.number}_5")
    site.wait()

    rows = site.status(MATRIX, settings)
    assert {task: row["state"] for task, row in rows.items()} == dict.fromkeys(SIX, "finished"), (
        site.logs()
    )
    legs = [["REQUEUED", "COMPLETED"]] + [["COMPLETED"]] * 5
    assert [[leg["state"] for leg in rows[task]["job_legs"]] for task in SIX] == legs
    elements = [Job(site.slurm, f"{by_hand.number}_{index}") for index in range(6)]
    assert [element.legs() for element in elements] == legs[::-1]
    assert all(row["gpu_hours"] > 0 for row in rows.values())
    for name in SIX:
        mine, other = Task(site.store, name), Task(site.home / "by-hand", name)
        odd = {file for file, data in mine.products().items() if other.products()[file] != data}
        assert not odd, f"{name} differs by path: {odd}"
    followed, _ = follower.communicate(timeout=PATIENCE_SECONDS)
    assert follower.returncode == 0
    assert " leg=1 " in followed
    assert f"leg ended task={SIX[0]} leg=2 state=finished" in followed

    accounted = site.slurm("sacct", "-D", "-P", "-j", array, "-o", "ALL")
    said = [shown.out, ended.out + ended.err, described, script, accounted, followed, examined.out]
    files = [path for path in site.home.rglob("*") if path.is_file()]
    assert not [text[:200] for text in said if TOKEN in text]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [path for path in files if path.suffix == ".pkl"]


def test_cancel_saves_what_runs_and_takes_what_waits_out_of_the_queue(site: Site) -> None:
    settings = LONG | {"matrix.data.rows": "{long: 40, later: 48}"}
    site.describe("max_parallel: 1\n")
    site.submit(MATRIX, settings)
    task = Task(site.store, "lora_long")
    task.wait_for_step(20)
    with site.slurm.held(Job(site.slurm, f"{site.jobs()[0]}_0")):
        rows = site.status(MATRIX, settings)
        assert [(row["state"], row["reason"]) for row in rows.values()] == [
            ("running", ""),
            ("pending", "JobArrayTaskLimit"),
        ]
        assert rows["lora_long"]["eta_seconds"] > 0
        ended = site("cancel", MATRIX, *words_of(settings))
    assert "lora_long: job " in ended.out
    assert "asked to save and stop" in ended.out
    assert "taken from the queue" in ended.out
    site.wait()
    rows = site.status(MATRIX, settings)
    assert {row["state"] for row in rows.values()} == {"cancelled"}
    assert LONG_STEPS > rows["lora_long"]["durable_step"] == rows["lora_long"]["step"] > 20
    [leg] = task.legs()
    assert (leg["state"], leg["exit_status"]) == ("cancelled", 78)
    assert [each["state"] for each in rows["lora_long"]["job_legs"]] == ["FAILED"]


def test_a_chain_of_stages_goes_on_in_new_jobs_where_nothing_is_requeued(site: Site) -> None:
    """The experiment splits off its data, the site its evaluation; training is preempted."""
    settings = LONG | {"split": "[data]"}
    site.describe(
        "requeue: resubmit\ncollect: true\nstages: {eval: {partition: main, gpus_per_task: 0}}\n",
        partition="lowcancel",
    )
    site.submit(MATRIX, settings)
    data, train, evaluation, _ = site.jobs()
    task = Task(site.store, "lora_long")
    task.wait_for_step(30)
    element = Job(site.slurm, f"{train}_0")
    with site.slurm.held(element):
        node = element.field("NodeList")
        assert site.status(MATRIX, settings)["lora_long"]["job"] == element.number
        site.slurm.sbatch("--partition=high", "--exclusive", f"--nodelist={node}", "--wrap=true")
        element.wait_for_preemption()
    site.wait()
    row = site.status(MATRIX, settings)["lora_long"]
    assert row["state"] == "finished", site.logs()
    resubmitted = task.log.partition("verdict=resubmitted as=")[2].split()[0]
    jobs = [(leg["job"], leg["state"], leg["gpus"]) for leg in row["job_legs"]]
    assert jobs == [
        (f"{data}_0", "COMPLETED", 0),
        (f"{train}_0", jobs[1][1], 1),
        (resubmitted, "COMPLETED", 1),
        (f"{evaluation}_0", "COMPLETED", 0),
    ]
    assert jobs[1][1] in ("PREEMPTED", "FAILED"), "what waits for it by afterok is not released"
    legs = [(leg["stage"], leg["state"]) for leg in task.legs()]
    assert legs == [
        ("data", "finished"),
        ("train", "handed_over"),
        ("train", "finished"),
        ("eval", "finished"),
    ]
    # The report waits for the whole array of evaluations, in which nothing was resubmitted here.
    [log] = site.store.glob("**/submissions/001/collect-0.log")
    assert "wrote results/smoke/medical_qa/report.html" in log.read_text()
    assert "missing:" not in log.read_text()
    assert (site.home / "results" / "smoke" / "medical_qa" / "report.html").exists()


def test_processes_change_between_legs_and_batch_and_data_order_do_not(
    site: Site, reference: Callable[..., Task]
) -> None:
    """One process, two on a node, one on each of two nodes; only the last one hears the signal."""
    task = Task(site.store, "lora_long")
    name = f"{MATRIX}/lora_long"
    shapes = ("requeue: never\n", "requeue: never\ngpus_per_task: 2\n", "nodes: 2\n")
    for place, shape in enumerate(shapes):
        site.describe(shape)
        if place:
            assert "left" in site("status", name, *words_of(LONG)).out
        site.submit(name, LONG)
        element = Job(site.slurm, f"{site.jobs()[place]}_0")
        task.wait_for_step(20 + 60 * place)
        with site.slurm.held(element):
            os.kill(max(processes_of(element).items())[1], signal.SIGUSR2)
        if "never" in shape:
            assert element.wait() == "FAILED"
            assert element.field("ExitCode") == "79:0"
    site.wait()
    row = site.status(name, LONG)["lora_long"]
    assert row["state"] == "finished", site.logs()
    assert [leg["processes"] for leg in task.legs()] == [1, 2, 2, 2]
    jobs = [(leg["gpus"], "," in leg["nodes"] or "-" in leg["nodes"]) for leg in row["job_legs"]]
    assert jobs == [(1, False), (2, False), (2, True), (2, True)]
    assert "processes: 1 -> 2" in task.log
    mine, others = task.metrics(), reference().metrics()
    # Token counts of every step tell which samples were in it.
    for key in ("step", "samples", "tokens", "epoch", "learning_rate"):
        assert [line.get(key) for line in mine] == [line.get(key) for line in others], key
    losses = [line["loss"] for line in mine if "loss" in line]
    assert losses == pytest.approx([line["loss"] for line in others if "loss" in line], rel=0.05)


def test_a_t5_trains_on_three_gpus_of_a_node_and_prepares_its_data_without_one(
    site: Site,
) -> None:
    """As launch/slurm-3gpu.yaml has it."""
    site.describe("stages: {data: {gpus_per_task: 0, cpus: 1}}\n", gpus=3)
    name = "smoke/t5_pretrain"
    settings = {"train.epochs": "20", "train.save_every_steps": "10", "dev_score.samples": "0"}
    task = Task(site.store, "10m", name)
    ended = site.submit(f"{name}/10m", settings)
    data, train = site.jobs()
    task.wait_for_step(40)
    element = Job(site.slurm, f"{train}_0")
    with site.slurm.held(element):
        site.slurm("scancel", "--batch", "--signal=USR2", element.number)
    site.wait()
    row = site.status(f"{name}/10m", settings)["10m"]
    assert row["state"] == "finished", site.logs()
    jobs = [(leg["job"], leg["state"], leg["gpus"]) for leg in row["job_legs"]]
    assert jobs == [
        (f"{data}_0", "COMPLETED", 0),
        (element.number, "REQUEUED", 3),
        (element.number, "COMPLETED", 3),
    ], ended.out
    legs = [(leg["stage"], leg["state"], leg["processes"]) for leg in task.legs()]
    assert legs == [
        ("data", "finished", 1),
        ("train", "handed_over", 3),
        ("eval", "finished", 3),
    ]
    steps = [line["step"] for line in task.metrics() if "loss" in line]
    assert steps == sorted(set(steps)), "a step was logged twice"


def test_a_thousand_tasks_are_one_array_in_less_than_ten_seconds(site: Site) -> None:
    site.describe("flags: [--hold]\n")
    seeds = {"matrix.train.seed": f"[{','.join(map(str, range(1000)))}]"}
    settings = {"matrix.data.rows": "null", "matrix.adapter.method": "null"} | seeds
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = site.submit(MATRIX, settings)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not the time on the clock, which depends on what else this machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert "1000 of 1000 tasks to run" in ended.out
    [array] = site.jobs()
    elements = site.slurm("squeue", "-h", "-r", "-j", array, "-o", "%i").split()
    assert len(elements) == 1000


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
    ("more", "partition", "status", "words"),
    [
        ("", "nope", 78, ("no such partition", "`partition`")),
        ("stages: {eval: {cpus: 99}}\n", "main", 78, ("no node has this many", "`cpus`")),
        ("account: theirs\n", "main", 78, ("this account may not be used", "`account`")),
        ("account: small\n", "main", 1, ("as many jobs as your account or QOS allows",)),
    ],
    ids=["partition", "cpus of a later stage", "account", "limit of an account"],
)
def test_a_refusal_of_the_real_sbatch_is_explained_and_leaves_nothing(
    site: Site, more: str, partition: str, status: int, words: tuple[str, ...]
) -> None:
    site.describe(more, partition=partition)
    ended = site("submit", MATRIX)
    assert ended.status == status, ended.out + ended.err
    assert all(word in ended.err for word in words), ended.err
    # A limit of jobs says nothing about the site file.
    assert site("doctor").status == (78 if status == 78 else 0)
    assert not site.jobs()
    assert not site.slurm("squeue", "-h", "-t", "PENDING")
