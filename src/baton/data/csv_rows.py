"""CSV and TSV: the delimiter is found by the header, a broken line costs only itself."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from baton.data import encoding as encodings
from baton.data import rows
from baton.data.rows import (
    Lines,
    Reject,
    Row,
    Source,
    UnusableError,
    excerpt,
    find_picks,
    pick_values,
    wanted_columns,
)
from baton.errors import DataError


def describe(source: Source) -> Source:
    """Choose the delimiter under which most wanted columns, then most columns, are found."""
    with encodings.open_text(source.path, source.encoding, newline="") as stream:
        lines = list(itertools.islice(Lines(stream), rows.SAMPLED_OBJECTS))
    best, best_rank = source, (-1, -1)
    for delimiter in "\t" if source.format == "tsv" else ",\t;":
        header = _header(lines, delimiter)
        rank = (sum(name in header for name in wanted_columns(source.mapping)), len(header))
        if rank > best_rank:
            best_rank = rank
            best = replace(source, columns=header, delimiter=delimiter)
    if not any(best.columns):
        start = "".join(lines).strip()[:40]
        raise DataError(f"{source.path}: has no header line that can be read, it starts {start!r}")
    return best


def _header(lines: list[str], delimiter: str) -> tuple[str, ...]:
    try:
        header = next(filter(None, csv.reader(lines, delimiter=delimiter, strict=True)), [])
    except csv.Error:
        header = []
    return tuple(name.strip() for name in header)


def read(source: Source) -> Iterator[Row | Reject]:
    """Rows in their order. Raises DataError where a quote is never closed."""
    # Process-wide, like everything about the csv module's limit; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), rows.MAX_FIELD_CHARS))
    picks = find_picks(source.mapping, source.columns.index)
    width = len(source.columns)
    with encodings.open_text(source.path, source.encoding, newline="") as stream:
        lines = Lines(stream)
        # Not strict, a quote that is never closed would end as one giant, quietly accepted field.
        reader = csv.reader(lines, delimiter=source.delimiter, strict=True)
        next(filter(None, reader))
        number, start, going = 0, reader.line_num + 1, True
        while going:
            try:
                for cells in reader:
                    line, start = start, reader.line_num + 1
                    if not cells:
                        continue
                    number += 1
                    try:
                        if len(cells) != width:
                            detail = f"{len(cells)} fields, the header has {width}"
                            raise UnusableError("broken_row", detail)
                        yield Row(number, line, pick_values(cells, picks))
                    except UnusableError as error:
                        text = excerpt(source.delimiter.join(cells))
                        yield Reject(number, line, error.reason, error.detail, text)
                going = False
            except csv.Error as error:
                number += 1
                line, start = start, reader.line_num + 1
                detail = _quoting(source.path, str(error), line, reader.line_num)
                yield Reject(number, line, "broken_row", detail, excerpt(lines.last))
        if number == 0:
            raise DataError(f"{source.path}: has a header but no rows; fetch or write it again")


def _quoting(path: Path, error: str, first: int, last: int) -> str:
    """What a csv.Error means for one row; raises DataError if the rest of the file is lost."""
    if "unexpected end of data" in error or "field limit" in error:
        raise DataError(
            f'{path}: a quote (") opened in the row at line {first:,} is still open at line '
            f"{last:,}; close it, double the quotes inside fields, or fetch the file again if it "
            "is cut off"
        )
    where = f"line {last}" if first == last else f"lines {first} to {last}, lost together"
    return f"{error} ({where})"
