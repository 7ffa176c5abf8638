"""What an engine offers, compared with what a site asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

from baton.config.docker_site import DockerSite
from baton.errors import BatonError, ConfigError
from baton.launchers.docker_engine import Engine, env_file
from baton.launchers.docker_leg import access_words
from baton.store.open import is_remote

Check: TypeAlias = tuple[Literal["ok", "note", "mend", "wrong"], str, str]


# What a container is asked about a store behind a network: opening it looks into it.
_LOOK = """\
import sys
from baton.errors import BatonError
from baton.store.open import open_remote
try:
    open_remote(sys.argv[1])
except BatonError as error:
    sys.exit(str(error))
"""


def engine_checks(site: DockerSite, store: str) -> Iterator[Check]:
    """Everything an engine can be asked about a site and its store, one line each.

    Starts containers of no duration, to see the GPUs and a store behind a network; an image that
    is missing is not pulled.
    """
    about = "env_file"
    try:
        if site.env_file is not None:
            yield "ok", about, f"{env_file(site.env_file)}, for your eyes only"
        about = "engine"
        engine = Engine(site.host)
        info = engine.info()
        version, cores = info["ServerVersion"], info["NCPU"]
        memory = info["MemTotal"] / 2**30
        yield "ok", about, f"Docker {version} at {engine.endpoint}, {cores} cores, {memory:.0f} GiB"
        if engine.is_elsewhere and site.volume is None and not is_remote(store):
            advice = "it cannot see this machine's folders: add `volume: baton-runs`"
            yield "wrong", "volume", f"the engine is on another machine; {advice}"
        about = "image"
        image = engine.image_if_there(site.image)
        if image is None:
            yield "note", about, f"{site.image} is not there yet; the first submit pulls it"
            return
        yield "ok", about, image.digest
        if is_remote(store):
            about = "store"
            words = [*access_words(site), "--entrypoint", "python", image.id, "-c", _LOOK, store]
            engine.once(words)
            yield "ok", about, f"a container reaches {store}"
        about = "gpus"
        if site.gpus == "none":
            yield "ok", about, "none: tasks run on the CPU"
            return
        seen = engine.gpus(image)
        wanted = max(site.gpus, default=0) + 1 if isinstance(site.gpus, list) else site.processes
        verdict: Literal["ok", "wrong"] = "ok" if seen >= wanted else "wrong"
        yield verdict, about, f"the engine has {seen}, the site asks for number {wanted - 1}"
    except BatonError as error:
        yield ("wrong" if isinstance(error, ConfigError) else "mend"), about, str(error)
