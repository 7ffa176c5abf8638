"""A Slurm cluster as a site: what a task's job asks for, and how it is run there."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from baton.config.decode import Positive, at_least, between

# Slurm keeps the seconds of --signal in 16 bits.
_GRACE = between(1, 65535)
_TIME = re.compile(r"(?:([0-9]+)-)?([0-9]{1,3}):([0-9]{2}):([0-9]{2})")
_GRES = re.compile(r"(gpu(?::[A-Za-z][\w.-]*)?)(?::([0-9]+))?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)(?:=(.*))?")
_MOUNT = re.compile(r"/[^\s:,]*(?::/[^\s:,]*(?::r[ow])?)?")
# Flags that would break what baton promises, and the key that says the same safely.
_OWN_FLAGS = {
    **dict.fromkeys(("array", "output", "error", "open-mode", "job-name", "chdir", "wrap"), ""),
    **dict.fromkeys(("dependency", "kill-on-invalid-dep", "export-file", "parsable", "wait"), ""),
    "export": "env",
    "signal": "grace_seconds",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "gres": "gpu",
    "gpus": "gpus_per_task",
    "nodes": "nodes",
    "ntasks": "processes",
    "ntasks-per-node": "processes",
    "cpus-per-task": "cpus",
    "mem": "memory_gb",
    "exclusive": "exclusive",
    "mail-user": "mail",
    "mail-type": "mail_events",
    "constraint": "a gpu type's constraint",
}
MailEvent = Literal["BEGIN", "END", "FAIL", "REQUEUE", "ALL", "TIME_LIMIT", "TIME_LIMIT_80"]


@dataclass(frozen=True, kw_only=True)
class GpuType:
    """What to ask Slurm for to get one kind of GPU.

    Attributes:
        gres: `gpu:a100`, as `sinfo -o %G` shows it; with a count (`gpu:a100:4`) it also says
            how many a task gets, unless `gpus_per_task` does.
        constraint: a node feature (`sinfo -o %f`), where the gres alone does not tell.
        partition: where these GPUs are, if not in the site's partition.
    """

    gres: str
    constraint: str | None = None
    partition: str | None = None
    price_per_gpu_hour: Annotated[float | None, at_least(0)] = None

    def __post_init__(self) -> None:
        if not _GRES.fullmatch(self.gres):
            raise ValueError(f"gres must look like gpu:a100 or gpu:a100:4, got {self.gres!r}")

    @property
    def name(self) -> str:
        """`gpu:a100`, without a count."""
        found = _GRES.fullmatch(self.gres)
        assert found
        return found[1]

    @property
    def count(self) -> int:
        """GPUs that the gres itself asks for; 1 where it has no number."""
        found = _GRES.fullmatch(self.gres)
        assert found
        return int(found[2] or 1)


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """What the job of one stage asks for where that differs from the site."""

    partition: str | None = None
    qos: str | None = None
    gpu: str | None = None
    gpus_per_task: Annotated[int | None, at_least(0)] = None
    nodes: Annotated[int | None, at_least(1)] = None
    processes: Annotated[int | None, at_least(1)] = None
    cpus: Annotated[int | None, at_least(1)] = None
    memory_gb: Annotated[float | None, Positive] = None
    time: str | None = None


@dataclass(frozen=True, kw_only=True)
class SlurmSite:
    """A Slurm cluster; tasks are the elements of one job array.

    Attributes:
        store: a folder that every node sees.
        gpu: one of `gpu_types`; None asks for no GPU.
        gpus_per_task: over all its nodes; default: what the gres of `gpu` says, per node.
        processes: training processes of a task; default: one a GPU.
        cpus: cores of each process. memory_gb: memory on each node.
        threads: CPU threads of a process; part of the result on a CPU, so fixed.
        time: of one leg, `H:MM:SS` or `D-HH:MM:SS`; a task may take as many legs as it needs.
        grace_seconds: how long before the time limit the work is saved.
        max_parallel: tasks at once (`%N` of the array); None leaves it to Slurm.
        env: names of variables that jobs get from the environment of `baton submit`.
        env_file: a file of `NAME=value` lines that only you can read, read by each leg; for
            clusters that keep the environment of every job.
        mounts: `/host:/container[:ro]` for a container; the store is always mounted.
        venv: the virtual environment of `runtime: none`; default: the one that submits.
        setup: shell lines before each leg, such as `module load cuda`.
        requeue: `auto` requeues a leg that handed over, or submits it as a new job where that
            is refused; `resubmit` always does the latter; `never` leaves it to a person.
        stages: stages that get a job of their own, and what it asks for.
        collect: write table and report in a last job, on the python that submits.
    """

    launcher: Literal["slurm"]
    store: str = "runs"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpu_types: dict[str, GpuType] = field(default_factory=dict)
    gpu: str | None = None
    gpus_per_task: Annotated[int | None, at_least(0)] = None
    nodes: Annotated[int, at_least(1)] = 1
    processes: Annotated[int | None, at_least(1)] = None
    cpus: Annotated[int, at_least(1)] = 1
    memory_gb: Annotated[float | None, Positive] = None
    threads: Annotated[int, at_least(1)] = 1
    time: str
    grace_seconds: Annotated[int, _GRACE] = 120
    max_parallel: Annotated[int | None, at_least(1)] = None
    retries: Annotated[int, at_least(0)] = 2
    mail: str | None = None
    mail_events: list[MailEvent] = field(default_factory=lambda: ["END", "FAIL"])
    exclusive: bool = False
    flags: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    env_file: str | None = None
    runtime: Literal["none", "apptainer", "pyxis", "docker", "podman"] = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    venv: str | None = None
    setup: list[str] = field(default_factory=list)
    requeue: Literal["auto", "resubmit", "never"] = "auto"
    price_per_gpu_hour: Annotated[float | None, at_least(0)] = None
    stages: dict[str, StageJob] = field(default_factory=dict)
    collect: bool = False

    def __post_init__(self) -> None:
        self._check_gpu()
        seconds = seconds_of(self.time)
        if self.grace_seconds >= seconds:
            raise ValueError(
                f"grace_seconds must be less than time ({self.time}), got {self.grace_seconds}"
            )
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                shown = name.partition("=")[0]
                raise ValueError(
                    f"env: names of variables only, got {shown + '=…' if '=' in name else name!r};"
                    " a value stays in the environment you submit from, or in `setup`"
                )
        for mount in self.mounts:
            if not _MOUNT.fullmatch(mount):
                raise ValueError(
                    f"mounts: expected /host, /host:/container or /host:/container:ro, got"
                    f" {mount!r}"
                )
        for line in (*self.setup, *self.flags):
            if "\n" in line:
                raise ValueError(f"setup and flags: one line each, got {line!r}")
        self.flag_values()
        if self.runtime == "none" and self.image:
            raise ValueError(f"image {self.image!r} needs a runtime such as apptainer, got none")
        if self.runtime != "none" and not self.image:
            raise ValueError(f"runtime {self.runtime} needs an image")
        if self.runtime != "none" and self.venv:
            raise ValueError(f"venv is for runtime none; with {self.runtime} the image has python")
        for stage in self.stages:
            self._check_stage(stage)

    def _check_gpu(self) -> None:
        if self.gpu is not None and self.gpu not in self.gpu_types:
            known = ", ".join(self.gpu_types) or "none"
            raise ValueError(f"gpu must be one of gpu_types ({known}), got {self.gpu!r}")
        if self.gpu is None and self.gpus_per_task:
            raise ValueError("gpus_per_task needs gpu: which of gpu_types?")
        if self.gpus % self.nodes or self.processes_per_task % self.nodes:
            raise ValueError(
                f"GPUs and processes must spread evenly over nodes, got {self.gpus} GPUs and"
                f" {self.processes_per_task} processes on {self.nodes} nodes"
            )

    def _check_stage(self, stage: str) -> None:
        try:
            self.for_stage(stage)
        except ValueError as error:
            raise ValueError(f"stages.{stage}: {error}") from None

    @property
    def gpus(self) -> int:
        """GPUs of one task, over all its nodes."""
        if self.gpus_per_task is not None:
            return self.gpus_per_task
        return self.gpu_types[self.gpu].count * self.nodes if self.gpu is not None else 0

    @property
    def gpu_type(self) -> GpuType | None:
        """The kind of GPU a task gets, None without one."""
        return self.gpu_types[self.gpu] if self.gpu is not None and self.gpus else None

    @property
    def processes_per_task(self) -> int:
        return self.processes or max(1, self.gpus)

    @property
    def job_partition(self) -> str | None:
        """The partition after a look at the GPU; None is the cluster's default."""
        return (self.gpu_type and self.gpu_type.partition) or self.partition

    @property
    def price(self) -> float | None:
        """Price of a GPU-hour, where the site knows one."""
        own = self.gpu_type.price_per_gpu_hour if self.gpu_type else None
        return own if own is not None else self.price_per_gpu_hour

    @property
    def gpu_hours(self) -> float:
        """What one leg of one task asks for."""
        return self.gpus * seconds_of(self.time) / 3600

    def for_stage(self, stage: str) -> SlurmSite:
        """This site as the job of one stage sees it."""
        job = self.stages.get(stage)
        changes: dict[str, Any] = {"stages": {}}
        if job is not None:
            chosen = {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}
            changes |= {key: value for key, value in chosen.items() if value is not None}
            if "gpu" in changes or "nodes" in changes:
                changes.setdefault("gpus_per_task", None)
            if "gpus_per_task" in changes or "gpu" in changes:
                changes.setdefault("processes", None)
        return dataclasses.replace(self, **changes)

    def without_gpu(self) -> SlurmSite:
        """This site for a small job of one process."""
        return dataclasses.replace(
            self, gpu=None, gpus_per_task=None, processes=None, nodes=1, exclusive=False, stages={}
        )

    def flag_values(self) -> dict[str, str | bool]:
        """The extra flags by name; True where there is no value. Raises `ValueError`."""
        values: dict[str, str | bool] = {}
        for flag in self.flags:
            found = _FLAG.fullmatch(flag)
            if found is None:
                raise ValueError(f"flags: expected --name or --name=value, got {flag!r}")
            if found[1] in _OWN_FLAGS:
                instead = _OWN_FLAGS[found[1]]
                advice = f"use {instead}" if instead else "baton sets it itself"
                raise ValueError(f"flags: --{found[1]} is not yours to give here; {advice}")
            if found[1] in values:
                raise ValueError(f"flags: --{found[1]} stands there twice")
            values[found[1]] = True if found[2] is None else found[2]
        return values


def seconds_of(time: str) -> int:
    """Seconds of a time limit such as `24:00:00` or `2-12:00:00`. Raises `ValueError`."""
    found = _TIME.fullmatch(time)
    if found is None or int(found[3]) > 59 or int(found[4]) > 59:
        raise ValueError(f"time must look like 24:00:00 or 2-12:00:00 (days first), got {time!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 60:
        raise ValueError(f"time must be at least a minute (0:01:00), got {time!r}")
    return total
