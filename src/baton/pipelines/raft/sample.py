"""A few valid rows of each built-in format, to look at, to copy and to try a student on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from baton.errors import ConfigError
from baton.pipelines.raft.rows import Row, read

_FOLDER = Path(str(files("baton.pipelines.raft") / "samples"))


def sample_path(format: str) -> Path:
    """The rows of a built-in format. Raises `ConfigError` for a format of one's own."""
    path = _FOLDER / f"{format}.jsonl"
    if "/" in format or not path.exists():
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.jsonl")))
        raise ConfigError(f"there are no sample rows of the format {format!r}; there are: {known}")
    return path


def sample_rows(format: str) -> list[Row]:
    return read(sample_path(format))
