"""Where containers find a store: in a folder, in a volume of an engine elsewhere, over the net."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from baton.config.docker_site import DockerSite
from baton.config.home import find_file
from baton.errors import ConfigError, NameMissing, SchedulerError, StoreBusy
from baton.frozen import FILE
from baton.launchers.base import LOG, Request
from baton.launchers.docker_engine import Engine
from baton.place import Place as RemotePlace
from baton.runner import task_prefix
from baton.store.base import Remote as RemoteStore
from baton.store.local import LocalStore
from baton.store.open import is_remote

RUNS = "/runs"
# Where the image keeps jobs/ and launch/; a relative path of an experiment is found below.
HOME = "/opt/baton"
_INPUTS = f"{RUNS}/.inputs"


class Place(Protocol):
    """Brings plans to where containers read them, and records to where `baton` does."""

    def words(self, request: Request) -> list[str]:
        """Options of `docker run` that let a container see the store and its input files."""
        ...

    def names(self, request: Request) -> tuple[str, str]:
        """What containers call the plan and the store."""
        ...

    def send(self, request: Request) -> None:
        """Make plan and input files ready for containers."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a small object of the store, here and for containers."""
        ...

    def drop(self, name: str) -> None:
        """Delete an object of the store, here and for containers."""
        ...

    def fetch(self, request: Request, tasks: Sequence[str], *, whole: bool = True) -> None:
        """Bring here what tasks have written; unless `whole`, only how far they are."""
        ...


@dataclass(frozen=True)
class Folder:
    """A store in a folder of this machine: containers and `baton` work on the same files."""

    root: Path

    def words(self, request: Request) -> list[str]:
        return [*_bind(self.root, RUNS), *_bound_inputs(request)]

    def names(self, request: Request) -> tuple[str, str]:
        return f"{RUNS}/{_plan_name(request)}", RUNS

    def send(self, request: Request) -> None:
        """Everything is there; only the folder must exist, or the engine would not mount it."""
        self.root.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, data: bytes) -> None:
        LocalStore(self.root).write(name, data)

    def drop(self, name: str) -> None:
        LocalStore(self.root).delete(name)

    def fetch(self, request: Request, tasks: Sequence[str], *, whole: bool = True) -> None:
        """There is only one place."""


@dataclass(frozen=True)
class Volume:
    """A store in a volume, reached through short-lived containers of the image.

    Everything but checkpoints is copied to `root`, so that status, logs and collect work here.
    """

    root: Path
    volume: str
    engine: Engine
    image: str

    def words(self, request: Request) -> list[str]:
        # An experiment's relative paths are looked for in the working directory first.
        return [*self._mount(), "--workdir", _INPUTS]

    def names(self, request: Request) -> tuple[str, str]:
        return f"{RUNS}/{_plan_name(request)}", RUNS

    def send(self, request: Request) -> None:
        files = {_plan_name(request): request.plan_path}
        for name, found in _inputs(request).items():
            if name.startswith("/"):
                raise ConfigError(
                    f"data.path: {name} is a file of this machine, the engine is at"
                    f" {self.engine.endpoint}; name it by a path relative to the project's folder"
                    " and it is copied there"
                )
            files[f".inputs/{name}"] = found
        self._unpack({name: path.read_bytes() for name, path in files.items()})

    def put(self, name: str, data: bytes) -> None:
        LocalStore(self.root).write(name, data)
        self._unpack({name: data})

    def drop(self, name: str) -> None:
        LocalStore(self.root).delete(name)
        self._run("rm", "-f", f"{RUNS}/{name}")

    def fetch(self, request: Request, tasks: Sequence[str], *, whole: bool = True) -> None:
        prefixes = [task_prefix(request.plan, task) for task in tasks]
        what = (
            "-type d ( -name checkpoints -o -name .incoming ) -prune -o -type f"
            f" ! -name {LOG} ! -name .* -print0"
            if whole
            else "-maxdepth 2 ( -name progress.json -o -path */legs/*.json -o -name done.json )"
            " -print0"
        )
        # tar ends in 1 when a file changed or went away under its hands, which is their right.
        script = (
            'cd "$1"; what=$2; shift 2; set -f; for folder; do [ ! -d "$folder" ] ||'
            ' find "$folder" $what; done | { tar --null -T - -cf - || [ $? = 1 ]; }'
        )
        archive = self._run("sh", "-c", script, "fetch", RUNS, what, *prefixes)
        store = LocalStore(self.root)
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            for member in packed:
                content = packed.extractfile(member)
                if content is not None:
                    _write_if_new(store, member.name, content.read())

    def _mount(self) -> list[str]:
        return ["--mount", f"type=volume,source={self.volume},target={RUNS}"]

    def _run(self, program: str, *words: str, given: bytes | None = None) -> bytes:
        options = [*self._mount(), "--network", "none", "--entrypoint", program]
        return self.engine.once([*options, self.image, *words], given=given)

    def _unpack(self, files: Mapping[str, bytes]) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        script = f"mkdir -p {_INPUTS} && tar -C {RUNS} --no-same-owner -xf -"
        self._run("sh", "-c", script, given=packed.getvalue())


