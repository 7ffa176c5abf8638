"""Tasks as containers: started, watched and, after a handover, started again.

A container outlives the launcher that started it. Whoever submits next takes over its watch.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from baton.config.docker_site import DockerSite
from baton.errors import ConfigError, ExitStatus
from baton.handover import StopSignal
from baton.launchers.base import LOG, Request, View
from baton.launchers.docker_engine import Container, Engine, Image
from baton.launchers.docker_leg import (
    PLAN_LABEL,
    TASK_LABEL,
    environment_of,
    labels_of,
    name_of,
    plan_label,
    words_of,
)
from baton.launchers.docker_lock import hold, is_held, lock_file
from baton.launchers.docker_place import place_of
from baton.launchers.docker_watch import Watch
from baton.legs import Legs, utc_now
from baton.pipelines import PIPELINES
from baton.record import dump_json
from baton.runner import task_prefix, task_store
from baton.status import TaskStatus, status_of
from baton.store.open import is_remote
from baton.store.task_names import CANCELLED


@dataclass
class DockerLauncher:
    """Runs at most `max_parallel` tasks at once, each on its own GPUs where there are any."""

    site: DockerSite
    stop: StopSignal
    max_parallel: int | None = None
    waits: bool = True
    look_every_seconds: float = 2.0
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = Engine(self.site.host)

    def submit(self, request: Request, view: View) -> dict[str, ExitStatus]:
        """Run the tasks to their end, through as many handovers as it takes.

        Raises:
            ConfigError, SchedulerError: the engine does not take the first container.
        """
        if not request.tasks:
            return {}
        info = self.engine.info()
        image = self.engine.image(self.site.image)
        place = place_of(self.site, request, self.engine, image.id)
        place.send(request)
        with contextlib.ExitStack() as held:
            tasks = [task for task in request.tasks if hold(request, task, held, view)]
            watch = Watch(
                site=self.site,
                engine=self.engine,
                stop=self.stop,
                max_parallel=self.max_parallel,
                request=replace(request, tasks=tasks),
                view=view,
                image=image,
                place=place,
                gpus=self._gpus(image, view),
                user=self._user(info, request),
                engine_id=str(info["ID"]),
                containers=self._containers(request),
            )
            elsewhere = [task for task in request.tasks if task not in tasks]
            return watch.to_the_end() | dict.fromkeys(elsewhere, ExitStatus.HANDED_OVER)

    def cancel(self, request: Request, view: View) -> None:
        """Mark the tasks, so that nobody starts them, and stop their containers."""
        image = self.engine.image(self.site.image)
        place = place_of(self.site, request, self.engine, image.id)
        at_work = {c.labels[TASK_LABEL]: c for c in self._containers(request) if c.is_running}
        for task in request.tasks:
            marker = f"{task_prefix(request.plan, task)}/{CANCELLED}"
            place.put(marker, dump_json({"time": utc_now()}))
            if task in at_work:
                self.engine.signal(at_work[task].id, "TERM")
                view.event(task, f"{at_work[task].name} was asked to stop; its work is saved")
            else:
                view.event(task, "was not running; it will not be started")

    def preview(self, request: Request) -> str:
        """The command of every task; starts nothing."""
        image = Image(self.site.image, self.site.image)
        place = place_of(self.site, request, self.engine, image.id)
        devices = self.site.gpus if isinstance(self.site.gpus, list) else []
        lines = []
        for task in request.tasks:
            log = task_store(request.store_root, request.plan, task).root / LOG
            submission = f"docker:{name_of(request, task)}"
            given = devices[: self.site.processes]
            words = words_of(
                self.site,
                request,
                place,
                image,
                task,
                user=self._user({}, request),
                devices=given,
                labels=labels_of(request, task, submission=submission, devices=given, log=log),
                environment=environment_of(
                    self.site, image, submission=submission, devices=given, drilled=False
                ),
            )
            name = name_of(request, task)
            lines.append(f"would run: docker run --detach --name {name} {shlex.join(words)}")
        gpus = "all GPUs of the engine" if self.site.gpus == "auto" else f"GPUs {devices or 'none'}"
        shape = f"{gpus}, {self.site.grace_seconds:g} s grace, image {self.site.image}"
        lines.append(f"engine {self.engine.endpoint}: {shape}; nothing was started")
        return "\n".join(lines)

    def look(self, request: Request, statuses: Sequence[TaskStatus]) -> list[TaskStatus]:
        """The records with what the engine knows.

        Raises:
            ConfigError, SchedulerError: the engine is not here, or does not answer.
        """
        found = {c.labels[TASK_LABEL]: c for c in self._containers(request)}
        if self.site.volume is not None and not is_remote(request.store_url):
            statuses = self._refreshed(request, statuses)
        return [
            self._joined(request, status, found[status.task]) if status.task in found else status
            for status in statuses
        ]

    def _refreshed(self, request: Request, statuses: Sequence[TaskStatus]) -> Sequence[TaskStatus]:
        """Statuses from the volume's records, where no launcher copies these all the time."""
        stale = [
            status.task
            for status in statuses
            if status.state != "finished" and not is_held(lock_file(request, status.task))
        ]
        image = self.engine.image_if_there(self.site.image)
        if stale and image is not None:
            place = place_of(self.site, request, self.engine, image.id)
            place.fetch(request, stale)
        stages = PIPELINES[request.plan.pipeline]().stage_names
        root, plan = request.store_root, request.plan
        fresh = [status_of(root, plan, stages, status.task) for status in statuses]
        # Checkpoints stay in the volume, so what is durable is what the legs have said.
        return [replace(s, durable_step=_durable_step(request, s.task)) for s in fresh]

    def _joined(self, request: Request, status: TaskStatus, container: Container) -> TaskStatus:
        status = replace(status, job=container.name)
        if status.state == "finished":
            return status
        is_watched = is_held(lock_file(request, status.task))
        if not container.is_running:
            # Its launcher is about to judge it, unless there is none any more.
            if is_watched or not container.was_started:
                return status
            said = f"its container ended ({container.exit_status}) and nobody watched: submit again"
            state = "lost" if status.state == "running" else status.state
            reason = f"{status.reason}; {said}" if status.reason else said
            return replace(status, state=state, reason=reason)
        if not is_watched:
            advice = "runs without a launcher: submit again, and it is started again when it ends"
            return replace(status, state="unattended", reason=advice)
        if status.state == "running":
            return status
        return replace(status, state="running", reason="no step yet")

    def _containers(self, request: Request) -> list[Container]:
        return self.engine.find(f"{PLAN_LABEL}={plan_label(request)}")

    def _gpus(self, image: Image, view: View) -> list[int]:
        """Numbers of the GPUs that tasks may use; empty: they run on the CPU.

        Raises:
            ConfigError: an engine elsewhere has none, though it was not told to do without.
        """
        if isinstance(self.site.gpus, list):
            return self.site.gpus
        if self.site.gpus == "none":
            return []
        if not self.engine.is_elsewhere and shutil.which("nvidia-smi") is None:
            return []
        try:
            gpus = list(range(self.engine.gpus(image)))
        except ConfigError as error:
            if self.engine.is_elsewhere:
                # Hours of training on the CPU of a rented machine are nobody's wish.
                raise
            view.event("GPUs", f"none can be used, so tasks run on the CPU: {error}")
            return []
        if len(gpus) < self.site.processes:
            raise ConfigError(
                f"a task needs {self.site.processes} GPUs (processes), the engine has {len(gpus)}"
            )
        return gpus

    def _user(self, info: dict[str, object], request: Request) -> str | None:
        """Who a container runs as: what it writes into a folder is to belong to who submits."""
        if self.site.user != "auto":
            return self.site.user
        if self.site.volume is not None or is_remote(request.store_url):
            return None
        # A rootless engine's root is the person who started it.
        if "name=rootless" in str(info.get("SecurityOptions", "")):
            return "0:0"
        return f"{os.getuid()}:{os.getgid()}"


def _durable_step(request: Request, task: str) -> int | None:
    legs = Legs(task_store(request.store_root, request.plan, task), task, utc_now)
    steps = [leg.durable_step for leg in legs.history() if leg.durable_step is not None]
    return max(steps, default=None)
