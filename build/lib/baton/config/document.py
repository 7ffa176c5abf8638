"""A configuration as it stands in a file: the values, and where each key is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

FROM_SET = 0  # the "line" of a value that came from --set and not from the file


@dataclass(frozen=True)
class Document:
    """A YAML file as read; `lines` has the line (from 1) of each key and list item."""

    path: str
    data: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """Line of the key, or of the nearest mapping around it where the key is missing."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def place(self, path: KeyPath) -> str:
        """`jobs/raft.yaml:14`, as a problem names it."""
        line = self.line(path)
        return "--set" if line == FROM_SET else f"{self.path}:{line}"


def dotted(path: KeyPath) -> str:
    """`train.files[2]`; a key that would not be readable that way stands as `['a.b']`."""
    text = ""
    for key in path:
        if isinstance(key, str) and re.fullmatch(r"[\w/-]+", key):
            text += f".{key}" if text else key
        else:
            text += f"[{key!r}]"
    return text


def clip(text: str, length: int = 60) -> str:
    """Text short enough to stand in a message."""
    return text if len(text) <= length else text[: length - 1] + "…"
