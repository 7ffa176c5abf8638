"""JSON lines that appear under their name only when all of them are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON lines as a context: left with an exception, it never existed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(f".{path.name}.part")
        self.count = 0

    def __enter__(self) -> JsonLines:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._beside, "w", encoding="utf-8", errors="replace")
        return self

    def write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self.count += 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._beside, self._path)
        else:
            self._beside.unlink()
