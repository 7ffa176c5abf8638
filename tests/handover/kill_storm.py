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
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from blows import Blow, late_blow, leg_under, next_blow
from far import KINDS, Far, far_store
from lab import EXPERIMENT, Lab, Task, differences
from machines import BARREN_LEGS, Machines
from tally import Tally
from zygote import Hung, Zygote

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
# What a leg's life is longer by when its store is far away.
REMOTE_LIFE = 1.5
STEP = re.compile(r" stage=(\w+) step=(\d+)/")


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
    tasks = [_task(lab, name, url) for _ in range(2 if far else 1)]
    folder = Path(tempfile.mkdtemp(dir=lab.folder, prefix="storm-"))
    machines = Machines(tasks, far, rng, folder, tally)
    where = f"{name} in {url or tasks[0].store.name}"
    life = reference.seconds * (REMOTE_LIFE if far else 1.0)
    for number in itertools.count(1):
        task = machines.next_machine()
        blow = None
        if not tally.is_enough:
            every = task.save_every_steps(task.stage)
            blow = next_blow(rng, life=life, every=every, is_remote=far is not None)
            if machines.barren_legs >= BARREN_LEGS:
                blow = late_blow(rng)
        log = folder / f"leg-{number:03d}.txt"
        try:
            status, kind = leg_under(blow, lab, task, log)
        except Hung as error:
            tally.unresumable.append(where)
            print(f"FAILED {where}: {error}", flush=True)
            return
        machines.note_leg(task)
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
    result = machines.result()
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
    for finished in tasks:
        shutil.rmtree(finished.machine or finished.store)
    shutil.rmtree(folder)
    if far is not None:
        far.forget(url)


def _task(lab: Lab, name: str, url: str = "") -> Task:
    experiment = EXPERIMENTS[name]
    if experiment == EXPERIMENT:
        return lab.task(SETTINGS, name=name, url=url)
    return lab.task(OTHERS[name], url=url, experiment=experiment)


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
