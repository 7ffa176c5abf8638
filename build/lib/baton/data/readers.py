"""Rows of text out of CSV, TSV, JSON, JSONL and Parquet files, in constant memory.

A broken row never stops a read: it comes out as a `Reject` in its place. A broken *file* (missing,
empty, cut off, in another encoding, without a column) is a `DataError`, most of them before the
first row. `.gz` is unpacked on the way for everything but Parquet.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from baton.data import encoding as encodings
from baton.errors import DataError

Columns = Mapping[str, str | Sequence[str]]
"""Target field → source column, or several whose non-empty texts are joined by a newline."""

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
EXCERPT_CHARS = 200
# Python's own limit of 131,072 refuses real documents; none at all lets one unclosed quote pull
# the rest of the file into memory.
MAX_FIELD_CHARS = 1 << 24
MAX_ELEMENT_CHARS = 1 << 26
SAMPLED_OBJECTS = 100
_WINDOW_CHARS = 1 << 18
_BATCH_ROWS = 1024
_SPACE = re.compile(r"[ \t\n\r]*")


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
    delimiter: str = ""
    """Between the fields of a CSV or TSV file, empty for other formats."""

    def rows(self) -> Iterator[Row | Reject]:
        """Read the file from its start. Raises DataError where the file itself breaks off."""
        return _READERS[self.format](self)


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
    if not columns or not all(_sources(wanted) for wanted in columns.values()):
        raise DataError(f"{path}: no columns are mapped; name one for every field, e.g. question")
    format = _format(path, format)
    if format == "parquet":
        with encodings.open_bytes(path):
            pass
        source = Source(path, format, "utf-8", _parquet_columns(path, columns), columns)
    else:
        encoding = encodings.resolve(path, encoding)
        if format in ("csv", "tsv"):
            source = _describe_csv(Source(path, format, encoding, (), columns))
        else:
            source = _describe_json(Source(path, format, encoding, (), columns))
    _require_columns(source)
    return source


def excerpt(text: str) -> str:
    """The start of a text, short enough for a report."""
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"


# --- what all formats share -------------------------------------------------------------------


class _UnusableError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class _Pick:
    """Where one target field comes from: `keys` index a row's cells, `names` are for messages."""

    field: str
    keys: tuple[Any, ...]
    names: tuple[str, ...]


def _sources(wanted: str | Sequence[str]) -> tuple[str, ...]:
    return (wanted,) if isinstance(wanted, str) else tuple(wanted)


def _wanted(columns: Columns) -> list[str]:
    return list(dict.fromkeys(name for wanted in columns.values() for name in _sources(wanted)))


def _picks(columns: Columns, key: Callable[[str], Any]) -> list[_Pick]:
    return [
        _Pick(field, tuple(key(name) for name in _sources(wanted)), _sources(wanted))
        for field, wanted in columns.items()
    ]


def _values(cells: Any, picks: list[_Pick]) -> dict[str, str]:
    """Text by target field; `cells` is a list or a dict, whatever the picks' keys index."""
    values = {}
    for pick in picks:
        if len(pick.keys) == 1:
            cell = cells[pick.keys[0]]
            text = cell if type(cell) is str else _text(cell, pick.names[0])
            if text is None:
                raise _UnusableError("null_value", f"column {pick.names[0]} is null")
        else:
            parts = [
                _text(cells[key], name) for key, name in zip(pick.keys, pick.names, strict=True)
            ]
            if all(part is None for part in parts):
                raise _UnusableError("null_value", f"columns {', '.join(pick.names)} are all null")
            text = "\n".join(part for part in parts if part and not part.isspace())
        if "\0" in text:
            raise _UnusableError("nul_character", f"field {pick.field} contains a NUL character")
        values[pick.field] = text
    return values


def _text(cell: object, name: str) -> str | None:
    if cell is None or isinstance(cell, str):
        return cell
    # A Decimal is a Number but not a Real; a missing number arrives as NaN from pandas.
    if isinstance(cell, numbers.Number) and not isinstance(cell, bool | complex):
        if math.isfinite(cell):  # type: ignore[arg-type]
            return str(cell)
        raise _UnusableError("not_text", f"column {name} is {cell}")
    raise _UnusableError("not_text", f"column {name} holds a {type(cell).__name__}, not text")


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
    missing = [name for name in _wanted(source.mapping) if name not in source.columns]
    if missing:
        near = [difflib.get_close_matches(name, source.columns, n=1) for name in missing]
        asked = ", ".join(
            f"{name!r} (did you mean {match[0]!r}?)" if match else repr(name)
            for name, match in zip(missing, near, strict=True)
        )
        there = ", ".join(excerpt(name) for name in source.columns)
        raise DataError(f"{source.path}: there is no column {asked}; the columns are: {there}")
    for name in _wanted(source.mapping):
        if source.columns.count(name) > 1:
            raise DataError(
                f"{source.path}: {source.columns.count(name)} columns are named {name!r}; "
                "rename all but the one to read"
            )


