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
from typing import TextIO

from baton.config.site import LocalSite
from baton.errors import ConfigError, ExitStatus
from baton.handover import StopSignal
from baton.identity import this_runner
from baton.launchers.base import LOG, Drill, Request, View
from baton.launchers.processes import LegProcesses
from baton.launchers.verdict import Verdicts
from baton.legs import Legs, utc_now
from baton.pipelines import PIPELINES
from baton.record import LegRecord, dump_json
from baton.runner import task_store
from baton.stage import read_progress
from baton.status import TaskStatus
from baton.store.task_names import CANCELLED

_POLL_SECONDS = 0.05
# A drill must hit its step even in a run whose steps take milliseconds.
_DRILL_SECONDS = 0.01


@dataclass
class _Running:
    """The processes of one leg of one task."""

    task: str
    processes: LegProcesses
    devices: list[int]
    log: TextIO
    before: LegRecord | None
    started: str = field(default_factory=utc_now)
    signalled: bool = False
    reported: str = ""


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
        waiting = deque(request.tasks)
        verdicts = Verdicts(request, self.stop, self.site.retries, view)
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
                    before = verdicts.newest(task)
                    running.append(self._start(request, task, before, running, view))
            if self.stop.is_set and not running:
                break
            for leg in list(running):
                self._watch(request, leg, drills, view)
                status = leg.processes.exit_status()
                if status is None:
                    continue
                running.remove(leg)
                leg.log.close()
                verdict = verdicts.of(leg.task, status, before=leg.before)
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

    def _start(
        self,
        request: Request,
        task: str,
        before: LegRecord | None,
        running: list[_Running],
        view: View,
    ) -> _Running:
        store = task_store(request.store_root, request.plan, task)
        store.root.mkdir(parents=True, exist_ok=True)
        taken = {device for leg in running for device in leg.devices}
        devices = [gpu for gpu in self.gpus if gpu not in taken][: self.site.processes]
        rendezvous = store.root / ".rendezvous"
        log = open(store.root / LOG, "a", encoding="utf-8")  # noqa: SIM115  (the leg's, closed with it)
        command = [sys.executable, "-m", "baton", "run", str(request.plan_path)]
        command += ["--task", task, "--store", request.store_url]
        env = os.environ | self.site.env | self._environment(devices)
        if request.drills:
            env["BATON_PROGRESS_SECONDS"] = str(_DRILL_SECONDS)
        processes = LegProcesses.start(
            command, self.site.processes, environment=env, rendezvous=rendezvous, output=log
        )
        where = f" on GPU {','.join(map(str, devices))}" if devices else ""
        view.event(task, f"started{where}")
        return _Running(task, processes, devices, log, before)

    def _environment(self, devices: list[int]) -> dict[str, str]:
        env = {
            "BATON_SUBMISSION": self._submission,
            "BATON_GRACE_SECONDS": str(self.site.grace_seconds),
            "OMP_NUM_THREADS": str(self.site.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        return env

    def _watch(self, request: Request, leg: _Running, drills: list[Drill], view: View) -> None:
        if self.stop.is_set and not leg.signalled:
            leg.signalled = True
            leg.processes.send(signal.SIGTERM)
        progress = read_progress(task_store(request.store_root, request.plan, leg.task).root)
        if progress.get("time", "") < leg.started:
            return  # the last leg's
        if progress["time"] != leg.reported:
            leg.reported = progress["time"]
            view.progress(leg.task, progress)
        training = PIPELINES[request.plan.pipeline]().training_stages
        for drill in list(drills):
            is_reached = (
                progress.get("stage") in training and progress.get("step", -1) >= drill.step
            )
            if drill.task == leg.task and is_reached:
                drills.remove(drill)
                leg.processes.send(signal.Signals[f"SIG{drill.signal}"])
                view.event(leg.task, f"drill: SIG{drill.signal} at step {progress['step']}")


def visible_gpus() -> list[int]:
    """Numbers of the GPUs this process may use, without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [int(number) for number in chosen.split(",") if number.strip().isdigit()]
    if shutil.which("nvidia-smi") is None or os.environ.get("BATON_DEVICE") == "cpu":
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return list(range(listed.stdout.count("GPU ")))
