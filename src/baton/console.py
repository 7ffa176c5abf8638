"""What people see in a terminal while tasks run, and the tables they ask for."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from baton.record import Plan
from baton.status import JobLeg, TaskStatus

# On anything but a terminal, one line a task in so many seconds is enough.
_LINE_EVERY_SECONDS = 30.0


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def event(self, task: str, text: str) -> None:
        sys.stdout.write(f"{_clock()} {task}: {text}\n")
        sys.stdout.flush()

    def progress(self, task: str, values: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if "step" in values and now - self._last.get(task, 0.0) >= _LINE_EVERY_SECONDS:
            self._last[task] = now
            self.event(task, progress_text(values))

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Bars:
    """One progress bar a task, events scrolling by above them."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(),
        )
        self._ids: dict[str, Any] = {}

    def event(self, task: str, text: str) -> None:
        self._bars.console.print(f"{_clock()} [bold]{escape(task)}[/bold]: {escape(text)}")
        if task in self._ids and not text.startswith(("started", "drill")):
            self._bars.remove_task(self._ids.pop(task))

    def progress(self, task: str, values: Mapping[str, Any]) -> None:
        if "step" not in values:
            return
        if task not in self._ids:
            self._ids[task] = self._bars.add_task(task, total=None, text="")
        self._bars.update(
            self._ids[task],
            description=f"{task} {values.get('stage', '')}",
            completed=values["step"],
            total=values.get("total"),
            text=progress_text(values, counts=False),
        )

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def view() -> Lines | Bars:
    """Bars on a terminal, plain lines elsewhere."""
    return Bars() if sys.stdout.isatty() else Lines()


def progress_text(values: Mapping[str, Any], *, counts: bool = True) -> str:
    """`train 40/120 steps, loss 2.31, 1,234 tok/s, ETA 2:05, durable step 32`."""
    parts = []
    if counts:
        unit = values.get("unit", "steps")
        parts.append(
            f"{values.get('stage', '')} {values['step']}/{values.get('total', '?')} {unit}"
        )
    if values.get("loss") is not None:
        parts.append(f"loss {values['loss']:.3f}")
    if values.get("tokens_per_s"):
        parts.append(f"{values['tokens_per_s']:,.0f} tok/s")
    if values.get("eta_seconds"):
        parts.append(f"ETA {duration(values['eta_seconds'])}")
    if values.get("durable_step") is not None:
        parts.append(f"durable step {values['durable_step']}")
    return ", ".join(parts)


def duration(seconds: float | None) -> str:
    """`1:02:03` or `2:05`; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, or wide enough for a log."""
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def status_table(plan: Plan, statuses: Sequence[TaskStatus]) -> Table:
    """The table of `baton status`."""
    table = Table(title=f"{plan.experiment}/{plan.digest}", title_justify="left")
    names = ["task", "state", "legs", "stage", "step", "tok/s", "ETA", "durable"]
    has_jobs = any(s.job for s in statuses)
    names += ["job", "GPU-h"] if has_jobs else []
    for name in (*names, "last reason"):
        right = name in ("legs", "done", "tok/s", "ETA", "durable", "GPU-h")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for s in statuses:
        speed = f"{s.tokens_per_s:,.0f}" if s.tokens_per_s else ""
        step = "" if s.step is None else f"{s.step}/{s.total} {s.unit}"
        durable = "" if s.durable_step is None else str(s.durable_step)
        if s.local_step is not None and s.local_step > (s.durable_step or -1):
            durable = f"{durable or 'none'} (here {s.local_step})"
        cells = [s.task, s.state, str(s.legs), s.stage, step, speed, duration(s.eta_seconds)]
        cells += [durable]
        if has_jobs:
            cells += [s.job, "" if s.gpu_hours is None else f"{s.gpu_hours:,.2f}"]
        table.add_row(*map(escape, (*cells, s.reason)))
    return table


def job_legs_table(legs: Sequence[JobLeg]) -> Table:
    """Every leg of a task as the scheduler remembers it."""
    table = Table(title="legs, as Slurm remembers them (UTC)", title_justify="left")
    numbers = ("leg", "durable", "lasted", "GPUs")
    for name in ("leg", "job", "state", "why it ended", "durable", "nodes", "started", "ended"):
        table.add_column(name, justify="right" if name in numbers else "left")
    for name in ("lasted", "GPUs"):
        table.add_column(name, justify="right")
    for leg in legs:
        number, step = ("" if n is None else str(n) for n in (leg.leg, leg.durable_step))
        cells = (number, leg.job, leg.state, leg.why, step, leg.nodes, leg.started, leg.ended)
        table.add_row(*map(escape, (*cells, duration(leg.seconds), str(leg.gpus))))
    return table


# Up to so many tasks stand side by side, every score a line; more stand below each other.
_SIDE_BY_SIDE = 8
_COSTS = ("dev_loss", "train_seconds", "train_tokens_per_s", "train_peak_gpu_memory_gib", "legs")


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `results_summary.csv`, as far as a terminal can show them."""
    scores = [name for name in rows[0] if f"{name}_low" in rows[0]]
    costs = [name for name in _COSTS if name in rows[0]]
    table = Table()
    if len(rows) <= _SIDE_BY_SIDE:
        table.add_column("")
        for row in rows:
            table.add_column(escape(str(row["task"])), justify="right")
        for name in ("state", *scores, *costs):
            if any(row.get(name) is not None for row in rows):
                table.add_row(name, *(_cell(row, name) for row in rows))
        return table
    columns = ("task", "state", *scores[:3], *costs[:2])
    for name in columns:
        table.add_column(name, justify="left" if name in ("task", "state") else "right")
    for row in rows:
        table.add_row(*(_cell(row, name) for name in columns))
    return table


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, float):
        return escape(str(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock() -> str:
    return time.strftime("%H:%M:%S")
