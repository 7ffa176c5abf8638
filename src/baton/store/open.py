"""From the URL that a person names to the store behind it."""

from __future__ import annotations

import re
from pathlib import Path

from baton.errors import ConfigError
from baton.store.base import Store
from baton.store.local import LocalStore


def open_store(url: str) -> Store:
    """The store a person names with `--store`: a folder, `s3://bucket/prefix` or `hf://…`."""
    plain = url.removeprefix("file://")
    if not plain:
        raise ConfigError("store: the name is empty; name a folder (is a variable not set?)")
    if re.match(r"\w+:/", plain):
        raise ConfigError(f"store {url!r}: this version of baton stores in folders only")
    path = Path(plain).absolute()
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"store {url!r}: {place} is a file; name a folder")
    return LocalStore(path)
