"""A Docker engine as a site: the image, what a task's container gets, and where its bytes live."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from baton.config.decode import Positive, at_least

_MOUNT = re.compile(r"(?:/[^\s:,]*|[A-Za-z0-9][\w.-]*):/[^\s:,]*(?::r[ow])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VOLUME = re.compile(r"[A-Za-z0-9][\w.-]+")
_HOST = re.compile(r"(?:ssh|tcp|unix)://\S+")
_USER = re.compile(r"[0-9]+(?::[0-9]+)?")
_FLAG = re.compile(r"--[a-z][a-z0-9-]*(?:=.*)?")
# Flags that would break what baton promises, and the key that says the same safely.
_OWN_FLAGS = {
    **dict.fromkeys(("name", "detach", "rm", "restart", "entrypoint", "init", "label", "tty"), ""),
    **dict.fromkeys(("interactive", "log-driver", "log-opt", "workdir", "cidfile", "pull"), ""),
    **dict.fromkeys(("env", "env-file"), "env or env_file"),
    **dict.fromkeys(("volume", "mount"), "mounts"),
    **dict.fromkeys(("stop-timeout", "stop-signal"), "grace_seconds"),
    "gpus": "gpus",
    "user": "user",
    "network": "network",
    "memory": "memory_gb",
}


@dataclass(frozen=True, kw_only=True)
class DockerSite:
    """A Docker engine; every leg of a task is a container of its own.

    Attributes:
        store: a folder of this machine. Containers get it as `/runs`, unless there is a volume.
        image: by name; all legs of a submission use the image that has the name at its start.
        host: the engine, such as `ssh://root@203.0.113.7`; default: what `docker` itself uses.
        volume: a volume of the engine that holds the store, for an engine on another machine,
            which cannot see this one's folders. All but checkpoints is copied to `store`.
        cache: a volume of the engine (or a folder of its machine, `/…`) for models and data of the
            hubs, kept between legs.
        gpus: numbers of GPUs; `auto` is all that the engine has; `none` runs on the CPU.
        processes: training processes of one task, one device each.
        threads: CPU threads of one process; part of the result on a CPU, so fixed.
        max_parallel: tasks at once; `auto` is one per `processes` GPUs, and one without GPUs.
        grace_seconds: between the signal to stop and the end.
        retries: legs that may fail in a row before a task is given up.
        env: names of variables that containers get from the environment of `baton submit`.
        env_file: a file of `NAME=value` lines that only you can read.
        mounts: `/folder:/in/the/container[:ro]` of the engine's machine, or `volume:/…`.
        user: `auto` is whoever submits, or the image's own user with a volume; else `1000:1000`.
        network: Docker's `--network`; default: the engine's own.
        flags: more options of `docker run`, such as `--cpus=8`.
    """

    launcher: Literal["docker"]
    store: str = "runs"
    image: str = "baton"
    host: str | None = None
    volume: str | None = None
    cache: str = "baton-cache"
    gpus: list[Annotated[int, at_least(0)]] | Literal["auto", "none"] = "auto"
    processes: Annotated[int, at_least(1)] = 1
    threads: Annotated[int, at_least(1)] = 1
    max_parallel: Annotated[int, at_least(1)] | Literal["auto"] = "auto"
    memory_gb: Annotated[float | None, Positive] = None
    grace_seconds: Annotated[float, at_least(1)] = 60.0
    retries: Annotated[int, at_least(0)] = 2
    env: list[str] = field(default_factory=list)
    env_file: str | None = None
    mounts: list[str] = field(default_factory=list)
    user: str = "auto"
    network: str | None = None
    flags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.host is not None and not _HOST.fullmatch(self.host):
            raise ValueError(
                f"host must be ssh://USER@MACHINE, tcp://… or unix://…, got {self.host!r}"
            )
        if self.volume is not None and not _VOLUME.fullmatch(self.volume):
            raise ValueError(
                f"volume must be the name of a Docker volume, such as baton-runs; got"
                f" {self.volume!r}; a folder belongs into store"
            )
        if not self.cache.startswith("/") and not _VOLUME.fullmatch(self.cache):
            raise ValueError(
                f"cache must be a volume's name or an absolute path, got {self.cache!r}"
            )
        if self.user != "auto" and not _USER.fullmatch(self.user):
            raise ValueError(f"user must be auto or numbers such as 1000:1000, got {self.user!r}")
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                shown = name.partition("=")[0]
                raise ValueError(
                    f"env: names of variables only, got {shown + '=…' if '=' in name else name!r};"
                    " a value stays in the environment you submit from, or in env_file"
                )
        for mount in self.mounts:
            if not _MOUNT.fullmatch(mount):
                raise ValueError(
                    f"mounts: expected /folder:/container or /folder:/container:ro, got {mount!r}"
                )
        for flag in self.flags:
            if not _FLAG.fullmatch(flag):
                raise ValueError(f"flags: expected --name or --name=value, got {flag!r}")
            name = flag.removeprefix("--").partition("=")[0]
            if name in _OWN_FLAGS:
                instead = _OWN_FLAGS[name]
                advice = f"use {instead}" if instead else "baton sets it itself"
                raise ValueError(f"flags: --{name} is not yours to give here; {advice}")
        if isinstance(self.gpus, list) and len(self.gpus) < self.processes:
            raise ValueError(
                f"a task of {self.processes} processes needs as many GPUs, got gpus {self.gpus}"
            )
