"""Site files: where to run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from baton.config.decode import at_least, decode
from baton.config.docker_site import DockerSite
from baton.config.experiment import available, nearest
from baton.config.home import launch_folder
from baton.config.slurm_site import SlurmSite
from baton.config.yaml import load_yaml
from baton.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LocalSite:
    """This machine, processes started by baton itself.

    Attributes:
        store: folder (or URL) that holds plans, checkpoints and results.
        max_parallel: tasks at once; `auto` is one per `processes` GPUs, or one per
            `threads` cores without a GPU.
        processes: training processes of one task, one device each.
        threads: CPU threads of one process; part of the result on a CPU, so fixed.
        grace_seconds: between the signal to stop and the end.
        retries: legs that may fail in a row before a task is given up.
    """

    launcher: Literal["local"]
    store: str = "runs"
    max_parallel: Annotated[int, at_least(1)] | Literal["auto"] = "auto"
    processes: Annotated[int, at_least(1)] = 1
    threads: Annotated[int, at_least(1)] = 1
    grace_seconds: Annotated[float, at_least(1)] = 30.0
    retries: Annotated[int, at_least(0)] = 2
    env: dict[str, str] = field(default_factory=dict)


Site = LocalSite | DockerSite | SlurmSite


def load_site(name: str) -> Site:
    """The site called `name` in the folder `launch`. Raises `ConfigError`."""
    folder = launch_folder()
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise ConfigError(f"no site {name!r} in {folder}; {nearest(name, available(folder))}")
    document = load_yaml(path)
    kind: Any = Site
    site: Site = decode(kind, document.data, document=document)
    return site