@dataclass(frozen=True)
class Remote:
    """A store behind a network, which containers and `baton` reach each by themselves.

    A container's own copy of it lies in the site's cache and outlives it. The records are
    brought to this machine's copy, and the log, which only the launcher sees, to the store.
    `inputs` is there where input files have to be copied to the engine's machine.
    """

    store: RemotePlace
    inputs: Volume | None

    def words(self, request: Request) -> list[str]:
        return self.inputs.words(request) if self.inputs else _bound_inputs(request)

    def names(self, request: Request) -> tuple[str, str]:
        return _plan_name(request), request.store_url

    def send(self, request: Request) -> None:
        """The plan is in the store already; it was frozen there."""
        if self.inputs is not None:
            self.inputs.send(request)

    def put(self, name: str, data: bytes) -> None:
        LocalStore(self.store.root).write(name, data)
        self._remote.write(name, data)

    def drop(self, name: str) -> None:
        LocalStore(self.store.root).delete(name)
        self._remote.delete(name)

    def fetch(self, request: Request, tasks: Sequence[str], *, whole: bool = True) -> None:
        """Raises `SchedulerError` while the store is in trouble: containers go on without us."""
        try:
            self.store.refresh(request.plan, tasks)
            for task in tasks if whole else ():
                name = f"{task_prefix(request.plan, task)}/{LOG}"
                log = self.store.root / name
                if log.exists():
                    self._remote.write(name, log.read_bytes())
        except StoreBusy as error:
            raise SchedulerError(str(error)) from error

    @property
    def _remote(self) -> RemoteStore:
        assert self.store.remote is not None
        return self.store.remote


def place_of(site: DockerSite, request: Request, engine: Engine, image: str) -> Place:
    """Where the containers of a site keep a request's store.

    Raises:
        ConfigError: the engine is on another machine and the site names no volume.
        StoreRefused: the store behind a network does not let us in.
    """
    root = request.store_root
    if is_remote(request.store_url):
        needs_copies = engine.is_elsewhere and bool(_inputs(request))
        if needs_copies and site.volume is None:
            raise ConfigError(
                f"the engine at {engine.endpoint} cannot see the input files of this machine"
                f" ({', '.join(_inputs(request))}): add `volume: baton-runs` to the site, and they"
                " are copied there"
            )
        volume = Volume(root, str(site.volume), engine, image) if needs_copies else None
        return Remote(RemotePlace.open(request.store_url), volume)
    if site.volume is not None:
        return Volume(root, site.volume, engine, image)
    if engine.is_elsewhere:
        raise ConfigError(
            f"store {root} is a folder of this machine, which the engine at {engine.endpoint}"
            " cannot see: add `volume: baton-runs` to the site"
        )
    return Folder(root)


def _inputs(request: Request) -> dict[str, Path]:
    """The input files of a plan that are not in the image, by the names that it has for them."""
    found = {name: find_file(name).absolute() for name in request.plan.fingerprints}
    return {name: path for name, path in found.items() if path.is_file()}


def _bound_inputs(request: Request) -> list[str]:
    """Options that show containers the input files under the names that the plan has for them."""
    words = []
    for name, found in _inputs(request).items():
        words += _bind(found, name if name.startswith("/") else f"{HOME}/{name}", "readonly")
    return words


def _plan_name(request: Request) -> str:
    return f"{request.plan.experiment}/{request.plan.digest}/{FILE}"


def _bind(source: Path, target: str, *more: str) -> list[str]:
    if "," in str(source):
        raise ConfigError(f"{source}: Docker does not mount a path with a comma in it")
    return ["--mount", ",".join([f"type=bind,source={source},target={target}", *more])]


def _write_if_new(store: LocalStore, name: str, data: bytes) -> None:
    with contextlib.suppress(NameMissing):
        if store.read(name) == data:
            return
    store.write(name, data)
