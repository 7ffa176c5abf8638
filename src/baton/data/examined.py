"""Files of JSON rows that are read whole, so that every mistake is named at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from baton.data.json_rows import read_objects
from baton.errors import DataError

Row = TypeVar("Row")


def examine_rows(
    path: Path,
    mistakes_of: Callable[[Any], Iterable[str]],
    make: Callable[[int, int, Any], Row],
) -> tuple[list[Row], list[str]]:
    """The good rows, and a message for every mistake: `file:line: field: what, what to do`.

    `mistakes_of` says what is wrong with an object, as `field: what, what to do`; `make` gets the
    number of a good one, from 1, the line that it starts on, and the object.
    """
    rows, problems = [], []
    for number, (line, record) in enumerate(read_objects(path), start=1):
        mistakes = list(mistakes_of(record))
        problems += [f"{path}:{line}: {mistake}" for mistake in mistakes]
        if not mistakes:
            rows.append(make(number, line, record))
    return rows, problems


def required(path: Path, rows: list[Row], problems: list[str], *, shown: int) -> list[Row]:
    """`rows`, where nothing is wrong with them.

    Raises:
        DataError: names the first `shown` problems and the number of the others; or no rows.
    """
    if problems:
        more = len(problems) - shown
        named = problems[:shown]
        raise DataError("\n".join([*named, f"and {more:,} more mistakes"] if more > 0 else named))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows
