"""Containers from their start to their end: logs copied, drills done, verdicts given."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton.config.docker_site import DockerSite
from baton.errors import ConfigError, ExitStatus, NameTaken, SchedulerError
from baton.handover import StopSignal
from baton.launchers.base import LOG, Request, View
from baton.launchers.docker_engine import Container, Engine, Image
from baton.launchers.docker_leg import (
    TASK_LABEL,
    DockerLeg,
    environment_of,
    labels_of,
    name_of,
    words_of,
)
from baton.launchers.docker_place import Place
from baton.launchers.verdict import Verdicts
from baton.legs import utc_now
from baton.pipelines import PIPELINES
from baton.runner import task_prefix, task_store
from baton.stage import read_progress
from baton.store.task_names import CANCELLED

_POLL_SECONDS = 0.1
# A drill must hit its step even in a run whose steps take milliseconds.
_DRILL_SECONDS = 0.01
# Every copy of records out of a volume is a container of its own.
_FETCH_SECONDS = 10.0
_DRILLED_FETCH_SECONDS = 1.0
_RETRY_SECONDS = 10.0


@dataclass(kw_only=True)
class Watch:
    """One submission: the containers of its tasks, from the first to the last.

    Attributes:
        engine_id: which engine it is, so that a container's name means something elsewhere too.
        containers: what there is of these tasks when the submission begins.
        gpus: numbers of the GPUs to share out; empty: tasks run on the CPU.
    """

    site: DockerSite
    engine: Engine
    stop: StopSignal
    max_parallel: int | None
    request: Request
    view: View
    image: Image
    place: Place
    gpus: list[int]
    user: str | None
    engine_id: str
    containers: Sequence[Container]
    clock: Callable[[], float] = time.monotonic
    began: str = field(default_factory=utc_now)
    waiting: deque[str] = field(default_factory=deque)
    running: list[DockerLeg] = field(default_factory=list)
    ended: dict[str, ExitStatus] = field(default_factory=dict)
    _fetched: float = -1e9

    def __post_init__(self) -> None:
        self.drills = list(self.request.drills)
        self.verdicts = Verdicts(self.request, self.stop, self.site.retries, self.view)

    def to_the_end(self) -> dict[str, ExitStatus]:
        """How each task ended."""
        found = {c.labels[TASK_LABEL]: c for c in self.containers}
        for task in self.request.tasks:
            if task in found and found[task].is_running:
                self._take_over(found[task])
                continue
            if task in found:
                self._close(found[task])
            self.place.drop(f"{task_prefix(self.request.plan, task)}/{CANCELLED}")
            self.waiting.append(task)
        try:
            while self.waiting or self.running:
                self._start_what_fits()
                if self.stop.is_set and not self.running:
                    break
                with self._patience():
                    self._look_at_all()
                time.sleep(_DRILL_SECONDS if self.drills else _POLL_SECONDS)
        finally:
            for leg in self.running:
                leg.let_go()
        return self.ended | dict.fromkeys(self.waiting, ExitStatus.HANDED_OVER)

    def _start_what_fits(self) -> None:
        while self.waiting and len(self.running) < self._slots() and not self.stop.is_set:
            task = self.waiting.popleft()
            if self._folder(task).joinpath(CANCELLED).exists():
                self.view.event(task, "cancelled before it started")
                self.ended[task] = ExitStatus.STOP
                continue
            try:
                self.running.append(self._start(task))
            except SchedulerError as error:
                self.view.event(task, f"{error}; trying again")
                self.waiting.appendleft(task)
                time.sleep(_RETRY_SECONDS)
            except ConfigError as error:
                if not self.running:
                    raise
                self.view.event(task, f"stopped: {error}")
                self.ended[task] = ExitStatus.STOP

    def _slots(self) -> int:
        wanted = self.max_parallel
        if wanted is None and self.site.max_parallel != "auto":
            wanted = self.site.max_parallel
        # More tasks than GPUs would share one, and fill its memory.
        most = len(self.gpus) // self.site.processes if self.gpus else wanted or 1
        return min(wanted or most, most)

    def _start(self, task: str) -> DockerLeg:
        name, log = name_of(self.request, task), self._folder(task) / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        taken = {device for leg in self.running for device in leg.devices}
        devices = [gpu for gpu in self.gpus if gpu not in taken][: self.site.processes]
        # What stands before the `#` says that there is one container at a time; see legs.py.
        submission = f"docker:{self.engine_id}/{name}#{self.began}"
        words = words_of(
            self.site,
            self.request,
            self.place,
            self.image,
            task,
            user=self.user,
            devices=devices,
            labels=labels_of(self.request, task, submission=submission, devices=devices, log=log),
            environment=environment_of(
                self.site,
                self.image,
                submission=submission,
                devices=devices,
                drilled=bool(self.drills),
            ),
        )
        before, started = self.verdicts.newest(task), utc_now()
        try:
            container = self.engine.start(name, words)
        except NameTaken:
            [found] = [c for c in self.engine.find(f"{TASK_LABEL}={task}") if c.name == name]
            self.engine.remove(found.id)
            container = self.engine.start(name, words)
        where = f" on GPU {','.join(map(str, devices))}" if devices else ""
        self.view.event(task, f"started as {name}{where}")
        leg = DockerLeg(task, container, devices, started, before, log)
        leg.follow(self.engine.follow(container))
        return leg

    def _take_over(self, container: Container) -> None:
        task = container.labels[TASK_LABEL]
        log = self._folder(task) / LOG
        leg = DockerLeg.taken_over(container, log, self.verdicts.newest(task), self.began)
        leg.follow(self.engine.follow(container.id))
        self.running.append(leg)
        self.view.event(task, f"runs already as {container.name}; watching it from now on")

    def _close(self, container: Container) -> None:
        """Keep the last words of a container that ended while nobody watched, and remove it."""
        if container.was_started:
            log = self._folder(container.labels[TASK_LABEL]) / LOG
            log.parent.mkdir(parents=True, exist_ok=True)
            leg = DockerLeg.taken_over(container, log, None, self.began)
            leg.follow(self.engine.follow(container.id))
            while leg.copy():
                time.sleep(_POLL_SECONDS)
        self.engine.remove(container.id)

    def _look_at_all(self) -> None:
        for leg in list(self.running):
            if self.stop.is_set and not leg.signalled:
                leg.signalled = True
                self.engine.signal(leg.container, "TERM")
            if leg.is_followed and leg.copy():
                self._report(leg)
                continue
            container = self.engine.look(leg.container)
            if container is not None and container.is_running:
                # The engine, or the way to it, was gone for a while.
                leg.follow(self.engine.follow(leg.container))
                continue
            # Whatever the engine may fail to do comes before the leg is off the list.
            self.place.fetch(self.request, [leg.task])
            if container is not None:
                self.engine.remove(container.id)
            self.running.remove(leg)
            verdict = self._verdict(leg, container)
            if verdict is None:
                self.waiting.append(leg.task)
            else:
                self.ended[leg.task] = verdict
        every = _DRILLED_FETCH_SECONDS if self.drills else _FETCH_SECONDS
        if self.running and self.clock() - self._fetched >= every:
            self._fetched = self.clock()
            self.place.fetch(self.request, [leg.task for leg in self.running], whole=False)

    def _verdict(self, leg: DockerLeg, container: Container | None) -> ExitStatus | None:
        if container is None:
            self.view.event(leg.task, "somebody removed its container")
            return self.verdicts.of(leg.task, -9, before=leg.before)
        status, why = container.exit_status, ""
        if status > 128:
            status = 128 - status
        if container.out_of_memory:
            limit = f"memory_gb {self.site.memory_gb:g}" if self.site.memory_gb else "the machine"
            why = f"out of memory: {limit} is too small for it"
        return self.verdicts.of(leg.task, status, before=leg.before, why=why)

    def _report(self, leg: DockerLeg) -> None:
        progress = read_progress(self._folder(leg.task))
        if progress.get("time", "") < leg.started:
            return  # the last leg's
        if progress["time"] != leg.reported:
            leg.reported = progress["time"]
            self.view.progress(leg.task, progress)
        training = PIPELINES[self.request.plan.pipeline]().training_stages
        for drill in list(self.drills):
            is_reached = (
                progress.get("stage") in training and progress.get("step", -1) >= drill.step
            )
            if drill.task == leg.task and is_reached:
                self.drills.remove(drill)
                self.engine.signal(leg.container, drill.signal)
                self.view.event(leg.task, f"drill: SIG{drill.signal} at step {progress['step']}")

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """An engine that does not answer for a while is no reason to give up: containers go on."""
        try:
            yield
        except SchedulerError as error:
            self.view.event(self.request.plan.experiment, f"{error}; trying again")
            time.sleep(_RETRY_SECONDS)

    def _folder(self, task: str) -> Path:
        return task_store(self.request.store_root, self.request.plan, task).root