# --- CSV and TSV ------------------------------------------------------------------------------


class _Lines:
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


def _describe_csv(source: Source) -> Source:
    """Choose the delimiter under which most wanted columns, then most columns, are found."""
    with encodings.open_text(source.path, source.encoding, newline="") as stream:
        lines = list(itertools.islice(_Lines(stream), SAMPLED_OBJECTS))
    best = source
    best_rank = (-1, -1)
    for delimiter in "\t" if source.format == "tsv" else ",\t;":
        header = _header(lines, delimiter)
        rank = (sum(name in header for name in _wanted(source.mapping)), len(header))
        if rank > best_rank:
            best_rank = rank
            best = Source(
                source.path, source.format, source.encoding, header, source.mapping, delimiter
            )
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


def _read_csv(source: Source) -> Iterator[Row | Reject]:
    # Process-wide, like everything about the csv module's limit; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARS))
    picks = _picks(source.mapping, source.columns.index)
    width = len(source.columns)
    with encodings.open_text(source.path, source.encoding, newline="") as stream:
        lines = _Lines(stream)
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
                            raise _UnusableError("broken_row", detail)
                        yield Row(number, line, _values(cells, picks))
                    except _UnusableError as error:
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


# --- JSON and JSONL ---------------------------------------------------------------------------


def _describe_json(source: Source) -> Source:
    """Tell an array from one object a line, and collect the columns of the first objects."""
    format = source.format
    with encodings.open_text(source.path, source.encoding, newline="\n") as stream:
        head = stream.read(_WINDOW_CHARS).lstrip("\ufeff \t\r\n")
    if format == "json" and head.startswith("{"):
        if not _closed_on_its_line(head):
            raise DataError(
                f"{source.path}: is one JSON object over several lines; write its rows as an array "
                "of objects or one object a line"
            )
        format = "jsonl"  # the most usual misnomer, shibing624/medical on the Hub among them
    if format == "jsonl" and re.match(r"\[\s*(\{|\]|$)", head):
        raise DataError(f"{source.path}: is a JSON array, not JSONL; declare format: json")
    if format == "json" and not head.startswith("["):
        raise DataError(
            f"{source.path}: starts with {excerpt(head)[:20]!r}; a JSON file must be an array of "
            "objects"
        )
    columns: dict[str, None] = {}
    broken = 0
    with encodings.open_text(source.path, source.encoding, newline="\n") as stream:
        records = _array(source.path, stream) if format == "json" else _lines(stream)
        for _, record, _ in itertools.islice(records, SAMPLED_OBJECTS):
            if isinstance(record, dict):
                columns.update(dict.fromkeys(record))
            else:
                broken += 1
    if not columns:
        if not broken:
            raise DataError(f"{source.path}: holds no rows; fetch or write it again")
        raise DataError(
            f"{source.path}: none of its first {broken} rows is a JSON object; "
            f"the file starts with {head[:40]!r}"
        )
    return Source(source.path, format, source.encoding, tuple(columns), source.mapping)


