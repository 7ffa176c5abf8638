"""Kills of one leg: which, when, and how they are dealt."""

from __future__ import annotations

import math
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import Lab, Task
from zygote import Leg

# A save is some 60 file operations, a whole leg some 900 at most.
OPERATIONS = 700


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


def leg_under(blow: Blow | None, lab: Lab, task: Task, log: Path) -> tuple[int, str]:
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
