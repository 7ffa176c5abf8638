"""From the URL that a person names to the store behind it."""

from __future__ import annotations

import re
from pathlib import Path

from baton.config.home import scratch_folder
from baton.errors import ConfigError
from baton.store.base import Remote, Store
from baton.store.local import LocalStore
from baton.store.patience import IMPATIENT, Patience

_KINDS = "a folder, s3://bucket/prefix, hf://user/repository or hf://buckets/user/bucket"


def open_store(url: str) -> Store:
    """The store a person names with `--store`: a folder, `s3://bucket/prefix` or `hf://…`.

    Raises:
        ConfigError: it is none of these.
        StoreRefused: it does not let us in.
    """
    return open_remote(url) if is_remote(url) else LocalStore(local_folder(url))


def is_remote(url: str) -> bool:
    """Does this URL name a store behind a network?"""
    plain = url.removeprefix("file://")
    return bool(re.match(r"\w+:/", plain))


def open_remote(url: str, patience: Patience = IMPATIENT) -> Remote:
    """The store behind a network that `url` names; only now its library is imported."""
    kind, _, rest = url.partition("://")
    if not rest:
        raise ConfigError(f"store {url!r}: no place is named; name {_KINDS}")
    if kind == "s3":
        from baton.store.s3 import S3Store

        return S3Store.open(url, patience)
    if url.startswith("hf://buckets/"):
        from baton.store.hub_objects import HubBucketStore

        return HubBucketStore.open(url, patience)
    if kind == "hf":
        from baton.store.hub import HubStore

        return HubStore.open(url, patience)
    raise ConfigError(f"store {url!r}: baton does not know {kind}://; name {_KINDS}")


def local_folder(url: str) -> Path:
    """The folder that work is done in: the store itself, or where a remote one is mirrored."""
    if is_remote(url):
        return scratch_folder(url)
    plain = url.removeprefix("file://")
    if not plain:
        raise ConfigError("store: the name is empty; name a folder (is a variable not set?)")
    path = Path(plain).absolute()
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"store {url!r}: {place} is a file; name a folder")
    return path
