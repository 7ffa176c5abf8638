"""`--set train.batch_size=24`: one key of an experiment, changed from the command line."""

from __future__ import annotations

import copy
import dataclasses
from types import MappingProxyType
from typing import Any

from baton.config.document import FROM_SET, Document, dotted
from baton.errors import ConfigError


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key, in place; mappings on the way are made where missing."""
    names = key.split(".")
    if not all(names):
        raise ConfigError(f"--set {key!r}: a name is empty; write it as in 'train.batch_size'")
    for depth, name in enumerate(names[:-1], start=1):
        if data.get(name) is None:
            data[name] = {}
        if not isinstance(data[name], dict):
            outer = dotted(tuple(names[:depth]))
            raise ConfigError(f"--set {key!r}: {outer!r} is not a mapping; set {outer!r} itself")
        data = data[name]
    data[names[-1]] = value


def override(document: Document, key: str, value: Any) -> Document:
    """`set_key` on a copy whose problems at this key name `--set` instead of a line."""
    data = copy.deepcopy(document.data)
    set_key(data, key, value)
    path = tuple(key.split("."))
    lines = {at: line for at, line in document.lines.items() if at[: len(path)] != path}
    for depth in range(1, len(path) + 1):
        lines.setdefault(path[:depth], FROM_SET)
    return dataclasses.replace(document, data=data, lines=MappingProxyType(lines))
