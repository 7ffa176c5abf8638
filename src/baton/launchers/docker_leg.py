"""One leg as a container: how it is started, and what becomes of what it prints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton.config.docker_site import DockerSite
from baton.launchers.base import Request
from baton.launchers.docker_engine import Container, Image, env_file
from baton.launchers.docker_place import HOME, Place
from baton.record import LegRecord

PLAN_LABEL = "baton.plan"
TASK_LABEL = "baton.task"
SUBMISSION_LABEL = "baton.submission"
DEVICES_LABEL = "baton.devices"
OFFSET_LABEL = "baton.log-offset"
# After its grace a leg has saved; this is for what is left to say.
_MARGIN_SECONDS = 10
# Shared memory is where processes of one machine hand gradients to each other; only what is used
# of it is taken. Docker's default is 64 MB, with which NCCL ends in a bus error.
_SHARED_MEMORY = "16g"


def plan_label(request: Request) -> str:
    """What all containers of a plan in a store have in common, whoever started them."""
    where = hashlib.sha256(request.store_url.encode()).hexdigest()[:8]
    return f"{request.plan.experiment}/{request.plan.digest}/{where}"


def name_of(request: Request, task: str) -> str:
    """The name of a task's container: the engine refuses a second one of the same name."""
    token = hashlib.sha256(f"{plan_label(request)}/{task}".encode()).hexdigest()[:8]
    return f"baton-{task.replace('/', '-')[:100]}-{token}"


def words_of(
    site: DockerSite,
    request: Request,
    place: Place,
    image: Image,
    task: str,
    *,
    user: str | None,
    devices: Sequence[int],
    labels: Mapping[str, str],
    environment: Mapping[str, str],
) -> list[str]:
    """What `docker run` is told for a leg of a task; holds names of secrets, never values."""
    words = ["--init", "--stop-timeout", str(stop_timeout(site)), "--log-driver", "json-file"]
    for name, value in labels.items():
        words += ["--label", f"{name}={value}"]
    words += place.words(request)
    if site.cache.startswith("/"):
        words += ["--mount", f"type=bind,source={site.cache},target=/cache"]
    else:
        words += ["--mount", f"type=volume,source={site.cache},target=/cache"]
    if devices:
        # One word with quotes inside: Docker splits what is not quoted at commas.
        words += ["--gpus", f'"device={",".join(map(str, devices))}"']
    if site.processes > 1:
        words += ["--shm-size", _SHARED_MEMORY]
    if user is not None:
        words += ["--user", user]
    if site.memory_gb is not None:
        words += ["--memory", f"{round(site.memory_gb * 1024)}m"]
    for name, value in environment.items():
        words += ["--env", f"{name}={value}"]
    words += access_words(site)
    plan, store = place.names(request)
    run = ["run", plan, "--task", task, "--store", store]
    if site.processes > 1:
        run += ["--processes", str(site.processes)]
    return [*words, *site.flags, image.id, *run]


def access_words(site: DockerSite) -> list[str]:
    """Options that give a container what it needs to reach others: network, names, secrets."""
    words = [] if site.network is None else ["--network", site.network]
    for mount in site.mounts:
        words += ["--volume", mount]
    for name in site.env:
        # A name alone: the client takes the value from its environment, not from its arguments.
        if name in os.environ:
            words += ["--env", name]
    if site.env_file is not None:
        words += ["--env-file", str(env_file(site.env_file))]
    return words


def environment_of(
    site: DockerSite, image: Image, *, submission: str, devices: Sequence[int], drilled: bool
) -> dict[str, str]:
    """What a leg reads of its environment; none of it is secret."""
    values = {
        "BATON_HOME": HOME,
        "BATON_IMAGE": image.digest,
        "BATON_SUBMISSION": submission,
        "BATON_GRACE_SECONDS": f"{site.grace_seconds:g}",
        "OMP_NUM_THREADS": str(site.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not devices:
        values["BATON_DEVICE"] = "cpu"
    if drilled:
        # A drill must hit its step even in a run whose steps take milliseconds.
        values["BATON_PROGRESS_SECONDS"] = "0.01"
    return values


def stop_timeout(site: DockerSite) -> int:
    """Seconds between TERM and KILL of a `docker stop`: never less than the grace."""
    return math.ceil(site.grace_seconds) + _MARGIN_SECONDS


def labels_of(
    request: Request, task: str, *, submission: str, devices: Sequence[int], log: Path
) -> dict[str, str]:
    """What a later launcher must know to take a container over."""
    return {
        PLAN_LABEL: plan_label(request),
        TASK_LABEL: task,
        SUBMISSION_LABEL: submission,
        DEVICES_LABEL: json.dumps(list(devices)),
        OFFSET_LABEL: str(log.stat().st_size if log.exists() else 0),
    }


@dataclass
class DockerLeg:
    """A container at work, and the copying of what it prints into the task's log."""

    task: str
    container: str
    devices: list[int]
    started: str
    before: LegRecord | None
    log: Path
    # What of the container's output is in the log already: since when another has copied it.
    copied: int = 0
    signalled: bool = False
    reported: str = ""
    _follower: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _skip: int = field(default=0, init=False)

    @classmethod
    def taken_over(
        cls, container: Container, log: Path, before: LegRecord | None, started: str
    ) -> DockerLeg:
        """A container that another launcher has started and left."""
        labels = container.labels
        size = log.stat().st_size if log.exists() else 0
        return cls(
            task=labels[TASK_LABEL],
            container=container.id,
            devices=json.loads(labels[DEVICES_LABEL]),
            started=started,
            before=before,
            log=log,
            copied=max(0, size - int(labels[OFFSET_LABEL])),
        )

    @property
    def is_followed(self) -> bool:
        return self._follower is not None

    def follow(self, follower: subprocess.Popen[bytes]) -> None:
        """Copy from a `docker logs --follow`, which begins at the beginning, what is not copied."""
        assert follower.stdout is not None
        os.set_blocking(follower.stdout.fileno(), False)
        self._follower, self._skip = follower, self.copied

    def copy(self) -> bool:
        """Copy what there is by now; False at the end of the output, which ends the following."""
        follower = self._follower
        assert follower is not None
        assert follower.stdout is not None
        while (more := follower.stdout.read(1 << 16)) is not None:
            if not more:
                follower.wait()
                follower.stdout.close()
                self._follower = None
                return False
            fresh = more[self._skip :]
            self._skip = max(0, self._skip - len(more))
            self.copied += len(fresh)
            with open(self.log, "ab") as log:
                log.write(fresh)
        return True

    def let_go(self) -> None:
        """Stop following; the container goes on."""
        if self._follower is not None:
            self._follower.terminate()
            while self.copy():
                self._follower.wait()
