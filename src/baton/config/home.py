"""Where the project's own folders are, and how a path in an experiment is found."""

from __future__ import annotations

import os
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
