"""Where handovers are tried: tasks of the smoke experiment, run leg by leg, and what they leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zygote import LEG_SECONDS, Leg, Zygote

from baton.config.home import scratch_folder
from baton.identity import this_runner
from baton.legs import utc_now
from baton.record import LegRecord
from baton.store.task_names import position_of

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
EXPERIMENT = "smoke/medical_qa"
FAULTS = HERE / "faults.py"
# The smallest task that still has several saves, evaluations, epochs and micro-batches.
TINY = {
    "matrix.data.rows": "{tiny: 40}",
    "matrix.adapter.method": "[lora]",
    "data.dev_rows": "8",
    "model.config.hidden_size": "32",
    "model.config.intermediate_size": "64",
    "model.tokenizer_vocab": "400",
    "train.epochs": "2",
    "train.batch_samples": "8",
    "train.log_every_steps": "1",
    "train.eval_every_steps": "4",
    "train.save_every_steps": "2",
    "eval.max_samples": "4",
    "eval.generate.max_new_tokens": "4",
    "eval.bootstrap_resamples": "100",
}
# Files that tell of legs, machines and times, or that a machine's compiler made; checkpoints and
# the eval record are looked into.
_NOT_OF_THE_PLAN = re.compile(
    r"(.*/)?\..*|legs/.*|log\.txt|progress\.json|cancelled\.json|files\.json|.*README\.md|.*/tensorboard/.*"
    r"|compiled/.*|.*/done\.json|.*/shards/.*|.*/checkpoints/.*|\w+/summary\.json|eval/eval\.json"
)
# Figures of an eval record that measure the machine.
_MEASURED = ("training", "generation", "environment")


def first_leg(task: str) -> LegRecord:
    """The record of a task's first leg, run by this very process."""
    return LegRecord(
        task=task,
        number=1,
        state="active",
        runner=this_runner(),
        started=utc_now(),
        position=[0, 0, 0],
    )


