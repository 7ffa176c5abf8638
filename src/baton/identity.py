"""Which process this is, as others can check it, and whether another one still lives."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

from baton.record import Runner


def this_runner() -> Runner:
    """Who this process is, as other processes can check it."""
    pid = os.getpid()
    return Runner(
        host=socket.gethostname(),
        pid=pid,
        started_ticks=started_ticks(pid) or 0,
        boot=_text_of(Path("/proc/sys/kernel/random/boot_id")) or socket.gethostname(),
        pid_namespace=os.readlink("/proc/self/ns/pid")
        if Path("/proc/self/ns/pid").exists()
        else "",
    )


def started_ticks(pid: int) -> int | None:
    """When a process started, to tell it from a later one with its number; None if it is gone."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return int(process.create_time() * 100)
    except psutil.NoSuchProcess:
        return None


def _text_of(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
