"""What torch compiled in one leg, kept with the task for legs on machines that have not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import sys
import threading
from dataclasses import dataclass, field

import torch

from baton.errors import BatonError, NameMissing
from baton.stage import Leg
from baton.store.task_names import COMPILED

log = logging.getLogger(__name__)

# Whoever writes to the store decides what code legs run that load from it, so a person says so.
SWITCH = "BATON_KEEP_COMPILED"
_DIGEST_BYTES = hashlib.sha256().digest_size


def is_kept() -> bool:
    """Did a person allow that compiled code goes to the task's store and comes from there?"""
    return os.environ.get(SWITCH, "") == "1"


def machine_of(device: torch.device) -> str:
    """A file name for all machines that can run each other's code: versions, GPU, processor."""
    name, capability = platform.machine(), ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    parts = [torch.__version__, torch.version.git_version, str(torch.version.cuda), name]
    parts += [capability, platform.machine(), _triton_version(), sys.version]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"torch-{torch.__version__}-{name}-{digest[:12]}")


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(kw_only=True)
class CompiledCode:
    """Torch's compile caches (its "mega cache") in one file of the task, a machine type each.

    The file is a SHA-256 (32 bytes) and the artifacts. The SHA-256 tells damage; it does not
    tell who wrote the file. Nothing here ever ends a leg: what cannot be read is compiled.
    """

    leg: Leg
    device: torch.device
    _known: set[tuple[str, str]] = field(default_factory=set)
    _compiled: int = 0
    _saved_at: int = 0
    _writer: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.name = f"{COMPILED}{machine_of(self.device)}.bin"
        self._compiled = self._saved_at = _graphs()

    def load(self) -> None:
        """Put what earlier legs compiled where torch looks for it; before anything compiles."""
        if not is_kept():
            return
        try:
            data = self.leg.store.read(self.name)
        except NameMissing:
            return
        except BatonError as error:
            log.warning("compiled code of earlier legs is not used, compiling anew: %s", error)
            return
        digest, artifacts = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(artifacts).digest() != digest:
            log.warning("%s is damaged: compiling anew", self.name)
            return
        try:
            info = torch.compiler.load_cache_artifacts(artifacts)
        except Exception as error:  # noqa: BLE001 - torch's own formats; compiling works without
            log.warning("%s cannot be loaded, compiling anew: %s", self.name, error)
            return
        if info is None:
            log.warning("%s is not understood by this torch: compiling anew", self.name)
            return
        self._known = _entries(info)
        self.leg.log("compiled_code_loaded", entries=len(self._known), bytes=len(artifacts))

    def step_done(self) -> None:
        """Keep what was compiled, once a step went by in which nothing was.

        Torch's lists are put together here, because they must not grow meanwhile (about a
        millisecond); hashing and writing is a thread's work.
        """
        before, self._compiled = self._compiled, _graphs()
        is_due = before == self._compiled != self._saved_at
        is_busy = self._writer is not None and self._writer.is_alive()
        if not is_due or is_busy or not is_kept() or not self.leg.is_first:
            return
        if self.leg.stop.is_set:
            return  # the grace belongs to the checkpoint
        self._saved_at = self._compiled
        kept = torch.compiler.save_cache_artifacts()
        if kept is None or _entries(kept[1]) <= self._known:
            return
        self._known = _entries(kept[1])
        self._writer = threading.Thread(
            target=self._write, args=(kept[0],), name="compiled", daemon=True
        )
        self._writer.start()

    def close(self) -> None:
        """Let a write end, unless the leg was told to stop: then it may be lost."""
        if self._writer is not None and not self.leg.stop.is_set:
            self._writer.join()

    def _write(self, artifacts: bytes) -> None:
        try:
            self.leg.store.write(self.name, hashlib.sha256(artifacts).digest() + artifacts)
        except BatonError as error:
            log.warning("compiled code is not kept, training goes on: %s", error)
            return
        self.leg.log("compiled_code_kept", entries=len(self._known), bytes=len(artifacts))


def _graphs() -> int:
    """How many graphs this process has compiled, or taken from a cache."""
    dynamo = sys.modules.get("torch._dynamo")  # seconds to import, for nothing if nothing compiles
    return int(dynamo.utils.counters["stats"]["unique_graphs"]) if dynamo else 0


def _entries(info: torch.compiler._cache.CacheInfo) -> set[tuple[str, str]]:
    return {(kind, key) for kind, keys in info.artifacts.items() for key in keys}
