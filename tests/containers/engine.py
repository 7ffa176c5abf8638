"""A real Docker engine on this machine, the images in it, and what their containers leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SERVICES = REPOSITORY / "tests" / "services"
PATIENCE_SECONDS = 240.0
IMAGE = "baton:cpu"
# A secret that must be nowhere afterwards.
CANARY = "hf_CanaryThatMustNotBeSeen0123456789ab"
# A tiny model and many steps: long enough to be taken away in the middle, more than once.
LONG = """\
pipeline: medical_qa
matrix: {train.seed: {long: 1, other: 2}}
model:
  source: random
  config: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 512}
  tokenizer_vocab: 400
data:
  path: jobs/smoke/medical_qa.csv
  columns: {question: ask, answer: answer}
  max_length: 128
  rows: 40
adapter: {targets: all-linear, dropout: 0.1}
train: {max_steps: 400, batch_samples: 8, log_every_steps: 10, save_every_steps: 50}
eval: {generate: {max_new_tokens: 4}, max_samples: 4, bootstrap_resamples: 100}
"""
SITE = """\
launcher: docker
image: baton:cpu
network: host
gpus: none
grace_seconds: 30
"""
# Figures of records that measure the machine, and what names versions of it.
_MEASURED = ("training", "generation", "environment")


class NotInstalled(RuntimeError):
    """An engine cannot be started here; the text says what to do."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def until(is_true: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait until a fact holds; returns it. Fails with `what` was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := is_true():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what}")


