"""A real Slurm on this machine, the jobs in it, and what they leave in a store."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SERVICES = HERE.parent / "services"
LEG = REPOSITORY / "slurm" / "leg.sh"
JOB = REPOSITORY / "slurm" / "job.sbatch"
# For a machine with ten times as much to do; what is waited for mostly takes seconds.
PATIENCE_SECONDS = 300.0
# What this machine's own settings would change about a run.
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "BATON_"))
} | {
    "BATON_HOME": str(REPOSITORY),
    "BATON_PYTHON": sys.executable,
    "BATON_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(REPOSITORY / "src"),
}
# A tiny model and many steps: long enough to be taken away in the middle.
LONG = {
    "matrix.data.rows": "{long: 40}",
    "matrix.adapter.method": "[lora]",
    "data.dev_rows": "8",
    "model.config.hidden_size": "32",
    "model.config.intermediate_size": "64",
    "model.tokenizer_vocab": "400",
    "train.epochs": "50",
    "train.batch_samples": "8",
    "train.log_every_steps": "1",
    "train.eval_every_steps": "100",
    "train.save_every_steps": "10",
    "eval.max_samples": "4",
    "eval.generate.max_new_tokens": "4",
    "eval.bootstrap_resamples": "100",
}
TINY = LONG | {"matrix.data.rows": "{a: 16, b: 24}", "train.epochs": "2"}
LONG_STEPS = 250
_FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# Figures of an eval record that measure the machine.
_MEASURED = ("training", "generation", "environment")


class NotInstalled(RuntimeError):
    """Slurm cannot be started here; the text says what to do."""


def until(is_true: Callable[[], Any], what: str, every_seconds: float = 0.1) -> Any:
    """Wait until a fact holds; returns it. Fails with `what` was waited for."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if found := is_true():
            return found
        time.sleep(every_seconds)
    raise AssertionError(f"waited {PATIENCE_SECONDS:.0f} s in vain for {what}")


def free_ports(count: int) -> int:
    """The first of that many ports in a row that nobody listens at; other tests may run beside."""
    first = 17000 + 100 * (os.getpid() % 100)
    while True:
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                first += 100
                continue
            return first


