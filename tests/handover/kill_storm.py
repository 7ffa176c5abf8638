"""Kill smoke tasks at random moments, let them resume by themselves, compare every byte.

    python tests/handover/kill_storm.py --kills 100 --seed 1 --store s3

Each task first runs once without interruption. Then the same tasks run in fresh stores, several
at a time (`--jobs`), while their legs are killed, half by SIGKILL and half by SIGTERM: after a
random time, at a random file operation (inside a save, a rotation, a restore, an evaluation),
while data are prepared, while the model loads, right after a resume, or by several signals at
once. A leg whose moment does not come is killed after a random time. The last line is the
verdict; the exit status is 0 only if every task resumed and every byte is the same. A kill that
comes after its task was done does not count.

With a remote store two machines (two scratch folders) take turns, one of them is lost now and
then with all it had, and a proxy in front of the server answers 503 or 500, breaks
connections, loses answers, cuts bodies short, corrupts bytes and is slow. What is compared at the
end is what an empty machine gets from the store; then the task is removed from it.

`--tally FILE` keeps what was counted, and goes on from what the file has: several storms, one
after the other, give one verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from far import KINDS, Far, far_store
from lab import EXPERIMENT, Lab, Task, differences
from zygote import Hung, Leg, Zygote

from baton.legs import NO_PROGRESS_LEGS
from baton.pipelines import PIPELINES

# Every way of training, with dropout on; 24 steps, a save every 4, an evaluation every 6.
SETTINGS = {
    "matrix.adapter.method": "null",
    "matrix.data.rows": "null",
    "matrix.kind": (
        "{lora: {adapter.method: lora}, qlora: {adapter.method: qlora},"
        " full: {adapter.method: full, train.learning_rate: 1e-3},"
        " lora_fp16: {adapter.method: lora, train.precision: fp16},"
        " lora_bf16: {adapter.method: lora, train.precision: bf16}}"
    ),
    "data.rows": "96",
    # bitsandbytes packs 4-bit weights for a CPU in blocks of 64.
    "model.config.hidden_size": "64",
    "model.config.intermediate_size": "128",
    "adapter.dropout": "0.1",
    "train.log_every_steps": "1",
    "train.eval_every_steps": "6",
    "train.save_every_steps": "4",
    "eval.max_samples": "12",
    "eval.generate.batch_size": "4",
    "eval.generate.max_new_tokens": "8",
}
# The way of training -> the experiment it is a task of: every pipeline in baton's table.
EXPERIMENTS = {
    **dict.fromkeys(("lora", "qlora", "full", "lora_fp16", "lora_bf16"), "smoke/medical_qa"),
    **{p: f"smoke/{p}" for p in sorted(PIPELINES) if p != "medical_qa"},
}
NAMES = tuple(EXPERIMENTS)
# Of the other pipelines the first task, as their smoke file has it, or smaller.
OTHERS = {
    **{pipeline: {"train.log_every_steps": "1"} for pipeline in PIPELINES},
    "clara": {f"stage{number}.train.log_every_steps": "1" for number in (1, 2, 3)},
    "questions_gen": {
        **{f"{stage}.log_every_steps": "1" for stage in ("sft", "grpo", "distill")},
        "sft.max_steps": "30",
        "sft.eval_every_steps": "30",
        # Two updates a batch of completions, with old and reference probabilities kept.
        "grpo.max_steps": "8",
        "grpo.eval_every_steps": "4",
        "grpo.save_every_steps": "3",
        "grpo.batch_samples": "16",
        "grpo.beta": "0.04",
        "grpo.learning_rate": "1e-4",
        "grpo.variation_share": "0.25",
    },
}
# After so many legs in a row that began at the same place the next one must get somewhere:
# baton rightly gives up after another.
BARREN_LEGS = NO_PROGRESS_LEGS - 1
# What a leg's life is longer by when its store is far away.
REMOTE_LIFE = 1.5
# A save is some 60 file operations, a whole leg some 900 at most.
OPERATIONS = 700
STEP = re.compile(r" stage=(\w+) step=(\d+)/")


# What storms one after the other have in common.
_COUNTED = (
    "kills",
    "unresumable",
    "different",
    "broken",
    "compared",
    "max_lost_steps",
    "lost_machines",
    "faults",
    "durable_seconds",
    "kinds",
)


@dataclass
class Tally:
    """What the storm has done and found so far; shared by the tasks that run side by side."""

    wanted: int
    most_seconds: float = math.inf
    kills: int = 0
    unresumable: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    compared: int = 0
    max_lost_steps: int = 0
    lost_machines: int = 0
    faults: int = 0
    durable_seconds: list[float] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    file: Path | None = None
    earlier_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    @property
    def is_enough(self) -> bool:
        return self.kills >= self.wanted or time.monotonic() - self.started > self.most_seconds

    @property
    def is_clean(self) -> bool:
        return not (self.unresumable or self.different or self.broken)

    def kill(self, kind: str) -> None:
        with self.lock:
            self.kills += 1
            self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def keep(self) -> None:
        """Write what was counted to the file, if there is one."""
        if self.file is None:
            return
        with self.lock:
            counted = {name: getattr(self, name) for name in _COUNTED} | {"seconds": self.seconds}
            beside = self.file.with_name(f"{self.file.name}.new")
            beside.write_text(json.dumps(counted))
            beside.replace(self.file)

    def go_on(self) -> None:
        """Add to what an earlier storm left in the file."""
        if self.file is None or not self.file.exists():
            return
        counted = json.loads(self.file.read_bytes())
        for name in _COUNTED:
            setattr(self, name, counted[name])
        self.earlier_seconds = counted["seconds"]

    def verdict(self) -> str:
        """The line that others quote; its format is fixed."""
        return (
            f"kill-storm: kills={self.kills} unresumable={len(self.unresumable)}"
            f" identical={'no' if self.different or not self.compared else 'yes'}"
            f" max_lost_steps={self.max_lost_steps}"
            f" p50_signal_to_durable_s={self._percentile(0.50)}"
            f" p99_signal_to_durable_s={self._percentile(0.99)}"
        )

    def _percentile(self, share: float) -> str:
        if not self.durable_seconds:
            return "none"
        ordered = sorted(self.durable_seconds)
        return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.3f}"


@dataclass(frozen=True)
class Blow:
    """One planned kill: what to wait for, how long after it, and what to send.

    Attributes:
        pattern: what the leg's log must show, `count` times; with `progress` something durable
            that was not there before.
        patience: seconds after which the leg is struck anyway.
        operation: the leg strikes itself right before this file operation.
        then: further signals, each with the seconds to wait before it.
    """

    kind: str
    number: signal.Signals
    pattern: str = ""
    count: int = 1
    progress: bool = False
    delay: float = 0.0
    patience: float = math.inf
    operation: int = 0
    then: tuple[tuple[float, signal.Signals], ...] = ()


def next_blow(rng: random.Random, *, life: float, every: int, is_remote: bool) -> Blow:
    """A kill for a leg that would live for `life` seconds and saves `every` so many steps.

    Half of all are SIGKILL and half SIGTERM.
    """
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    kind = rng.choices(
        (
            "anywhen",
            "operation",
            "step",
            "save",
            "data",
            "load",
            "evaluation",
            "resumed",
            "several",
            "upload",
            "stored",
            "download",
        ),
        (3, 5, 2, 3, 1, 1, 3, 2, 2, *((4, 2, 3) if is_remote else (0, 0, 0))),
    )[0]
    short, patience = rng.uniform(0, 0.05), rng.uniform(0, life)
    if kind == "anywhen":
        return Blow(kind, number, delay=patience)
    if kind == "operation":
        return Blow(kind, number, operation=rng.randint(1, OPERATIONS), patience=patience)
    if kind == "several":
        others = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGKILL)
        several = tuple(
            (rng.choice((0.0, rng.uniform(0, 0.05))), rng.choice(others)) for _ in range(2)
        )
        delay = rng.uniform(0, 0.2)
        return Blow(kind, number, " saved ", delay=delay, patience=patience, then=several)
    # The log line of a step that is saved comes right before its save; 6 and 18 are evaluated.
    saved = "|".join(map(str, sorted({6, 18, *range(every, 40 * every, every)})))
    patterns = {
        "step": (r" step=\d+/\d+ ", rng.randint(1, 12), short),
        "save": (rf" step=({saved})/\d+ ", rng.randint(1, 3), short / 2),
        "data": ("stage=data", 1, short),
        "load": ("stage started .*stage=(?!data)", 1, rng.uniform(0, 0.3)),
        "evaluation": (
            r" saved .* step=(6|12|18|24) | evaluated |stage started .*stage=eval|answered ",
            rng.randint(1, 4),
            rng.uniform(0, 0.1),
        ),
        "resumed": ("resumed ", 1, short),
        # The upload begins when the save is done, and is over some 50 ms later.
        "upload": (r" saved .* step=\d+ ", rng.randint(1, 3), rng.uniform(0, 0.1)),
        "stored": (r"stored .* step=\d+ ", rng.randint(1, 3), rng.uniform(0, 0.05)),
        # An empty machine brings everything before it starts; the log's first line is later.
        "download": ("", 1, rng.uniform(0.3, 1.2)),
    }
    pattern, count, delay = patterns[kind]
    return Blow(kind, number, pattern, count, delay=delay, patience=patience)


def late_blow(rng: random.Random) -> Blow:
    """A kill for a leg that must get somewhere first."""
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    return Blow("progress", number, progress=True, delay=rng.uniform(0, 0.3))


@dataclass
class Runs:
    """One task on the machines that take turns; one machine where the store is a folder."""

    machines: list[Task]
    far: Far | None
    rng: random.Random
    folder: Path
    tally: Tally
    at: int = 0
    _begun: dict[int, list[int]] = field(default_factory=dict)
    _unseen: int = 0

    def next_machine(self) -> Task:
        """Mostly the same again, as after a requeue; sometimes another, or an empty one.

        The same for sure after a leg that had to get somewhere: only there is what it did.
        """
        if self.far is None:
            return self.machines[0]
        if self.barren_legs < BARREN_LEGS:
            if self.rng.random() < 0.3:
                self.at = 1 - self.at
            if self.rng.random() < 0.15:
                shutil.rmtree(self.machines[self.at].store / "smoke", ignore_errors=True)
                self.tally.lost_machines += 1
        task = self.machines[self.at]
        task.plan.parent.mkdir(parents=True, exist_ok=True)
        task.plan.write_bytes(self.plan)
        self._break_things()
        return task

    def note_leg(self, task: Task) -> None:
        """Remember where legs began; one that was killed early is known to the store only."""
        before = max(self._begun, default=0)
        self._begun.update({leg["number"]: leg["position"] for leg in task.legs()})
        self._unseen = 0 if max(self._begun, default=0) > before else self._unseen + 1

    @property
    def barren_legs(self) -> int:
        """How many legs up to the newest began at the same place, as far as one can know."""
        begun = [self._begun[number] for number in sorted(self._begun, reverse=True)]
        same = itertools.takewhile(lambda place: place == begun[0], begun)
        return self._unseen + sum(1 for _ in same)

    def __post_init__(self) -> None:
        self.plan = self.machines[0].plan.read_bytes()

    def _break_things(self) -> None:
        assert self.far is not None
        proxy, rng = self.far.proxy, self.rng
        if rng.random() < 0.5:
            return
        self.tally.faults += 1
        method = rng.choice(("PUT|POST", "GET", ".*"))
        action = rng.choice(("status", "reset", "reset_request", "swallow", "truncate", "corrupt"))
        options: dict[str, object] = {}
        path = ".*"
        if action == "status":
            options = {"status": rng.choice((500, 503))}
        elif action == "corrupt":
            # What a store keeps, not what it says about it: that is TLS's to protect.
            method, path = "GET", r"/resolve/|/lfs-get/|/blobs/|\.json"
            options = {"at": rng.randint(0, 2000)}
        proxy.rule(
            action=action,
            method=method,
            path=path,
            times=rng.randint(1, 3),
            skip=rng.randint(0, 60),
            **options,
        )
        proxy.rule(action="delay", seconds=rng.uniform(0, 0.3), times=5, skip=rng.randint(0, 60))

    def result(self) -> Task:
        """What there is in the end: in the folder, or in the store for an empty machine."""
        if self.far is None:
            return self.machines[0]
        self.far.proxy.clear()
        return self.far.on_empty_machine(self.machines[0], self.folder / "result")


def storm_one(
    lab: Lab,
    name: str,
    reference: Reference,
    tally: Tally,
    rng: random.Random,
    far: Far | None,
) -> None:
    """Take one task through kills to its end, and compare."""
    url = far.url() if far else ""
    machines = [_task(lab, name, url) for _ in range(2 if far else 1)]
    folder = Path(tempfile.mkdtemp(dir=lab.folder, prefix="storm-"))
    runs = Runs(machines, far, rng, folder, tally)
    where = f"{name} in {url or machines[0].store.name}"
    life = reference.seconds * (REMOTE_LIFE if far else 1.0)
    for number in itertools.count(1):
        task = runs.next_machine()
        blow = None
        if not tally.is_enough:
            every = task.save_every_steps(task.stage)
            blow = next_blow(rng, life=life, every=every, is_remote=far is not None)
            if runs.barren_legs >= BARREN_LEGS:
                blow = late_blow(rng)
        log = folder / f"leg-{number:03d}.txt"
        try:
            status, kind = _leg(lab, task, blow, log)
        except Hung as error:
            tally.unresumable.append(where)
            print(f"FAILED {where}: {error}", flush=True)
            return
        runs.note_leg(task)
        if status == 0:
            break
        if kind and blow is not None:
            tally.kill(f"{kind}/{blow.number.name}")
            _check(task, blow, status, log, tally)
        if status not in (75, -signal.SIGKILL) and not _died_unready(status, log):
            tally.unresumable.append(where)
            print(f"FAILED {where}: leg {number} ended with {status}\n{_tail(log)}", flush=True)
            return
    if tally.is_enough and number == 1:
        return
    result = runs.result()
    odd = differences(result, reference.task)
    tally.compared += 1
    tally.keep()
    if odd:
        tally.different.append(f"{where}: {', '.join(odd)}")
        print(f"DIFFERS {where}: {', '.join(odd)}", flush=True)
        return
    print(
        f"{tally.seconds:6.1f} s  kills={tally.kills}/{tally.wanted}"
        f"  {name} identical after {number} legs",
        flush=True,
    )
    for finished in machines:
        shutil.rmtree(finished.machine or finished.store)
    shutil.rmtree(folder)
    if far is not None:
        far.forget(url)


def _task(lab: Lab, name: str, url: str = "") -> Task:
    experiment = EXPERIMENTS[name]
    if experiment == EXPERIMENT:
        return lab.task(SETTINGS, name=name, url=url)
    return lab.task(OTHERS[name], url=url, experiment=experiment)


def _leg(lab: Lab, task: Task, blow: Blow | None, log: Path) -> tuple[int, str]:
    """Run one leg; returns its exit status and the kind of the blow that hit it, if one did."""
    if blow is not None and blow.operation:
        trace = log.with_suffix(".operations")
        hook = {"trace": str(trace), "below": str(task.folder), "at": blow.operation}
        leg = lab.start(task, log=log, hook=("strike", {**hook, "number": int(blow.number)}))
        is_late = not _ended(leg, blow.patience) and leg.kill(blow.number)
        status = leg.wait()
        if trace.exists() and len(trace.read_bytes().splitlines()) >= blow.operation:
            return status, blow.kind
        return status, "anywhen" if is_late else ""
    leg = lab.start(task, log=log)
    if blow is None:
        return leg.wait(), ""
    kind = _await(leg, blow, lambda: _got_somewhere(task, leg))
    if not kind or (kind == blow.kind and _ended(leg, blow.delay)) or not leg.kill(blow.number):
        return leg.wait(), ""
    for seconds, number in blow.then:
        time.sleep(seconds)
        leg.kill(number)
    return leg.wait(), kind


def _await(leg: Leg, blow: Blow, has_progress: Callable[[], bool]) -> str:
    """Wait for a blow's moment; returns its kind, or "anywhen" if that did not come in time."""
    until, found, seen = time.monotonic() + blow.patience, re.compile(blow.pattern), -1
    while leg.poll() is None:
        if blow.progress:
            if has_progress():
                return blow.kind
        elif (size := leg.log.stat().st_size if leg.log.exists() else 0) != seen:
            seen = size
            if sum(1 for _ in found.finditer(leg.text)) >= blow.count:
                return blow.kind
        if time.monotonic() > until:
            return "anywhen"
        time.sleep(0.02 if blow.progress else 0.003)
    return ""