@dataclass
class Docker:
    """The engine below `folder`, and the `docker` command that belongs to it."""

    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "d.sock"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this engine and no other."""
        names = {name for name in os.environ if name.startswith(("BATON_", "DOCKER_"))}
        kept = {name: value for name, value in os.environ.items() if name not in names}
        # The distribution's client comes with BuildKit; another may stand before it on the path.
        path = f"{self.folder / 'client'}:{kept['PATH']}"
        return kept | {"DOCKER_HOST": f"unix://{self.socket}", "PATH": path}

    def start(self) -> None:
        """Raises `NotInstalled`."""
        missing = [name for name in ("dockerd", "runc", "mmdebstrap") if not shutil.which(name)]
        if missing:
            raise NotInstalled(
                f"{', '.join(missing)} missing: these tests run on a real Docker engine;"
                " as root: tests/services/docker_install.sh"
            )
        client = self.folder / "client"
        client.mkdir(parents=True, exist_ok=True)
        if not (client / "docker").is_symlink():
            (client / "docker").symlink_to("/usr/bin/docker")
        self._service("docker_up.sh", str(self.folder))
        self._service("docker_base.sh", str(self.folder / "base"))

    def stop(self) -> None:
        self._service("docker_down.sh", str(self.folder), "--remove")

    def _service(self, script: str, *words: str) -> None:
        command = ["bash", str(SERVICES / script), *words]
        ended = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise NotInstalled(f"{script}: {ended.stderr or ended.stdout}")

    def __call__(
        self,
        *words: str,
        given: str | None = None,
        environment: Mapping[str, str] | None = None,
        seconds: float = PATIENCE_SECONDS,
    ) -> Ended:
        ended = subprocess.run(
            ["docker", *words],
            env=self.environment | dict(environment or {}),
            input=given,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def must(self, *words: str, **named: Any) -> str:
        ended = self(*words, **named)
        assert ended.status == 0, f"docker {' '.join(words)}: {ended.err}"
        return ended.out.strip()

    def make(
        self, target: str, *arguments: str, folder: Path = REPOSITORY, **variables: str
    ) -> Ended:
        """`make image…`, as a person builds it, from the base image made here."""
        words = ["--progress plain", "--network host"]
        words += ["--build-arg BASE_IMAGE=localhost/base:latest", *arguments]
        more = [f"{name}={value}" for name, value in variables.items()]
        return self._here(["make", "-s", target, f"ARGS={' '.join(words)}", *more], folder)

    def check(self, image: str) -> Ended:
        """What `make image-check` runs on an image."""
        return self._here(["bash", str(REPOSITORY / "images" / "check.sh"), image], REPOSITORY)

    def _here(self, words: Sequence[str], folder: Path) -> Ended:
        ended = subprocess.run(
            words, cwd=folder, env=self.environment, capture_output=True, text=True, check=False
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)


@dataclass
class Project:
    """A folder of experiments and sites, a store, and `baton` on the engine."""

    docker: Docker
    home: Path
    store: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    def make(cls, docker: Docker, folder: Path) -> Project:
        home = folder / "project"
        (home / "jobs").mkdir(parents=True)
        (home / "launch").mkdir()
        shutil.copytree(REPOSITORY / "jobs" / "smoke", home / "jobs" / "smoke")
        (home / "jobs" / "long.yaml").write_text(LONG, encoding="utf-8")
        for name in ("local.yaml", "docker.yaml"):
            (home / "launch" / name).symlink_to(REPOSITORY / "launch" / name)
        project = cls(docker, home, folder / "runs")
        project.site("cpu")
        return project

    def site(self, name: str, more: str = "") -> None:
        (self.home / "launch" / f"{name}.yaml").write_text(SITE + more, encoding="utf-8")

    def __call__(self, *words: str, store: str | None = "", **environment: str) -> Ended:
        process = self.start(*words, store=store, **environment)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return Ended(process.returncode, out, err)

    def start(
        self, *words: str, store: str | None = "", **environment: str
    ) -> subprocess.Popen[str]:
        """`baton …` with this project's store, another (`store`), or (None) without the option."""
        place = [] if store is None else ["--store", store or str(self.store)]
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", *words, *place],
            env=self.docker.environment
            | {
                "BATON_HOME": str(self.home),
                "BATON_DEVICE": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": str(REPOSITORY / "src"),
            }
            | environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def task(self, name: str) -> Path:
        """The folder of a task of the one plan in the store."""
        [plan] = self.store.glob("**/plan.json")
        return plan.parent / "tasks" / name

    def legs(self, task: str) -> list[dict[str, Any]]:
        paths = sorted(self.task(task).glob("legs/*.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def log(self, task: str) -> str:
        return (self.task(task) / "log.txt").read_text(encoding="utf-8")

    def step(self, task: str) -> int:
        """The step that a task's training has reached; -1 before it begins."""
        for path in self.store.glob(f"**/tasks/{task}/progress.json"):
            progress = json.loads(path.read_bytes())
            if progress.get("stage") == "train":
                return int(progress.get("step", -1))
        return -1

    def reaches(self, task: str, step: int) -> None:
        def reached() -> bool:
            newest = self.started[-1]
            if newest.poll():
                out, err = newest.communicate()
                raise AssertionError(f"ended with {newest.returncode}: {out}{err}")
            return self.step(task) >= step

        until(reached, f"{task} to reach step {step}")

    def status(self, exp: str, site: str = "cpu") -> dict[str, dict[str, Any]]:
        """The rows of `baton status --json`, by task."""
        ended = self("status", exp, "--json", "--site", site)
        assert ended.status == 0, ended.err
        return {row["task"]: row for row in json.loads(ended.out)}

    def containers(self) -> list[str]:
        """Ids of the containers that work on this store."""
        words = ("ps", "--quiet", "--no-trunc", "--filter", "label=baton.plan")
        found = self.docker.must(*words).split()
        format = "{{range .Mounts}}{{.Source}} {{end}}"
        return [
            id for id in found if str(self.store) in self.docker.must("inspect", "-f", format, id)
        ]

    def clean_up(self) -> None:
        """Nothing that a test started survives it, whatever became of the test."""
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()
        for id in self.docker.must(
            "ps", "--all", "--quiet", "--filter", "label=baton.plan"
        ).split():
            self.docker("rm", "--force", id)


def products(folder: Path) -> dict[str, bytes]:
    """What a task has computed, without figures of the machine: equal in equal runs."""
    record = json.loads((folder / "eval" / "eval.json").read_bytes())
    steps = sorted((folder / "train" / "checkpoints").glob("step-*"))
    names = ["train/metrics.jsonl", "train/dev_history.json", "eval/predictions.jsonl"]
    names += ["data/train.tokens", "data/test.jsonl", "base/model.safetensors"]
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    for path in steps[-1].rglob("*"):
        # state.json names versions, timing.json measures, the manifest has the hashes of both.
        if path.is_file() and path.name not in ("state.json", "timing.json", "manifest.json"):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    state = json.loads((steps[-1] / "state.json").read_bytes())
    scores = {key: value for key, value in record.items() if key not in _MEASURED}
    for name, values in (("eval.json", scores), ("state.json", _without(state, "environment"))):
        found[name] = json.dumps(values, sort_keys=True).encode()
    assert any(name.endswith("optimizer.safetensors") for name in found)
    return found


def assert_same(mine: Path, other: Path) -> None:
    """The oracle: every product has the same bytes."""
    first, second = products(mine), products(other)
    names = first.keys() | second.keys()
    odd = sorted(name for name in names if first.get(name) != second.get(name))
    assert not odd, f"not bit-identical: {odd}"


def assert_no_step_twice(folder: Path) -> None:
    lines = (folder / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert steps == sorted(set(steps)), "a step was logged twice"


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, key) for k, v in value.items() if k != key}
    return value


def run(words: Sequence[str], **environment: str) -> Ended:
    """A command of this machine."""
    ended = subprocess.run(
        words, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)
