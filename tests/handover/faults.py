"""What goes wrong inside a leg: hooks that `Zygote.start(hook=…)` runs in it before the command.

Nothing of baton is patched: file operations are seen by an audit hook, `os.fsync` (which has no
audit event) and safetensors' writer by wrappers around somebody else's functions.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

# Written by the clock or by a thread, so their number differs from run to run.
_TIMED = ("/progress.json", "/.progress.json", "/tensorboard")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def strike(
    trace: str, below: str, at: int = 0, number: int = signal.SIGKILL, every: bool = False
) -> None:
    """Send this process a signal right before its `at`-th file operation below a folder.

    Each operation is a line in the file `trace` first; with `at` 0 that is all that happens.
    `every`: strike at each operation from there on. A file that safetensors writes is two
    operations: before it, and with half of it written.
    """
    _Striker(Path(trace), Path(below), at, number, every).install()


class _Striker:
    def __init__(self, trace: Path, below: Path, at: int, number: int, every: bool) -> None:
        self.below = f"{below}/"
        self.at, self.number, self.every = at, number, every
        self.count = 0
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def install(self) -> None:
        import safetensors.torch

        sys.addaudithook(self._audit)
        fsync, serialize = os.fsync, safetensors.torch.serialize_file

        def counted_fsync(descriptor: int) -> None:
            self._operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def counted_serialize(tensors: Any, filename: Any, *rest: Any, **named: Any) -> None:
            self._operation("serialize", os.fspath(filename))
            serialize(tensors, filename, *rest, **named)
            # Only a killed process leaves half a file; one that goes on has written it all.
            if self.count + 1 == self.at and self.number == signal.SIGKILL:
                os.truncate(filename, os.path.getsize(filename) // 2)
            self._operation("half", os.fspath(filename))

        os.fsync = counted_fsync
        safetensors.torch.serialize_file = counted_serialize

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & _WRITING:
                self._operation("open", os.fsdecode(path))
        elif event in ("os.rename", "os.link"):
            self._operation(event[3:], os.fspath(arguments[1]))
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            path, folder = os.fspath(arguments[0]), arguments[-1]
            if isinstance(folder, int) and folder >= 0:
                path = f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
            self._operation(event[3:], path)

    def _operation(self, name: str, path: str) -> None:
        if not path.startswith(self.below) or any(part in path for part in _TIMED):
            return
        self.count += 1
        os.write(self.trace, f"{name} {path.removeprefix(self.below)}\n".encode())
        if self.at and (self.count == self.at or (self.every and self.count > self.at)):
            os.kill(os.getpid(), self.number)


def limit_file_size(bytes_: int) -> None:
    """A quota: no file of this process may grow over a size (Python ignores SIGXFSZ)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


def use_threads(count: int) -> None:
    """Compute with another number of threads than the legs before."""
    import torch

    torch.set_num_threads(count)
