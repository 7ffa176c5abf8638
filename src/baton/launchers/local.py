"""Tasks as processes of this machine: started, watched and, after a handover, started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from baton.config.site import LocalSite
from baton.errors import ConfigError, ExitStatus
from baton.handover import StopSignal
from baton.launchers.base import LOG, Drill, Request, View, last_error
from baton.legs import Legs, this_runner, utc_now
from baton.record import dump_json
from baton.runner import task_store
from baton.stage import read_progress
from baton.status import TaskStatus
from baton.store.local import LocalStore
from baton.store.mirror import CANCELLED

_POLL_SECONDS = 0.05
# A drill must hit its step even in a run whose steps take milliseconds.
_DRILL_SECONDS = 0.01


@dataclass
class _Running:
    """The processes of one leg of one task."""

    task: str
    processes: list[subprocess.Popen[bytes]]
    devices: list[int]
    log: TextIO
    started: str = field(default_factory=utc_now)
    signalled: bool = False
    reported: str = ""

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def exit_status(self) -> int | None:
        """None while any process lives; then the first process's, or the first failure's."""
        statuses = [process.poll() for process in self.processes]
        if None in statuses:
            if any(status not in (None, 0, ExitStatus.HANDED_OVER) for status in statuses):
                # The others would wait for ever for a peer that is gone.
                self.send(signal.SIGKILL)
            return None
        return next((int(s) for s in statuses if s), 0)


@dataclass
class LocalLauncher:
    """Runs at most `max_parallel` tasks at once, each on its own GPUs where there are any."""

    site: LocalSite
    stop: StopSignal
    max_parallel: int | None = None
    gpus: list[int] = field(default_factory=lambda: visible_gpus())
    waits: bool = True
    look_every_seconds: float = 0.5

    def submit(self, request: Request, view: View) -> dict[str, ExitStatus]:
        """Run the tasks to their end, through as many handovers as it takes."""
        if self.gpus and len(self.gpus) < self.site.processes:
            raise ConfigError(
                f"a task needs {self.site.processes} GPUs (processes), this machine has"
                f" {len(self.gpus)}"
            )
        self._submission = f"local:{os.getpid()}:{utc_now()}"
        waiting, failures = deque(request.tasks), dict.fromkeys(request.tasks, 0)
        running: list[_Running] = []
        ended: dict[str, ExitStatus] = {}
        drills = list(request.drills)
        for task in request.tasks:
            task_store(request.store_root, request.plan, task).delete(CANCELLED)
        while waiting or running:
            while waiting and len(running) < self._slots() and not self.stop.is_set:
                task = waiting.popleft()
                if task_store(request.store_root, request.plan, task).path(CANCELLED).exists():
                    view.event(task, "cancelled before it started")
                    ended[task] = ExitStatus.STOP
                else:
                    running.append(self._start(request, task, running, view))
            if self.stop.is_set and not running:
                break
            for leg in list(running):
                self._watch(request, leg, drills, view)
                status = leg.exit_status()
                if status is None:
                    continue
                running.remove(leg)
                leg.log.close()
                verdict = self._verdict(request, leg, status, failures, view)
                if verdict is None:
                    waiting.append(leg.task)
                else:
                    ended[leg.task] = verdict
            time.sleep(_DRILL_SECONDS if drills else _POLL_SECONDS)
        return ended | dict.fromkeys(waiting, ExitStatus.HANDED_OVER)

    def cancel(self, request: Request, view: View) -> None:
        """Mark the tasks, so that no launcher starts them, and stop legs on this machine."""
        here = this_runner()
        for task in request.tasks:
            store = task_store(request.store_root, request.plan, task)
            store.write(CANCELLED, dump_json({"time": utc_now()}))
            legs = Legs(store, task, utc_now)
            newest = legs.newest()
            if newest is None or newest.state != "active" or not legs.is_alive(newest, here):
                view.event(task, "was not running; it will not be started")
            elif not newest.runner.is_visible_from(here):
                # The number of a process on another machine means nothing here.
                view.event(task, f"runs on {newest.runner.host}; stop it there")
            else:
                os.kill(newest.runner.pid, signal.SIGTERM)
                view.event(task, f"leg {newest.number} was asked to stop; its work is saved")

    def preview(self, request: Request) -> str:
        """The command of every task, and what each gets."""
        path, root, site = request.plan_path, request.store_url, self.site
        lines = [f"would run: baton run {path} --task {t} --store {root}" for t in request.tasks]
        processes = "1 process" if site.processes == 1 else f"{site.processes} processes"
        threads = "1 thread" if site.threads == 1 else f"{site.threads} threads"
        shape = f"a task is {processes} of {threads}, {site.grace_seconds:g} s grace"
        return "\n".join([*lines, f"site local: {shape}; nothing was started"])

    def look(self, request: Request, statuses: Sequence[TaskStatus]) -> list[TaskStatus]:
        """The records are all there is to know here."""
        return list(statuses)

    def _slots(self) -> int:
        if self.max_parallel is not None:
            wanted = self.max_parallel
        elif self.site.max_parallel == "auto":
            cores = os.cpu_count() or 1
            wanted = max(1, cores // (self.site.threads * self.site.processes))
            if self.gpus:
                wanted = len(self.gpus)
        else:
            wanted = self.site.max_parallel
        # More tasks than GPUs would share one, and fill its memory.
        return min(wanted, len(self.gpus) // self.site.processes) if self.gpus else wanted

    def _start(self, request: Request, task: str, running: list[_Running], view: View) -> _Running:
        store = task_store(request.store_root, request.plan, task)
        store.root.mkdir(parents=True, exist_ok=True)
        taken = {device for leg in running for device in leg.devices}
        devices = [gpu for gpu in self.gpus if gpu not in taken][: self.site.processes]
        rendezvous = store.root / ".rendezvous"
        rendezvous.unlink(missing_ok=True)
        log = open(store.root / LOG, "a", encoding="utf-8")  # noqa: SIM115  (the leg's, closed with it)
        command = [sys.executable, "-m", "baton", "run", str(request.plan_path)]
        command += ["--task", task, "--store", request.store_url]
        processes = []
        for rank in range(self.site.processes):
            env = os.environ | self.site.env | self._environment(rank, devices, rendezvous)
            if request.drills:
                env["BATON_PROGRESS_SECONDS"] = str(_DRILL_SECONDS)
            processes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C is for the launcher, which passes it on as TERM.
                    start_new_session=True,
                )
            )
        where = f" on GPU {','.join(map(str, devices))}" if devices else ""
        view.event(task, f"started{where}")
        return _Running(task, processes, devices, log)

    def _environment(self, rank: int, devices: list[int], rendezvous: Path) -> dict[str, str]:
        env = {
            "BATON_SUBMISSION": self._submission,
            "BATON_GRACE_SECONDS": str(self.site.grace_seconds),
            "OMP_NUM_THREADS": str(self.site.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.site.processes),
        }
        if self.site.processes > 1:
            env["BATON_RENDEZVOUS"] = f"file://{rendezvous}"
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        return env

    def _watch(self, request: Request, leg: _Running, drills: list[Drill], view: View) -> None:
        if self.stop.is_set and not leg.signalled:
            leg.signalled = True
            leg.send(signal.SIGTERM)
        progress = read_progress(task_store(request.store_root, request.plan, leg.task).root)
        if progress.get("time", "") < leg.started:
            return  # the last leg's
        if progress["time"] != leg.reported:
            leg.reported = progress["time"]
            view.progress(leg.task, progress)
        for drill in list(drills):
            is_reached = progress.get("stage") == "train" and progress.get("step", -1) >= drill.step
            if drill.task == leg.task and is_reached:
                drills.remove(drill)
                leg.send(signal.Signals[f"SIG{drill.signal}"])
                view.event(leg.task, f"drill: SIG{drill.signal} at step {progress['step']}")

    def _verdict(
        self, request: Request, leg: _Running, status: int, failures: dict[str, int], view: View
    ) -> ExitStatus | None:
        """How a task ended, or None if it is to be started again."""
        store = task_store(request.store_root, request.plan, leg.task)
        record = Legs(store, leg.task, utc_now).newest()
        reason = f": {record.reason}" if record and record.reason else ""
        if status == ExitStatus.FINISHED:
            view.event(leg.task, "finished")
            return ExitStatus.FINISHED
        if store.path(CANCELLED).exists():
            view.event(leg.task, "cancelled")
            return ExitStatus.STOP
        if status == ExitStatus.HANDED_OVER:
            # A leg that saved what it did: what fails after it has not failed in a row.
            if record and record.position_at_end != record.position:
                failures[leg.task] = 0
            step = record.durable_step if record else None
            kept = "nothing to resume from yet" if step is None else f"step {step} is durable"
            view.event(leg.task, f"handed over, {kept}{reason}")
            return ExitStatus.HANDED_OVER if self.stop.is_set else None
        if status == ExitStatus.STOP:
            view.event(leg.task, f"stopped{_last_words(store, reason)}")
            return ExitStatus.STOP
        killed = f"killed by {signal.Signals(-status).name}" if status < 0 else f"failed ({status})"
        if status > 0:
            # A kill is somebody's doing and says nothing about the task; the crash-loop rule
            # of legs.py bounds those.
            failures[leg.task] += 1
            killed += _last_words(store, reason)
        if failures[leg.task] > self.site.retries:
            view.event(leg.task, f"{killed}; given up after {failures[leg.task]} failures in a row")
            return ExitStatus.FAILED
        view.event(leg.task, f"{killed}; starting again")
        return ExitStatus.HANDED_OVER if self.stop.is_set else None


def _last_words(store: LocalStore, reason: str) -> str:
    """Why a leg ended: the last error it printed, or its record."""
    said = last_error(store.root)
    return f": {said}" if said else reason


def visible_gpus() -> list[int]:
    """Numbers of the GPUs this process may use, without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [int(number) for number in chosen.split(",") if number.strip().isdigit()]
    if shutil.which("nvidia-smi") is None or os.environ.get("BATON_DEVICE") == "cpu":
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return list(range(listed.stdout.count("GPU ")))