def words_of(settings: Mapping[str, str]) -> list[str]:
    """The same settings as words of a command line."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@dataclass
class Cluster:
    """Three virtual nodes of one machine, in a folder of their own."""

    folder: Path
    port: int = 17000

    @property
    def environment(self) -> dict[str, str]:
        return ENVIRONMENT | {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def start(self) -> None:
        """Raises `NotInstalled`."""
        missing = [name for name in ("slurmctld", "munged", "mariadbd") if not shutil.which(name)]
        if missing:
            raise NotInstalled(
                f"{', '.join(missing)} missing: the Slurm tests run on a real Slurm;"
                " as root: tests/services/slurm_install.sh"
            )
        self._service("slurm_up.sh")

    def stop(self) -> None:
        self._service("slurm_down.sh")

    def _service(self, script: str) -> None:
        env = self.environment | {"SLURM_BASE_PORT": str(self.port)}
        with open(self.folder.parent / f"{self.folder.name}.log", "a", encoding="utf-8") as log:
            ended = subprocess.run(
                [SERVICES / script, self.folder], env=env, stdout=log, stderr=log, check=False
            )
        if ended.returncode:
            raise NotInstalled(f"{script}: {Path(log.name).read_text()[-2000:]}")

    def __call__(self, *words: str, env: Mapping[str, str] | None = None) -> str:
        """What one of Slurm's commands prints. Raises when it fails."""
        ended = subprocess.run(
            words,
            env=self.environment | dict(env or {}),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        if ended.returncode:
            raise AssertionError(f"{' '.join(words)}: {ended.stderr}{ended.stdout}")
        return ended.stdout.strip()

    def sbatch(self, *words: str | Path, env: Mapping[str, str] | None = None) -> Job:
        """Submit a job; its own output (not the task's log) goes to a file per job number."""
        output = self.folder / "log" / "job-%A_%a.out"
        options = ("--parsable", f"--output={output}", "--time=20")
        number = self("sbatch", *options, *map(str, words), env=env)
        return Job(self, number)

    def configure(self, *, requeue_exit: bool = True, user_signal: bool = True) -> None:
        """Change what kind of site this is, for jobs from now on."""
        path = self.folder / "etc" / "slurm.conf"
        kept = [
            line
            for line in path.read_text().splitlines()
            if not line.startswith(("RequeueExit=", "SlurmctldParameters="))
        ]
        if requeue_exit:
            kept.insert(0, "RequeueExit=75")
        if user_signal:
            kept.insert(0, "SlurmctldParameters=preempt_send_user_signal")
        path.write_text("\n".join(kept) + "\n")
        self("scontrol", "reconfigure")
        config = self("scontrol", "show", "config")
        assert bool(re.search(r"RequeueExit +=.*75", config)) == requeue_exit
        assert ("preempt_send_user_signal" in config) == user_signal

    def clear(self) -> None:
        """End what the last test left, without waiting for anybody's grace."""
        self("scancel", "-u", "root")
        for job in self("squeue", "-h", "-o", "%A").split():
            # It may have ended by itself by now.
            with contextlib.suppress(AssertionError):
                self("scancel", "--signal=KILL", "--full", job)
        until(lambda: not self("squeue", "-h"), "the last test's jobs to be gone")

    def stop_controller(self) -> None:
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the controller")

    @contextlib.contextmanager
    def held(self, job: Job) -> Iterator[None]:
        """A job's processes stand still meanwhile: they cannot end before Slurm has acted."""
        held = until(lambda: processes_of(job), f"processes of job {job.number}")
        for process in held.values():
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in held.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    def lose_node(self, node: str) -> None:
        """What a power cut does: the node's daemon and everything below it is gone."""
        pid = int((self.folder / "run" / f"slurmd.{node}.pid").read_text())
        doomed = [pid]
        # Steps outlive their daemon on purpose, so they are no children of it.
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if command.startswith(b"slurmstepd: [") and self._node_of(path.parent) == node:
                doomed += [int(path.parent.name), *_below(int(path.parent.name))]
        for number in doomed:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _node_of(self, process: Path) -> str:
        """Whose step a slurmstepd is: it has its node's log or spool open."""
        for link in (process / "fd").glob("*"):
            try:
                target = os.readlink(link)
            except FileNotFoundError:
                continue
            if found := re.search(rf"{re.escape(str(self.folder))}/log/slurmd\.(\w+)\.log", target):
                return found[1]
        return ""

    def bring_back(self, node: str) -> None:
        self("slurmd", "-N", node)
        until(
            lambda: "idle" in self("sinfo", "-h", "-n", node, "-p", "main", "-o", "%t"),
            f"{node} to be idle again",
        )


@dataclass(frozen=True)
class Job:
    """A job, or one element of an array (`17_3`)."""

    cluster: Cluster
    number: str

    def field(self, name: str) -> str:
        """A field of `scontrol show job`; empty where it has none."""
        text = self.cluster("scontrol", "-o", "show", "job", self.number)
        found = re.search(rf"(?:^|\s){name}=(\S*)", text)
        return found[1] if found else ""

    @property
    def state(self) -> str:
        return self.field("JobState")

    def wait_for_preemption(self) -> None:
        """Until Slurm has begun to take it away; without a GraceTime it is pending at once."""

        def is_begun() -> bool:
            return self.state != "RUNNING" or self.field("PreemptTime") not in ("", "None")

        until(is_begun, f"the preemption of job {self.number}")

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    @property
    def output(self) -> str:
        path = Path(self.field("StdOut"))
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self) -> str:
        """Wait for a final state."""

        def ended() -> str:
            state = self.state
            return state if state in _FINAL else ""

        # Every look is a process of its own.
        return str(until(ended, f"the end of job {self.number}", every_seconds=0.4))

    def legs(self) -> list[str]:
        """How each of its starts ended, as the accounting has it, once it has it all."""

        def told() -> list[str]:
            words = ("-D", "-X", "-n", "-P", "-j", self.number, "-o", "State")
            states = self.cluster("sacct", *words).splitlines()
            return states if states and states[-1] in _FINAL else []

        return list(until(told, f"the accounting of job {self.number}", every_seconds=0.4))


