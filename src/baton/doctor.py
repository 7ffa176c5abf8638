"""What stands between a site file and a task that runs there, and what to do about it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.config.docker_site import DockerSite
from baton.config.home import home
from baton.config.site import LocalSite, Site
from baton.errors import BatonError, ExitStatus
from baton.place import Place
from baton.store.local import LocalStore

# How each verdict is printed, and what it makes of the whole.
_STATUS = {
    "ok": ExitStatus.FINISHED,
    "note": ExitStatus.FINISHED,
    "mend": ExitStatus.FAILED,  # something outside of the site file
    "wrong": ExitStatus.STOP,  # the site file itself
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    verdict: Literal["ok", "note", "mend", "wrong"]
    about: str
    said: str

    @property
    def text(self) -> str:
        return f"{self.verdict:<5} {self.about}: {self.said}"


def exit_status(findings: Iterable[Finding]) -> ExitStatus:
    """The gravest verdict: 78 the site file is wrong, 1 something else is, 0 all is well."""
    found = {_STATUS[finding.verdict] for finding in findings}
    order = (ExitStatus.STOP, ExitStatus.FAILED)
    return next((status for status in order if status in found), ExitStatus.FINISHED)


def examine(site: Site, place: Place) -> Iterator[Finding]:
    """Check everything about a site that can be checked from here; changes nothing."""
    yield store_is_writable(place)
    if isinstance(site, LocalSite):
        return
    if isinstance(site, DockerSite):
        from baton.launchers.docker_checks import engine_checks

        for name in site.env:
            if name not in os.environ:
                yield Finding("note", "env", f"{name} is not set here; tasks would not have it")
        for verdict, about, said in engine_checks(site, place.url):
            yield Finding(verdict, about, said)
        return
    from baton.launchers.slurm_checks import cluster_checks

    yield leg_script()
    yield from runtime(site.runtime, site.image, python=_python(site), env=site.env)
    for name in site.env:
        if name not in os.environ:
            yield Finding("note", "env", f"{name} is not set here; jobs would not have it")
    if site.env_file:
        yield env_file(Path(site.env_file).expanduser())
    for verdict, about, said in cluster_checks(site):
        yield Finding(verdict, about, said)


def store_is_writable(place: Place) -> Finding:
    """Can this process write there? Whether the nodes see it, only they know."""
    name = f"doctor-{os.getpid()}"
    try:
        for store in (LocalStore(place.root), *([place.remote] if place.remote else [])):
            store.write(name, b"")
            store.delete(name)
        (place.root / ".incoming").rmdir()
    except BatonError as error:
        return Finding("mend", "store", str(error))
    except OSError:
        pass  # somebody else is writing there at this moment
    copied = f", by way of {place.root}" if place.remote else ""
    return Finding("ok", "store", f"{place.url} can be written from here{copied}")


def leg_script() -> Finding:
    path = home().absolute() / "slurm" / "leg.sh"
    if path.is_file():
        return Finding("ok", "leg.sh", str(path))
    return Finding("mend", "leg.sh", f"{path} is missing; every node must see the project's folder")


def env_file(path: Path) -> Finding:
    if not path.is_file():
        return Finding("wrong", "env_file", f"there is no file {path}")
    if path.stat().st_mode & 0o077:
        return Finding("mend", "env_file", f"others can read {path}: chmod 600 {path}")
    return Finding("ok", "env_file", f"{path}, for your eyes only")


def runtime(kind: str, image: str | None, *, python: str, env: Iterable[str]) -> Iterator[Finding]:
    """Is there what starts a leg? On this machine; nodes may have it where this one does not."""
    if kind == "none":
        yield python_has_baton(python, env)
        return
    if kind == "pyxis":
        said = subprocess.run(["srun", "--help"], capture_output=True, text=True, check=False)
        if "--container-image" in said.stdout:
            yield Finding("ok", "runtime", "srun takes --container-image")
        else:
            advice = "srun takes no --container-image; ask for the pyxis plugin, or use apptainer"
            yield Finding("wrong", "runtime", advice)
    elif shutil.which(kind):
        yield Finding("ok", "runtime", f"{shutil.which(kind)}")
    else:
        advice = f"no {kind} on this machine; if the nodes have none either, choose another runtime"
        yield Finding("note", "runtime", f"{advice}, or load it under `setup`")
    is_file = image is not None and image.startswith(("/", "./"))
    if is_file and not Path(str(image)).exists():
        yield Finding("wrong", "image", f"there is no file {image}")


def python_has_baton(python: str, env: Iterable[str]) -> Finding:
    """Does a leg's interpreter find baton, without what only this shell has set?"""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", *env) if name in os.environ}
    words = [python, "-c", "import baton; print(baton.__version__, baton.__file__)"]
    try:
        ended = subprocess.run(
            words, capture_output=True, text=True, check=False, env=kept, cwd="/"
        )
    except OSError as error:
        return Finding("wrong", "python", f"{python} does not start: {error.strerror}; mend `venv`")
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:]
        advice = "install baton there, or name another `venv`"
        return Finding("wrong", "python", f"{python}: {''.join(last)}; {advice}")
    return Finding("ok", "python", f"{python} has baton {ended.stdout.strip()}")


def _python(site: Site) -> str:
    from baton.config.slurm_site import SlurmSite
    from baton.launchers.batch import python_of

    assert isinstance(site, SlurmSite)
    return python_of(site)
