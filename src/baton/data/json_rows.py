"""JSON arrays and JSON lines: a broken line costs only itself, an array is never held whole."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from baton.data import encoding as encodings
from baton.data import rows
from baton.data.rows import (
    Lines,
    Pick,
    Reject,
    Row,
    Source,
    UnusableError,
    excerpt,
    find_picks,
    pick_values,
)
from baton.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")


def describe(source: Source) -> Source:
    """Tell an array from one object a line, and collect the columns of the first objects."""
    format = source.format
    with encodings.open_text(source.path, source.encoding, newline="\n") as stream:
        head = stream.read(rows._WINDOW_CHARS).lstrip("\ufeff \t\r\n")
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
        for _, record, _ in itertools.islice(records, rows.SAMPLED_OBJECTS):
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
    return replace(source, format=format, columns=tuple(columns))


def _closed_on_its_line(head: str) -> bool:
    line, newline, _ = head.partition("\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return not newline and len(head) > rows._WINDOW_CHARS // 2  # a line longer than we looked
    return True


def read(source: Source) -> Iterator[Row | Reject]:
    """Rows in their order. Raises DataError where an array breaks off."""
    picks = find_picks(source.mapping, str)
    with encodings.open_text(source.path, source.encoding, newline="\n") as stream:
        records = _array(source.path, stream) if source.format == "json" else _lines(stream)
        for number, (line, record, text) in enumerate(records, start=1):
            try:
                yield Row(number, line, _object_values(record, picks))
            except UnusableError as error:
                if text is None:
                    text = json.dumps(record, ensure_ascii=False)
                yield Reject(number, line, error.reason, error.detail, excerpt(text))


def read_objects(path: Path) -> Iterator[tuple[int, object]]:
    """Line and value of every element of a JSON array, or of every line of a JSONL file.

    A line that is not JSON comes as the error that decoding it ended in.
    Raises DataError where the file is missing, empty, in another encoding or breaks off.
    """
    lined = {".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes}
    encoding = encodings.resolve(path, None)
    source = describe(Source(path, "jsonl" if lined else "json", encoding, (), {}, read))
    with encodings.open_text(path, encoding, newline="\n") as stream:
        records = _array(path, stream) if source.format == "json" else _lines(stream)
        for line, record, _ in records:
            yield line, record


def _object_values(record: object, picks: list[Pick]) -> dict[str, str]:
    if isinstance(record, json.JSONDecodeError):
        raise UnusableError("broken_row", f"not JSON: {record.msg}, character {record.colno}")
    if isinstance(record, ValueError | RecursionError):
        raise UnusableError("broken_row", f"not JSON: {record}")
    if not isinstance(record, dict):
        raise UnusableError("broken_row", f"a JSON {type(record).__name__}, not an object")
    for pick in picks:
        present = [key for key in pick.keys if key in record]
        if not present:
            detail = f"no {' or '.join(pick.names)}; there is {', '.join(record) or 'nothing'}"
            raise UnusableError("missing_column", excerpt(detail))
        if len(present) < len(pick.keys):
            # One of several joined columns may be left out of a row, as it may be empty or null.
            record = dict.fromkeys(pick.keys) | record
    values = pick_values(record, picks)
    for field, text in values.items():
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            # Half of a surrogate pair, "\ud83d": valid JSON, but no tokenizer can take it.
            detail = f"field {field} holds half a surrogate pair"
            raise UnusableError("bad_unicode", detail) from None
    return values


_Record = tuple[int, object, str | None]
"""Line, decoded value (or the error that decoding ended in), text of the line if known."""


def _lines(stream: IO[str]) -> Iterator[_Record]:
    for line, padded in enumerate(Lines(stream), start=1):
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
    window.position += 1  # the bracket that `describe` saw
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
        if left > rows.MAX_ELEMENT_CHARS:
            raise self.error(f"a row of more than {rows.MAX_ELEMENT_CHARS:,} characters")
        # At least doubling what is left keeps a large element linear.
        more = self._stream.read(max(rows._WINDOW_CHARS, left))
        if not more:
            return False
        self.line()
        self._text = self._text[self.position :] + more
        self._dropped += self.position
        self.position = self._counted = 0
        return True
