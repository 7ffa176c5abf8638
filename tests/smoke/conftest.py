"""`baton` as a person runs it: a process of its own, a store of its own, the project's jobs."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "BATON_HOME": str(REPOSITORY),
    "BATON_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUNBUFFERED": "1",
}
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


@dataclass
class Baton:
    """Runs commands on one experiment in one store."""

    experiment: str
    store: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __call__(self, command: str, *words: str, task: str = "") -> Ended:
        process = self.start(command, *words, task=task)
        out, err = process.communicate(timeout=PATIENCE_SECONDS * 2)
        return Ended(process.returncode, out, err)

    def start(self, command: str, *words: str, task: str = "") -> subprocess.Popen[str]:
        name = f"{self.experiment}/{task}" if task else self.experiment
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", command, name, "--store", str(self.store), *words],
            env=ENVIRONMENT,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def status(self) -> dict[str, dict[str, Any]]:
        """The rows of `baton status --json`, by task."""
        ended = self("status", "--json")
        assert ended.status == 0, ended.err
        return {row["task"]: row for row in json.loads(ended.out)}

    @property
    def folder(self) -> Path:
        """The folder of the one plan in the store."""
        [plan] = self.store.glob("**/plan.json")
        return plan.parent

    def legs(self, task: str) -> list[dict[str, Any]]:
        paths = sorted((self.folder / "tasks" / task / "legs").glob("*.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def wait_for_step(self, task: str, step: int) -> None:
        """Until the train stage of a task says that it has reached a step."""

        def reached() -> bool:
            for path in self.store.glob(f"**/tasks/{task}/progress.json"):
                progress = json.loads(path.read_bytes())
                if progress.get("stage") == "train" and progress.get("step", -1) >= step:
                    return True
            return False

        wait_until(reached, f"{task} reaches step {step}")

    def clean_up(self) -> None:
        """Nothing that a test started survives it, whatever became of the test."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for path in self.store.glob("**/legs/*.json"):
            leg = json.loads(path.read_bytes())
            if leg["state"] == "active":
                end(leg["runner"]["pid"], str(self.store))


def end(pid: int, word: str) -> None:
    """Kill a process if it is one of ours, by a word of its command line."""
    try:
        if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


def wait_until(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until, f"waited {PATIENCE_SECONDS:.0f} s in vain until {what}"
        time.sleep(0.05)


# One task is enough for what happens to a launcher. It must still train when a signal comes.
MODEL = """\
pipeline: medical_qa
model:
  source: random
  config: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 512}
  tokenizer_vocab: 500
adapter: {targets: all-linear}
eval: {generate: {max_new_tokens: 4}, max_samples: 4, bootstrap_resamples: 100}
"""
LONG = f"""\
{MODEL}
data:
  path: jobs/smoke/medical_qa.csv
  columns: {{question: ask, answer: answer}}
  max_length: 128
train: {{max_steps: STEPS, batch_samples: 8, save_every_steps: 100, log_every_steps: 50}}
"""


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[Baton]:
    """An experiment of one task, `long`, of 1,000 short steps."""
    path = tmp_path / "long.yaml"
    path.write_text(LONG.replace("STEPS", "1000"), encoding="utf-8")
    baton = Baton(str(path), tmp_path / "runs")
    yield baton
    baton.clean_up()


@pytest.fixture
def short_pair(tmp_path: Path) -> Iterator[Baton]:
    """An experiment of the tasks `a` and `b`, of 300 short steps each."""
    path = tmp_path / "pair.yaml"
    matrix = "matrix: {train.seed: {a: 1, b: 2}}\n"
    path.write_text(matrix + LONG.replace("STEPS", "300"), encoding="utf-8")
    baton = Baton(str(path), tmp_path / "runs")
    yield baton
    baton.clean_up()


def smoke_experiments() -> list[str]:
    return sorted(f"smoke/{path.stem}" for path in (REPOSITORY / "jobs" / "smoke").glob("*.yaml"))


@dataclass(frozen=True)
class Drilled:
    """A smoke experiment after one submission with a preemption and a kill."""

    baton: Baton
    submitted: Ended
    tasks: list[str]
    preempted: str
    killed: str


@pytest.fixture(scope="session", params=smoke_experiments())
def drilled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drilled:
    """Submits the experiment once for all tests, whichever worker of xdist they run on."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = base / f"drilled-{request.param.replace('/', '-')}"
    place.mkdir(exist_ok=True)
    baton = Baton(request.param, place / "runs")
    planned = json.loads(baton("plan", "--json").out)
    tasks = [task["name"] for task in planned["tasks"]]
    preempted, killed = tasks[-1], tasks[0]
    outcome = place / "submitted.json"
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            drills = ["--drill", f"{preempted}=TERM@3", "--drill", f"{killed}=KILL@8"]
            ended = baton("submit", *drills)
            outcome.write_text(json.dumps([ended.status, ended.out, ended.err]))
    ended = Ended(*json.loads(outcome.read_text()))
    return Drilled(baton, ended, tasks, preempted, killed)


@pytest.fixture
def model_yaml() -> str:
    """A tiny random model for medical_qa, without data."""
    return MODEL