@dataclass(frozen=True)
class Task:
    """One task of a frozen plan in a store; of a remote one, in one machine's copy of it."""

    store: Path
    plan: Path
    name: str
    url: str = ""
    machine: Path | None = None

    @property
    def folder(self) -> Path:
        return self.plan.parent / "tasks" / self.name

    @property
    def stages(self) -> tuple[str, ...]:
        """Its training stages, in order."""
        return self._pipeline.training_stages

    @property
    def _pipeline(self) -> Any:
        from baton.pipelines import PIPELINES

        return PIPELINES[json.loads(self.plan.read_bytes())["pipeline"]]()

    @property
    def stage(self) -> str:
        """The training stage that is at work, or the last one."""
        undone = (s for s in self.stages if not (self.folder / s / "done.json").exists())
        return next(undone, self.stages[-1])

    @property
    def checkpoints(self) -> Path:
        return self.folder / self.stage / "checkpoints"

    def save_every_steps(self, stage: str) -> int:
        plan = json.loads(self.plan.read_bytes())
        [config] = [task["config"] for task in plan["tasks"] if task["name"] == self.name]
        training = config.get(stage, {})
        return int(training.get("train", training)["save_every_steps"])

    def steps(self, stage: str = "") -> list[int]:
        """Steps with a manifest, oldest first; of the stage at work unless one is named."""
        place = self.folder / stage / "checkpoints" if stage else self.checkpoints
        found = place.glob("step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def legs(self) -> list[dict[str, Any]]:
        """The records of its legs, oldest first."""
        return [json.loads(path.read_bytes()) for path in sorted(self.folder.glob("legs/*.json"))]

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "train" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def position(self) -> list[int]:
        """How much of it is durable here, as the records of legs say it."""
        # `rglob` fails where a leg at work removes a folder; `walk` goes on.
        folders = (
            (Path(at).relative_to(self.folder), files) for at, _, files in os.walk(self.folder)
        )
        names = [(at / name).as_posix() for at, files in folders for name in files]
        return position_of(names, self._pipeline.stage_names)

    def copy_to(self, store: Path) -> Task:
        """The same task in another store, with all that was done so far."""
        shutil.copytree(self.store, store, symlinks=True)
        return replace(self, store=store, plan=store / self.plan.relative_to(self.store))


class Lab:
    """A zygote, a folder for stores, and the references that were run in it."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote = zygote
        self.folder = folder
        self._plans: dict[tuple[tuple[str, str], ...], Path] = {}
        self._references: dict[Path, Task] = {}

    def task(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        name: str = "",
        store: Path | None = None,
        url: str = "",
        experiment: str = EXPERIMENT,
    ) -> Task:
        """A task of a fresh store, remote with `url`. `settings` are `--set` words over `TINY`."""
        base = TINY if experiment == EXPERIMENT else {}
        key = (("", experiment), *sorted({**base, **(settings or {})}.items()))
        if key not in self._plans:
            self._plans[key] = self._freeze(experiment, dict(key[1:]))
        frozen = self._plans[key]
        plan = json.loads(frozen.read_bytes())
        machine = Path(tempfile.mkdtemp(dir=self.folder, prefix="store-"))
        if url:
            store = scratch_folder(url, {**os.environ, "BATON_SCRATCH": str(machine)})
        store = store or machine
        target = store / plan["experiment"] / plan["digest"] / "plan.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(frozen, target)
        task = Task(store, target, name or plan["tasks"][0]["name"])
        return replace(task, url=url, machine=machine) if url else task

    def reference(self, task: Task) -> Task:
        """The same task, run without interruption in a store of its own; run once."""
        plan = json.loads(task.plan.read_bytes())
        key = Path(plan["digest"], task.name)
        if key not in self._references:
            store = Path(tempfile.mkdtemp(dir=self.folder, prefix="reference-"))
            target = store / plan["experiment"] / plan["digest"] / "plan.json"
            target.parent.mkdir(parents=True)
            shutil.copyfile(task.plan, target)
            whole = Task(store, target, task.name)
            self.finish(whole)
            self._references[key] = whole
        return self._references[key]

    def start(
        self,
        task: Task,
        *options: str,
        env: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        log: Path | None = None,
        hook: tuple[str, Mapping[str, Any]] | None = None,
    ) -> Leg:
        """Start a leg; its log is a file of its own, beside the store."""
        log = log or Path(tempfile.mkdtemp(dir=self.folder, prefix="leg-")) / "log.txt"
        return self.zygote.start(
            ["run", task.plan, "--task", task.name, "--store", task.url or task.store, *options],
            log=log,
            env={"BATON_SUBMISSION": "lab", **_surroundings(task), **(env or {})},
            cwd=cwd,
            hook=(FAULTS, hook[0], hook[1]) if hook else None,
        )

    def finish_pair(self, task: Task) -> list[Leg]:
        """A leg of two processes that ends what is left of the task."""
        pair = self.start_pair(task)
        assert [leg.wait() for leg in pair] == [0, 0], pair[0].text[-2000:] + pair[1].text[-2000:]
        return pair

    def start_pair(
        self,
        task: Task,
        *options: str,
        env: Mapping[str, str] | None = None,
        hooks: Mapping[int, tuple[str, Mapping[str, Any]]] | None = None,
    ) -> list[Leg]:
        """One leg of two processes, which meet at a fresh file."""
        meeting = Path(tempfile.mkdtemp(dir=self.folder, prefix="meet-")) / "file"
        return [
            self.start(
                task,
                *options,
                env={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "BATON_RENDEZVOUS": f"file://{meeting}",
                    **(env or {}),
                },
                hook=(hooks or {}).get(rank),
            )
            for rank in range(2)
        ]

    def run(self, task: Task, *options: str, expect: int | None = 0, **named: Any) -> Leg:
        """Run one leg to its end and check its exit status."""
        leg = self.start(task, *options, **named)
        status = leg.wait()
        assert expect is None or status == expect, f"exit status {status}:\n{leg.text[-3000:]}"
        return leg

    def finish(self, task: Task, *options: str, legs: int = 5, **named: Any) -> list[Leg]:
        """Run leg after leg, as a launcher does, until the task is finished."""
        started = []
        for _ in range(legs):
            started.append(self.run(task, *options, expect=None, **named))
            if started[-1].status == 0:
                return started
            assert started[-1].status == 75, f"{started[-1].status}:\n{started[-1].text[-3000:]}"
        raise AssertionError(f"not finished after {legs} legs:\n{started[-1].text[-3000:]}")

    def traced(self, task: Task, at: int = 0, **named: Any) -> tuple[Leg, list[str]]:
        """Run one leg that is struck at its `at`-th file operation; returns its operations."""
        trace = Path(tempfile.mkdtemp(dir=self.folder, prefix="trace-")) / "operations"
        arguments = {"trace": str(trace), "below": str(task.folder), "at": at, **named}
        leg = self.start(task, hook=("strike", arguments))
        leg.wait()
        return leg, trace.read_text().splitlines()

    def _freeze(self, experiment: str, settings: Mapping[str, str]) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="plan-"))
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        leg = self.zygote.start(["plan", experiment, "--json", *words], log=folder / "plan.json")
        assert leg.wait() == 0, leg.text
        return folder / "plan.json"


def _surroundings(task: Task) -> dict[str, str]:
    """Where a remote task's machine and server are; legs are forked from an older process."""
    if not task.url:
        return {}
    named = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "HF_", "BATON_HUB_"))}
    return {**named, "BATON_SCRATCH": str(task.machine)}


