"""One launcher watches a task: a lock that its death lets go."""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path

from baton.launchers.base import Request, View
from baton.runner import task_store

# In a task's folder.
_LOCK = ".launcher.lock"


def lock_file(request: Request, task: str) -> Path:
    """Where the lock of a task is."""
    return task_store(request.store_root, request.plan, task).root / _LOCK


def hold(request: Request, task: str, held: contextlib.ExitStack, view: View) -> bool:
    """Become the one launcher that watches a task; False where there is another."""
    path = lock_file(request, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context(open(path, "a"))  # noqa: SIM115  (closed with the others)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        view.event(task, "another launcher watches it already; left alone")
        return False
    return True


def is_held(path: Path) -> bool:
    """Does a launcher watch the task?"""
    if not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
