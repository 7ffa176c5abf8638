"""A Docker engine, spoken to with the `docker` command: it knows contexts, keys and ssh hosts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import BatonError, ConfigError, NameTaken, SchedulerError

# The answer of an engine behind ssh takes a second or two; longer than this is an outage.
_PATIENCE_SECONDS = 60
# A first pull of a GPU image is several gigabytes.
_PULL_SECONDS = 4 * 3600
_LOCAL = ("unix://", "npipe://")

# (what docker says, what to do; these do not mend themselves)
_WRONG = (
    (
        r"could not select device driver|nvidia-container-cli|unresolvable CDI"
        r"|failed to discover GPU",
        "the engine cannot give out GPUs: install the NVIDIA Container Toolkit there, or run on the"
        " CPU with `gpus: none`",
    ),
    (
        r"pull access denied|manifest unknown|manifest for .* not found|repository does not exist"
        r"|No such image|name unknown|failed to resolve reference",
        "there is no such image: build it (`make image`, `make image-cpu`), mend `image`, or"
        " `docker login`",
    ),
    (
        r"bind source path does not exist",
        "a folder of `mounts` is not on the engine's machine",
    ),
    (
        r"permission denied.*docker.*sock|docker.*sock.*permission denied",
        "you may not use this engine: join the group `docker`, or use a rootless one",
    ),
    (
        r"unknown flag|invalid argument|flag needs an argument",
        "this docker does not take a flag: mend `flags`",
    ),
    (r"invalid reference format", "mend `image`: that is no image's name"),
    (r"network .* not found", "the engine has no such network: set `network: host`"),
    (
        r"Host key verification failed|Permission denied \(",
        "ssh does not let you in: try `ssh` with the same user and machine first",
    ),
    (r"unable to find user", "mend `user`: numbers such as 1000:1000"),
)
# (these may mend themselves)
_AWAY = (
    r"Cannot connect to the Docker daemon|Is the docker daemon running|error during connect"
    r"|server is misbehaving|no route to host|i/o timeout|broken pipe|unexpected EOF"
)


@dataclass(frozen=True, kw_only=True)
class Container:
    """What the engine knows about one container; `exit_status` counts once it runs no more."""

    id: str
    name: str
    was_started: bool
    is_running: bool
    exit_status: int
    out_of_memory: bool
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Image:
    """An image as it is now: its id, and the name by which others can get the same bytes."""

    id: str
    digest: str


@dataclass
class Engine:
    """Runs `docker …`. Every method raises `ConfigError` where asking again cannot help, and
    `SchedulerError` where the engine does not answer."""

    host: str | None = None
    _endpoint: str = field(default="", init=False)

    @property
    def endpoint(self) -> str:
        """Where the engine is: `unix:///var/run/docker.sock`, `ssh://root@203.0.113.7`."""
        if not self._endpoint:
            named = self.host or os.environ.get("DOCKER_HOST")
            self._endpoint = (
                named
                or self._run("context", "inspect", "--format", "{{.Endpoints.docker.Host}}").strip()
            )
        return self._endpoint

    @property
    def is_elsewhere(self) -> bool:
        """Is it on another machine, where this one's folders are not?"""
        return not self.endpoint.startswith(_LOCAL)

    def info(self) -> dict[str, Any]:
        """The engine's identity (`ID`), `SecurityOptions` and so on."""
        found: dict[str, Any] = json.loads(self._run("info", "--format", "{{json .}}"))
        if found.get("ServerErrors"):
            raise _refusal("info", "; ".join(found["ServerErrors"]))
        return found

    def image(self, name: str) -> Image:
        """The image of this name, pulled if it is not there."""
        found = self.image_if_there(name)
        if found is None:
            self._run("pull", "--quiet", name, seconds=_PULL_SECONDS)
            found = self.image_if_there(name)
        if found is None:
            raise ConfigError(f"docker pull: {name} was pulled and is not there")
        return found

    def image_if_there(self, name: str) -> Image | None:
        """The image of this name, None if the engine has not got it."""
        try:
            [found] = json.loads(self._run("image", "inspect", name))
        except ConfigError as error:
            if not re.search("No such image", str(error)):
                raise
            return None
        digests: list[str] = found.get("RepoDigests") or []
        # An image that was built here and never pushed has no digest but its own.
        return Image(found["Id"], digests[0] if digests else f"{name}@{found['Id']}")

    def gpus(self, image: Image) -> int:
        """How many GPUs the engine gives out. Raises `ConfigError` if it gives none."""
        words = ["--gpus", "all", "--network", "none", "--entrypoint", "nvidia-smi"]
        return self.once([*words, image.id, "-L"]).count(b"GPU ")

    def start(self, name: str, words: Sequence[str]) -> str:
        """`docker run --detach --name NAME …`; returns the container's id.

        Raises:
            NameTaken: there is a container of this name.
        """
        try:
            return self._run("run", "--detach", "--name", name, *words).strip()
        except ConfigError as error:
            if re.search("is already in use by container", str(error)):
                raise NameTaken(str(error)) from None
            # The engine keeps what it could create but not start.
            self.remove(name)
            raise

    def find(self, label: str) -> list[Container]:
        """Every container with this label, running or not."""
        words = ("ps", "--all", "--no-trunc", "--quiet", "--filter", f"label={label}")
        return self._inspect(self._run(*words).split())

    def look(self, id: str) -> Container | None:
        """One container; None if there is none any more."""
        found = self._inspect([id])
        return found[0] if found else None

    def signal(self, id: str, name: str) -> None:
        """Send a signal to a container's init, which passes it on; too late is no error."""
        try:
            self._run("kill", "--signal", name, id)
        except ConfigError as error:
            if not re.search(r"is not running|No such container", str(error)):
                raise

    def remove(self, id: str) -> None:
        """Forget a container that has ended. One that is gone already is no error."""
        try:
            self._run("rm", "--volumes", id)
        except ConfigError as error:
            if not re.search(r"No such container|already in progress", str(error)):
                raise

    def follow(self, id: str) -> subprocess.Popen[bytes]:
        """Everything a container prints, from its beginning, on a pipe; ends with the container."""
        return subprocess.Popen(
            ["docker", "logs", "--follow", id],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            # Ctrl-C is for the launcher, which still wants to see how the container ends.
            start_new_session=True,
        )

    def once(self, words: Sequence[str], *, given: bytes | None = None) -> bytes:
        """The output of a short-lived container: `docker run --rm …`, with `given` as its input."""
        command = ["run", "--rm", *(["--interactive"] if given is not None else []), *words]
        return self._bytes(command, given=given)

    def _inspect(self, ids: Sequence[str]) -> list[Container]:
        if not ids:
            return []
        try:
            text = self._run("container", "inspect", *ids)
        except ConfigError as error:
            if not re.search("No such container", str(error)):
                raise
            # One was removed in between: those that are left, one by one.
            return [c for id in ids for c in self._inspect([id])] if len(ids) > 1 else []
        return [_container(found) for found in json.loads(text)]

    def _run(
        self,
        *words: str,
        seconds: float = _PATIENCE_SECONDS,
    ) -> str:
        return self._bytes(words, seconds=seconds).decode()

    def _bytes(
        self,
        words: Sequence[str],
        *,
        seconds: float = _PATIENCE_SECONDS,
        given: bytes | None = None,
    ) -> bytes:
        require()
        try:
            ended = subprocess.run(
                ["docker", *words],
                input=given or b"",
                capture_output=True,
                timeout=seconds,
                check=False,
                env=self._environment(),
            )
        except subprocess.TimeoutExpired:
            raise SchedulerError(
                f"docker {words[0]}: {self._endpoint or 'the engine'} did not answer in"
                f" {seconds:.0f} s"
            ) from None
        if ended.returncode:
            raise _refusal(words[0], ended.stderr.decode(errors="replace"))
        return ended.stdout

    def _environment(self) -> dict[str, str]:
        return os.environ | ({"DOCKER_HOST": self.host} if self.host else {})


