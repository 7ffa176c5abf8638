"""Where the project's own folders are, and how a path in an experiment is found."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from baton.errors import ConfigError


def home() -> Path:
    """The folder that holds `jobs/` and `launch/`.

    $BATON_HOME if set; else the working directory, else the source checkout.
    """
    if "BATON_HOME" in os.environ:
        named = Path(os.environ["BATON_HOME"])
        if not (named / "jobs").is_dir():
            raise ConfigError(f"BATON_HOME={named}: there is no jobs/ folder in it")
        return named
    candidates = [Path.cwd(), Path(__file__).parents[3]]
    for candidate in candidates:
        if (candidate / "jobs").is_dir():
            return candidate
    raise ConfigError(
        f"no jobs/ folder in {' or '.join(map(str, candidates))}; run baton from the project's"
        " folder or set BATON_HOME to it"
    )


def jobs_folder() -> Path:
    return home() / "jobs"


def launch_folder() -> Path:
    return home() / "launch"


def find_file(path: str) -> Path:
    """A file that an experiment names: from the working directory, else from `home()`."""
    found = Path(path)
    if found.is_absolute() or found.exists():
        return found
    from_home = home() / path
    return from_home if from_home.exists() else found


def scratch_folder(url: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where this machine keeps its copy of a remote store while it works.

    Below $BATON_SCRATCH if set, else below the user's cache folder. The same bucket behind
    another endpoint is another store.
    """
    default = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "stores"
    base = Path(environ.get("BATON_SCRATCH") or default)
    place, _, _ = url.partition("?")
    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HF_ENDPOINT")
    behind = next((environ[name] for name in endpoints if environ.get(name)), "")
    digest = hashlib.sha256(f"{place.rstrip('/')} {behind}".encode()).hexdigest()[:8]
    return base.absolute() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', place).strip('-')}-{digest}"