def _got_somewhere(task: Task, leg: Leg) -> bool:
    """Is there more here than when this leg began, after it had brought what the store has?"""
    return "stage started" in leg.text and task.position() > task.legs()[-1]["position"]


def _ended(leg: Leg, seconds: float) -> bool:
    """Let the leg work for a while; true if it ended in that time."""
    until = time.monotonic() + seconds
    while leg.poll() is None:
        left = until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, 0.01))
    return True


def _check(task: Task, blow: Blow, status: int, log: Path, tally: Tally) -> None:
    """What must hold after every kill, whenever it came."""
    text = _text(log)
    reached = {stage: max(map(int, steps)) for stage, steps in _logged(text).items()}
    stage = next((s for s in reversed(task.stages) if s in reached), task.stages[0])
    lost = max(0, reached.get(stage, 0) - max(task.steps(stage), default=0))
    tally.max_lost_steps = max(tally.max_lost_steps, lost)
    problems = []
    if lost > task.save_every_steps(stage):
        interval = task.save_every_steps(stage)
        problems.append(f"lost {lost} steps, the save interval is {interval}")
    # One that was asked to stop while it waited for the store had claimed nothing yet.
    if status == 75 and "leg ended" in text:
        record = task.legs()[-1]
        if lost:
            problems.append(f"handed over, but {lost} steps are lost")
        # One that only evaluated may have sent what an earlier one had trained.
        unsent = record["to_step"] not in (None, record["durable_step"])
        if task.url and unsent and not record["not_stored"]:
            problems.append("handed over, its last step is not stored, and the record is silent")
        if record["state"] != "handed_over" or record["exit_status"] != 75:
            problems.append(f"exit status 75, its record says {record['state']}")
        seconds = record["signal_to_durable_seconds"]
        if seconds is not None:
            tally.durable_seconds.append(seconds)
    has_term = signal.SIGKILL not in (blow.number, *(number for _, number in blow.then))
    if has_term and status not in (75, 0) and not _died_unready(status, log):
        problems.append(f"SIGTERM ended it with {status} instead of 75")
    for problem in problems:
        tally.broken.append(f"{task.name}: {problem}")
        print(f"BROKEN {task.name} ({blow.kind}): {problem}\n{_tail(log)}", flush=True)


