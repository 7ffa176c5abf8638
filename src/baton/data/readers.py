"""Rows of text out of CSV, TSV, JSON, JSONL and Parquet files, in constant memory.

A broken row never stops a read: it comes out as a `Reject` in its place. A broken *file* (missing,
empty, cut off, in another encoding, without a column) is a `DataError`, most of them before the
first row. `.gz` is unpacked on the way for everything but Parquet.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from baton.data import csv_rows, json_rows
from baton.data import encoding as encodings
from baton.data.rows import (
    Columns,
    Reject,
    Row,
    Source,
    excerpt,
    sources_of,
    wanted_columns,
)
from baton.errors import DataError

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}


def read_rows(
    path: Path, *, encoding: str | None, columns: Columns, format: str | None = None
) -> Iterator[Row | Reject]:
    """Stream the rows of a file; `describe(...).rows()` for callers that need no description."""
    return describe(path, encoding=encoding, columns=columns, format=format).rows()


def describe(
    path: Path, *, encoding: str | None, columns: Columns, format: str | None = None
) -> Source:
    """Find format, encoding, delimiter and columns of a file, or raise DataError saying why not.

    `format` overrules the suffix (exports named `.json` are often JSONL; that one is noticed).
    With `encoding=None` the whole file is read once to be sure of its encoding.
    """
    if not columns or not all(sources_of(wanted) for wanted in columns.values()):
        raise DataError(f"{path}: no columns are mapped; name one for every field, e.g. question")
    format = _format(path, format)
    encoding = "utf-8" if format == "parquet" else encodings.resolve(path, encoding)
    module = _module(format)
    source = module.describe(Source(path, format, encoding, (), columns, module.read))
    _require_columns(source)
    return source


class _Format(Protocol):
    """What the module of a format has."""

    def describe(self, source: Source) -> Source:
        """The source with its columns, and its delimiter or true format where those are found."""
        ...

    def read(self, source: Source) -> Iterator[Row | Reject]:
        """Rows and rejects in the order of the file."""
        ...


def _module(format: str) -> _Format:
    if format == "parquet":
        # Imported late: text needs no pyarrow.
        from baton.data import parquet_rows

        return parquet_rows
    return csv_rows if format in ("csv", "tsv") else json_rows


def _format(path: Path, declared: str | None) -> str:
    known = sorted(set(FORMATS.values()))
    if declared is not None:
        if declared in known:
            return declared
        near = difflib.get_close_matches(declared.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise DataError(f"{path}: there is no format {declared!r}; {hint}")
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    found = FORMATS.get(plain.suffix.lower())
    if found is None:
        raise DataError(
            f"{path}: its name does not tell the format; declare format: {' | '.join(known)}"
        )
    return found


def _require_columns(source: Source) -> None:
    missing = [name for name in wanted_columns(source.mapping) if name not in source.columns]
    if missing:
        near = [difflib.get_close_matches(name, source.columns, n=1) for name in missing]
        asked = ", ".join(
            f"{name!r} (did you mean {match[0]!r}?)" if match else repr(name)
            for name, match in zip(missing, near, strict=True)
        )
        there = ", ".join(excerpt(name) for name in source.columns)
        raise DataError(f"{source.path}: there is no column {asked}; the columns are: {there}")
    for name in wanted_columns(source.mapping):
        if source.columns.count(name) > 1:
            raise DataError(
                f"{source.path}: {source.columns.count(name)} columns are named {name!r}; "
                "rename all but the one to read"
            )


def read_column(path: Path, *, encoding: str | None, columns: Columns, name: str) -> list[str]:
    """One field of every row of a file, all of which must be usable.

    Raises:
        DataError: names each row that is not, with its line.
    """
    rows = list(read_rows(path, encoding=encoding, columns={name: columns[name]}))
    bad = [f"{path}:{row.line}: {row.detail}" for row in rows if isinstance(row, Reject)]
    if bad:
        raise DataError("\n".join(bad))
    return [row.values[name] for row in rows if not isinstance(row, Reject)]