def wait_for(leg: Leg, pattern: str, timeout: float = LEG_SECONDS) -> re.Match[str]:
    """Wait until the leg's log matches. Fails if the leg ends before."""
    return _await(leg, lambda: re.search(pattern, leg.text), f"{pattern!r} in its log", timeout)


def wait_until(leg: Leg, is_true: Any, what: str, timeout: float = LEG_SECONDS) -> None:
    """Wait until a fact about files holds. Fails if the leg ends before."""
    _await(leg, is_true, what, timeout)


def _await(leg: Leg, look: Any, what: str, timeout: float) -> Any:
    until = time.monotonic() + timeout
    while True:
        ended = leg.poll() is not None
        if found := look():
            return found
        if ended or time.monotonic() > until:
            leg.kill(signal.SIGKILL)
            raise AssertionError(f"the leg ended ({leg.status}) before {what}:\n{leg.text[-3000:]}")
        time.sleep(0.001)


def products(task: Task) -> dict[str, bytes]:
    """All bytes of a finished task that depend on the plan alone, by name."""
    from baton.train.state import MEASURED_FILES

    folder = task.folder
    record = json.loads((folder / "eval" / "eval.json").read_bytes())
    every = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in sorted(every) if not _NOT_OF_THE_PLAN.fullmatch(name)]
    wanted = {"eval/predictions.jsonl", *(f"{stage}/metrics.jsonl" for stage in task.stages)}
    assert wanted <= set(names), names
    for stage in task.stages:
        history = json.loads((folder / stage / "dev_history.json").read_bytes())
        summary = json.loads((folder / stage / "summary.json").read_bytes())
        assert not history or summary["best_step"] in [row[0] for row in history]
        for which, step in (("last", task.steps(stage)[-1]), ("best", summary["best_step"])):
            place = folder / stage / "checkpoints" / f"step-{step:06d}"
            every = (path for path in place.rglob("*") if path.is_file())
            files = {path.relative_to(place).as_posix() for path in every}
            kinds = {name.partition("/")[0] for name in files}
            assert kinds & {"optimizer.safetensors", "shards"}, f"{stage}, {which}: {sorted(files)}"
            names += [
                f"{stage}/checkpoints/{place.name}/{name}"
                for name in sorted(files - MEASURED_FILES - {"manifest.json"})
            ]
    found = {name: (folder / name).read_bytes() for name in names}
    scores = {key: value for key, value in record.items() if key not in _MEASURED}
    scores["best_step"] = record["training"]["best_step"]
    return found | {"eval/eval.json": json.dumps(scores, sort_keys=True).encode()}


def differences(task: Task, reference: Task) -> list[str]:
    """Names of products that are not byte for byte those of the reference."""
    mine, other = products(task), products(reference)
    return sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))


def assert_identical(task: Task, reference: Task) -> None:
    """The oracle of every scenario: bytes, order and metrics are those without interruption."""
    odd = differences(task, reference)
    assert not odd, f"not bit-identical to the uninterrupted run: {odd}"


def damage(path: Path, how: str) -> None:
    """Damage one file without touching the others that share its bytes through a hard link."""
    data = path.read_bytes()
    path.unlink()
    if how == "removed":
        return
    changed = {
        "truncated": data[: len(data) // 2],
        "emptied": b"",
        "flipped": data[: len(data) // 2]
        + bytes([data[len(data) // 2] ^ 4])
        + data[len(data) // 2 + 1 :],
    }
    path.write_bytes(changed[how])


def chunks(numbers: Sequence[int], count: int, which: int) -> list[int]:
    """Every `count`-th number from `which` on: shares of like length for parallel tests."""
    return list(numbers)[which::count]