def _logged(text: str) -> dict[str, list[str]]:
    """The steps that a leg's log speaks of, by training stage."""
    found: dict[str, list[str]] = {}
    for stage, step in STEP.findall(text):
        found.setdefault(stage, []).append(step)
    return found


def _died_unready(status: int, log: Path) -> bool:
    """Did the signal come before the command could take it, with nothing begun?"""
    unheard = (-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2)
    return status in unheard and not _text(log)


def _tail(log: Path) -> str:
    return "\n".join(_text(log).splitlines()[-15:])


def _text(log: Path) -> str:
    """A leg that is killed at once leaves not even a log."""
    return log.read_text(errors="replace") if log.exists() else ""


@dataclass(frozen=True)
class Reference:
    """A task that was run without interruption, and how long that took."""

    task: Task
    seconds: float


def _reference(lab: Lab, task: Task) -> Reference:
    started = time.monotonic()
    return Reference(lab.reference(task), time.monotonic() - started)


def storm(
    tally: Tally,
    *,
    seed: int = 0,
    jobs: int = 2,
    names: tuple[str, ...] = NAMES,
    zygote: Zygote | None = None,
    far: Far | None = None,
) -> Tally:
    """Kill until enough have hit or time is up; every task that was begun is taken to its end."""
    folder = Path(tempfile.mkdtemp(prefix="kill-storm-"))
    own = (
        None
        if zygote is not None
        else Zygote(environment={"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"})
    )
    try:
        lab = Lab(zygote or own, folder)  # type: ignore[arg-type]
        tasks = [_task(lab, name) for name in names]
        with ThreadPoolExecutor(jobs) as pool:
            finished = pool.map(lambda task: _reference(lab, task), tasks)
            references = dict(zip(names, finished, strict=True))
            print(f"{tally.seconds:6.1f} s  references done", flush=True)
            turns = itertools.count()

            def work(_: int) -> None:
                while not tally.is_enough and tally.is_clean:
                    turn = next(turns)
                    name = names[turn % len(names)]
                    rng = random.Random(f"{seed}-{turn}")
                    storm_one(lab, name, references[name], tally, rng, far)

            list(pool.map(work, range(jobs)))
    finally:
        if own is not None:
            own.close()
        if tally.is_clean:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"what was found lies in {folder}", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="tasks at once")
    parser.add_argument("--store", choices=("local", *KINDS), default="local")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no kill after so long"
    )
    parser.add_argument("--tally", type=Path, help="go on from what an earlier storm counted here")
    options = parser.parse_args()
    tally = Tally(wanted=options.kills, most_seconds=60 * options.minutes, file=options.tally)
    tally.go_on()
    with contextlib.ExitStack() as stack:
        far = None
        if options.store != "local":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hub-")))
            far = stack.enter_context(far_store(options.store, folder))
        storm(tally, seed=options.seed, jobs=options.jobs, far=far)
    tally.keep()
    if far is not None:
        print(
            f"store: {options.store}, lost machines: {tally.lost_machines}, faults: {tally.faults}"
        )
    print(f"kinds: {json.dumps(dict(sorted(tally.kinds.items())))}")
    print(f"tasks compared: {tally.compared}, {tally.seconds:.0f} s")
    print(tally.verdict())
    sys.exit(0 if tally.is_clean and tally.is_enough else 1)


if __name__ == "__main__":
    main()