def require() -> None:
    """Raise `ConfigError` unless this machine has the `docker` command."""
    if shutil.which("docker") is None:
        raise ConfigError(
            "there is no docker command on this machine: install the Docker client, or choose"
            " another --site"
        )


def env_file(path: str) -> Path:
    """A file of secrets, if nobody else can read it. Raises `ConfigError`."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise ConfigError(f"env_file: there is no file {found}")
    if found.stat().st_mode & 0o077:
        raise ConfigError(f"env_file: others can read {found}: chmod 600 {found}")
    return found


def _container(found: dict[str, Any]) -> Container:
    state = found["State"]
    return Container(
        id=found["Id"],
        name=found["Name"].removeprefix("/"),
        was_started=state["Status"] != "created",
        is_running=state["Running"],
        exit_status=state["ExitCode"],
        out_of_memory=state["OOMKilled"],
        labels=found["Config"]["Labels"] or {},
    )


def _refusal(command: str, said: str) -> BatonError:
    """What docker printed when it refused, as an error with advice."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("See 'docker", "Run 'docker"))]
    short = "; ".join(dict.fromkeys(_bare(line) for line in lines)) or "failed without a word"
    for pattern, advice in _WRONG:
        if re.search(pattern, said, re.IGNORECASE):
            return ConfigError(f"docker {command}: {short}. That is: {advice}")
    if re.search(_AWAY, said, re.IGNORECASE):
        return SchedulerError(f"docker {command}: the engine does not answer: {short}")
    if command == "pull" and re.search(r"dial tcp|request canceled|TLS handshake", said):
        return SchedulerError(f"docker pull: the registry does not answer: {short}")
    return ConfigError(f"docker {command}: {short}")


def _bare(line: str) -> str:
    line = re.sub(r"^(docker|Error|ERROR): ", "", line)
    return re.sub(r"^Error response from daemon: ", "", line).rstrip(".")