def _closed_on_its_line(head: str) -> bool:
    line, newline, _ = head.partition("\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return not newline and len(head) > _WINDOW_CHARS // 2  # a line longer than we looked
    return True


def _read_json(source: Source) -> Iterator[Row | Reject]:
    picks = _picks(source.mapping, str)
    with encodings.open_text(source.path, source.encoding, newline="\n") as stream:
        records = _array(source.path, stream) if source.format == "json" else _lines(stream)
        for number, (line, record, text) in enumerate(records, start=1):
            try:
                yield Row(number, line, _object_values(record, picks))
            except _UnusableError as error:
                if text is None:
                    text = json.dumps(record, ensure_ascii=False)
                yield Reject(number, line, error.reason, error.detail, excerpt(text))


def _object_values(record: object, picks: list[_Pick]) -> dict[str, str]:
    if isinstance(record, json.JSONDecodeError):
        raise _UnusableError("broken_row", f"not JSON: {record.msg}, character {record.colno}")
    if isinstance(record, ValueError | RecursionError):
        raise _UnusableError("broken_row", f"not JSON: {record}")
    if not isinstance(record, dict):
        raise _UnusableError("broken_row", f"a JSON {type(record).__name__}, not an object")
    for pick in picks:
        present = [key for key in pick.keys if key in record]
        if not present:
            detail = f"no {' or '.join(pick.names)}; there is {', '.join(record) or 'nothing'}"
            raise _UnusableError("missing_column", excerpt(detail))
        if len(present) < len(pick.keys):
            # One of several joined columns may be left out of a row, as it may be empty or null.
            record = dict.fromkeys(pick.keys) | record
    values = _values(record, picks)
    for field, text in values.items():
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            # Half of a surrogate pair, "\ud83d": valid JSON, but no tokenizer can take it.
            detail = f"field {field} holds half a surrogate pair"
            raise _UnusableError("bad_unicode", detail) from None
    return values


_Record = tuple[int, object, str | None]
"""Line, decoded value (or the error that decoding ended in), text of the line if known."""


def _lines(stream: IO[str]) -> Iterator[_Record]:
    for line, padded in enumerate(_Lines(stream), start=1):
        text = padded.strip()
        if not text:
            continue
        record: object
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            record = error
        yield line, record, text


def _array(path: Path, stream: IO[str]) -> Iterator[_Record]:
    """Elements of a JSON array one by one, holding one window of the file, not the file."""
    window = _Window(path, stream)
    if window.next_char() == "\ufeff":
        window.position += 1
        window.next_char()
    window.position += 1  # the bracket that _describe_json saw
    if window.next_char() == "]":
        window.position += 1
    else:
        while True:
            yield window.line(), window.element(), None
            char = window.next_char()
            window.position += 1
            window.elements += 1
            if char == "]":
                break
            if char != ",":
                window.position -= 1
                raise window.error(f"',' or ']' expected, found {char!r}" if char else "cut off")
            window.next_char()
    if window.next_char():
        raise window.error("text follows the end of the array")


class _Window:
    """The part of a JSON text being decoded, and where in the file it is."""

    def __init__(self, path: Path, stream: IO[str]) -> None:
        self.elements = 0
        self.position = 0
        self._path = path
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._dropped = 0
        self._line = 1
        self._counted = 0

    def next_char(self) -> str:
        """The next character that is no whitespace, without taking it; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self.position)
            assert match is not None, "the pattern matches nothing as well"
            self.position = match.end()
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._refill():
                return ""

    def element(self) -> object:
        """Decode the value that starts at `position` and step behind it."""
        while True:
            size = len(self._text)
            try:
                value, end = self._decoder.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                # Only at the end of the window can more text mend what is wrong.
                unfinished = error.msg.startswith("Unterminated") or error.pos > size - 16
                if not (unfinished and self._refill()):
                    raise self.error(error.msg, at=error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
            else:
                if end < size or not self._refill():  # `12` may be the start of `123`
                    self.position = end
                    return value

    def line(self) -> int:
        """Line of the file that `position` is in."""
        self._line += self._text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def error(self, what: str, at: int | None = None) -> DataError:
        if at is not None:
            self.position = at
        return DataError(
            f"{self._path}: the JSON array breaks after {self.elements:,} rows, at line "
            f"{self.line():,}, character {self._dropped + self.position:,}: {what}; "
            "repair it there, or fetch it again if it is cut off"
        )

    def _refill(self) -> bool:
        left = len(self._text) - self.position
        if left > MAX_ELEMENT_CHARS:
            raise self.error(f"a row of more than {MAX_ELEMENT_CHARS:,} characters")
        # At least doubling what is left keeps a large element linear.
        more = self._stream.read(max(_WINDOW_CHARS, left))
        if not more:
            return False
        self.line()
        self._text = self._text[self.position :] + more
        self._dropped += self.position
        self.position = self._counted = 0
        return True


# --- Parquet ----------------------------------------------------------------------------------


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without these pyarrow reads a whole row group ahead, and a file may be one row group.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{path}: damaged Parquet file ({reason}); fetch it again")


def _parquet_columns(path: Path, columns: Columns) -> tuple[str, ...]:
    import pyarrow as pa

    with _open_parquet(path) as file:
        if file.metadata.num_rows == 0:
            raise DataError(f"{path}: holds no rows; fetch or write it again")
        schema = file.schema_arrow
    kinds = pa.types
    allowed = (
        *(kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null),
        *(kinds.is_integer, kinds.is_floating, kinds.is_decimal),
    )
    for field in schema:
        kind = field.type.value_type if kinds.is_dictionary(field.type) else field.type
        if field.name in _wanted(columns) and not any(test(kind) for test in allowed):
            raise DataError(
                f"{path}: column {field.name} holds {field.type}, not text; "
                "map another column or convert it"
            )
    return tuple(schema.names)


def _read_parquet(source: Source) -> Iterator[Row | Reject]:
    import pyarrow as pa

    wanted = _wanted(source.mapping)
    picks = _picks(source.mapping, wanted.index)
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
                    yield Row(number, None, _values(cells, picks))
                except _UnusableError as error:
                    text = " | ".join(str(cell) for cell in cells)
                    yield Reject(number, None, error.reason, error.detail, excerpt(text))


def _cells(column: Any) -> list[object]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        # Parquet does not check that its strings are UTF-8; `_text` turns bytes away row by row.
        import pyarrow as pa

        raw = column.cast(pa.large_binary()).to_pylist()
        return [cell if cell is None else _decoded(cell) for cell in raw]


def _decoded(cell: bytes) -> str | bytes:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return cell


_READERS: dict[str, Callable[[Source], Iterator[Row | Reject]]] = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "json": _read_json,
    "jsonl": _read_json,
    "parquet": _read_parquet,
}
