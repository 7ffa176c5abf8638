"""Parquet: rows batch by batch, numbers as text, strings that are no UTF-8 turned away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from baton.data import encoding as encodings
from baton.data.rows import (
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

_BATCH_ROWS = 1024


def describe(source: Source) -> Source:
    """Add the columns, and see that those wanted hold text or numbers."""
    path = source.path
    with encodings.open_bytes(path):
        pass  # says what is wrong with a path better than pyarrow does
    with _open_parquet(path) as file:
        if file.metadata.num_rows == 0:
            raise DataError(f"{path}: holds no rows; fetch or write it again")
        schema = file.schema_arrow
    wanted, kinds = wanted_columns(source.mapping), pa.types
    allowed = (
        *(kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null),
        *(kinds.is_integer, kinds.is_floating, kinds.is_decimal),
    )
    for field in schema:
        kind = field.type.value_type if kinds.is_dictionary(field.type) else field.type
        if field.name in wanted and not any(test(kind) for test in allowed):
            raise DataError(
                f"{path}: column {field.name} holds {field.type}, not text; "
                "map another column or convert it"
            )
    return replace(source, columns=tuple(schema.names))


def read(source: Source) -> Iterator[Row | Reject]:
    """Rows in their order, a batch at a time. Raises DataError at a damaged page."""
    wanted = wanted_columns(source.mapping)
    picks = find_picks(source.mapping, wanted.index)
    number = 0
    with _open_parquet(source.path) as file:
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(source.path, error) from error
            if batch is None:
                return
            for cells in zip(*(_cells(batch.column(name)) for name in wanted), strict=True):
                number += 1
                try:
                    yield Row(number, None, pick_values(cells, picks))
                except UnusableError as error:
                    text = " | ".join(str(cell) for cell in cells)
                    yield Reject(number, None, error.reason, error.detail, excerpt(text))


def _open_parquet(path: Path) -> Any:
    try:
        # Without these pyarrow reads a whole row group ahead, and a file may be one row group.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{path}: damaged Parquet file ({reason}); fetch it again")


def _cells(column: Any) -> list[object]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        # Parquet does not check that its strings are UTF-8; bytes are turned away row by row.
        raw = column.cast(pa.large_binary()).to_pylist()
        return [cell if cell is None else _decoded(cell) for cell in raw]


def _decoded(cell: bytes) -> str | bytes:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return cell