@dataclass(frozen=True)
class Task:
    """One task in a store."""

    store: Path
    name: str
    experiment: str = "smoke/medical_qa"

    @property
    def folder(self) -> Path:
        found = list(self.store.glob(f"{self.experiment}/*/tasks/{self.name}"))
        return found[0] if found else self.store / "nothing yet"

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def step(self) -> int:
        """Newest step with a manifest; -1 before the first."""
        found = self.folder.glob("train/checkpoints/step-*/manifest.json")
        return max((int(path.parent.name[5:]) for path in found), default=-1)

    def wait_for_step(self, step: int) -> None:
        until(lambda: self.step >= step, f"step {step} of {self.name}: {self.log[-2000:]}")

    def legs(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_bytes()) for path in sorted(self.folder.glob("legs/*.json"))]

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "train" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def products(self) -> dict[str, bytes]:
        """All bytes of a finished task that depend on the plan alone, by name."""
        from baton.train.state import MEASURED_FILES

        record = json.loads((self.folder / "eval" / "eval.json").read_bytes())
        scores = {key: value for key, value in record.items() if key not in _MEASURED}
        names = ["train/metrics.jsonl", "train/dev_history.json", "eval/predictions.jsonl"]
        names += ["data/train.tokens", "data/test.jsonl", "base/model.safetensors"]
        for step in {self.step, record["training"]["best_step"]}:
            place = self.folder / "train" / "checkpoints" / f"step-{step:06d}"
            names += [
                path.relative_to(self.folder).as_posix()
                for path in place.rglob("*")
                if path.is_file() and path.name not in MEASURED_FILES | {"manifest.json"}
            ]
        assert any(name.endswith("optimizer.safetensors") for name in names)
        found = {name: (self.folder / name).read_bytes() for name in names}
        return found | {"eval/eval.json": json.dumps(scores, sort_keys=True).encode()}


def assert_as_if_uninterrupted(task: Task, reference: Task, *, legs: int) -> None:
    """The oracle: bytes, metrics and log are those of a run that nothing happened to."""
    mine, other = task.products(), reference.products()
    odd = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
    assert not odd, f"not bit-identical to the uninterrupted run: {odd}"
    steps = [line["step"] for line in task.metrics() if "loss" in line]
    assert steps == sorted(set(steps)), "a step was logged twice"
    records = task.legs()
    assert [leg["number"] for leg in records] == list(range(1, legs + 1)), records
    assert records[-1]["state"] == "finished"
    for number in range(1, legs + 1):
        assert f" leg={number} " in task.log, f"leg {number} is missing in the log"


def run_locally(store: Path, words: Sequence[str], task: str, processes: int = 1) -> Task:
    """The same task without Slurm, in processes of this machine."""
    meeting = store / "meeting"
    started = []
    store.mkdir(parents=True, exist_ok=True)
    with open(store / "reference.log", "wb") as log:
        for rank in range(processes):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            command = [sys.executable, "-m", "baton", "run", f"smoke/medical_qa/{task}"]
            process = subprocess.Popen(
                [*command, "--task", task, "--store", str(store), *words],
                env=ENVIRONMENT | env | {"BATON_RENDEZVOUS": f"file://{meeting}"},
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
            started.append(process)
        statuses = [process.wait(timeout=PATIENCE_SECONDS) for process in started]
    assert set(statuses) == {0}, (store / "reference.log").read_text()[-3000:]
    return Task(store, task)


def _below(pid: int) -> list[int]:
    """Numbers of all processes that descend from one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(pid, []))
    for number in found:
        found += children.get(number, [])
    return found


def processes_of(job: Job) -> dict[int, int]:
    """Process numbers of the legs' processes of a job, by rank."""
    found: dict[int, int] = {}
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: -int(path.name)):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                pair.split(b"=", 1)
                for pair in (path / "environ").read_bytes().split(b"\0")
                if b"=" in pair
            )
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        # srun has the same words, but no rank; the init of a container has both.
        is_init = words[0].endswith(b"docker-init")
        is_leg = b"baton" in words and b"RANK" in variables and not is_init
        # Other tests have a cluster of their own, whose jobs have the same numbers.
        is_here = variables.get(b"SLURM_CONF") == job.cluster.environment["SLURM_CONF"].encode()
        element = [variables.get(b"SLURM_ARRAY_JOB_ID"), variables.get(b"SLURM_ARRAY_TASK_ID")]
        numbers = (variables.get(b"SLURM_JOB_ID"), b"_".join(word or b"" for word in element))
        if is_leg and is_here and job.number.encode() in numbers:
            found[int(variables[b"RANK"])] = int(path.name)
    return found
