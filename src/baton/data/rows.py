"""What every format is read into: rows, rejects, and how text is picked from cells."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Columns = Mapping[str, str | Sequence[str]]
"""Target field → source column, or several whose non-empty texts are joined by a newline."""

EXCERPT_CHARS = 200
# Python's own limit of 131,072 refuses real documents; none at all lets one unclosed quote pull
# the rest of the file into memory.
MAX_FIELD_CHARS = 1 << 24
MAX_ELEMENT_CHARS = 1 << 26
SAMPLED_OBJECTS = 100
_WINDOW_CHARS = 1 << 18


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row. `number` counts data rows from 1, broken ones included."""

    number: int
    line: int | None
    """Line of the file the row starts at, from 1; None for Parquet."""
    values: dict[str, str]
    """Text by target field, in the order of the column mapping, whitespace untouched."""


@dataclass(frozen=True, slots=True)
class Reject:
    """One row left out, and why. `reason` is a stable word to count by, `detail` is for people."""

    number: int
    line: int | None
    reason: str
    detail: str
    excerpt: str
    """At most `EXCERPT_CHARS` characters of the row."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that has been looked at: how it is written, and that the wanted columns are there."""

    path: Path
    format: str
    encoding: str
    """As declared (GBK widened to GB18030) or as detected; always utf-8 for Parquet."""
    columns: tuple[str, ...]
    """Every column of the file; for JSON those of its first `SAMPLED_OBJECTS` objects."""
    mapping: Columns
    read: Callable[[Source], Iterator[Row | Reject]]
    """How this format is read."""
    delimiter: str = ""
    """Between the fields of a CSV or TSV file, empty for other formats."""

    def rows(self) -> Iterator[Row | Reject]:
        """Read the file from its start. Raises DataError where the file itself breaks off."""
        return self.read(self)


def excerpt(text: str) -> str:
    """The start of a text, short enough for a report."""
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"


class UnusableError(Exception):
    """One row cannot be used; it becomes a `Reject`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Pick:
    """Where one target field comes from: `keys` index a row's cells, `names` are for messages."""

    field: str
    keys: tuple[Any, ...]
    names: tuple[str, ...]


def sources_of(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """The source columns of one target field."""
    return (wanted,) if isinstance(wanted, str) else tuple(wanted)


def wanted_columns(columns: Columns) -> list[str]:
    """Every source column that is mapped, once."""
    return list(dict.fromkeys(name for wanted in columns.values() for name in sources_of(wanted)))


def find_picks(columns: Columns, key: Callable[[str], Any]) -> list[Pick]:
    """One pick a target field; `key` says where a row keeps the column of a name."""
    return [
        Pick(field, tuple(key(name) for name in sources_of(wanted)), sources_of(wanted))
        for field, wanted in columns.items()
    ]


def pick_values(cells: Any, picks: list[Pick]) -> dict[str, str]:
    """Text by target field; `cells` is a list or a dict, whatever the picks' keys index."""
    values = {}
    for pick in picks:
        if len(pick.keys) == 1:
            cell = cells[pick.keys[0]]
            text = cell if type(cell) is str else _text(cell, pick.names[0])
            if text is None:
                raise UnusableError("null_value", f"column {pick.names[0]} is null")
        else:
            parts = [
                _text(cells[key], name) for key, name in zip(pick.keys, pick.names, strict=True)
            ]
            if all(part is None for part in parts):
                raise UnusableError("null_value", f"columns {', '.join(pick.names)} are all null")
            text = "\n".join(part for part in parts if part and not part.isspace())
        if "\0" in text:
            raise UnusableError("nul_character", f"field {pick.field} contains a NUL character")
        values[pick.field] = text
    return values


def _text(cell: object, name: str) -> str | None:
    if cell is None or isinstance(cell, str):
        return cell
    # A Decimal is a Number but not a Real; a missing number arrives as NaN from pandas.
    if isinstance(cell, numbers.Number) and not isinstance(cell, bool | complex):
        if math.isfinite(cell):  # type: ignore[arg-type]
            return str(cell)
        raise UnusableError("not_text", f"column {name} is {cell}")
    raise UnusableError("not_text", f"column {name} holds a {type(cell).__name__}, not text")


class Lines:
    """Lines of a file without its byte order mark, remembering the last one for messages."""

    def __init__(self, stream: Iterable[str]) -> None:
        self.last = ""
        self._lines = iter(stream)

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.last = line.removeprefix("\ufeff")
            yield self.last
            break
        for line in self._lines:
            self.last = line
            yield line
