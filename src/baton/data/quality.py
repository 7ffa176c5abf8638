"""Which rows are fit for training, why the others are not, and a report of both.

cleaner = Cleaner(min_chars=5, max_chars=1024)
with RejectsWriter(folder / "rejects.jsonl") as rejects:
    for row in rejects.kept(cleaner.clean(source.rows())):
        ...
report = cleaner.report(encoding=source.encoding, columns=source.columns)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from baton.data.rows import Reject, Row, excerpt

DIGEST_BYTES = 16
FIRST_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Exact quantiles (nearest rank) of one field over the kept rows, in characters."""

    min: int
    p5: int
    p50: int
    p95: int
    p99: int
    max: int

    def __str__(self) -> str:
        values = dataclasses.asdict(self).items()
        return " · ".join(f"{name} {value:,}" for name, value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """What was read, what was kept, and why the rest was dropped."""

    encoding: str
    columns: tuple[str, ...]
    read: int
    kept: int
    dropped: dict[str, int]
    """Rows by reason, most frequent first."""
    nulls: dict[str, int]
    """Rows without a value, by what was null."""
    lengths: dict[str, Lengths]
    """By field; empty when nothing was kept."""
    first_rows: tuple[dict[str, str], ...]

    def lines(self) -> list[str]:
        """The report for people, one string a line."""
        share = f" ({self.kept / self.read:.1%})" if self.read else ""
        lines = [
            f"read {self.read:,} rows ({self.encoding}; columns {', '.join(self.columns)})",
            f"kept {self.kept:,}{share}",
            f"dropped {sum(self.dropped.values()):,}",
        ]
        lines += [f"  {count:>9,}  {reason}" for reason, count in self.dropped.items()]
        lines += [f"{field}: {lengths} characters" for field, lengths in self.lengths.items()]
        for row in self.first_rows:
            # A newline inside a text would break the one-string-a-line promise.
            shown = (f"{field}: {' '.join(text.split())}" for field, text in row.items())
            lines.append("first rows: " + " | ".join(shown))
        return lines

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        plain = dataclasses.asdict(self)
        return plain | {"columns": list(self.columns), "first_rows": list(self.first_rows)}


class Cleaner:
    """Strips, measures and deduplicates rows, keeping count for the report.

    Rejects that come in (rows the reader could not use) are counted and passed on. Memory: one
    16-byte digest a kept row, about 100 bytes with Python's set around it; constant with
    `drop_duplicates=False`.
    """

    def __init__(self, *, min_chars: int, max_chars: int, drop_duplicates: bool = True) -> None:
        if not 0 <= min_chars <= max_chars:
            raise ValueError(f"min_chars must be 0 to max_chars, got {min_chars} and {max_chars}")
        self._min_chars = min_chars
        self._max_chars = max_chars
        self._drop_duplicates = drop_duplicates
        self._seen: set[bytes] = set()
        self._kept = 0
        self._dropped: Counter[str] = Counter()
        self._nulls: Counter[str] = Counter()
        self._lengths: dict[str, Counter[int]] = {}
        self._first_rows: list[dict[str, str]] = []

    def clean(self, rows: Iterable[Row | Reject]) -> Iterator[Row | Reject]:
        """Rows fit for training, stripped, in their order; of equal rows the first is kept."""
        for row in rows:
            cleaned = row if isinstance(row, Reject) else self._judge(row)
            if isinstance(cleaned, Reject):
                self._dropped[cleaned.reason] += 1
                if cleaned.reason == "null_value":
                    self._nulls[cleaned.detail] += 1
            else:
                self._keep(cleaned)
            yield cleaned

    def report(self, *, encoding: str, columns: tuple[str, ...]) -> QualityReport:
        """What `clean` has seen so far; `encoding` and `columns` are those of the source."""
        return QualityReport(
            encoding=encoding,
            columns=columns,
            read=self._kept + self._dropped.total(),
            kept=self._kept,
            dropped=dict(sorted(self._dropped.items(), key=lambda item: (-item[1], item[0]))),
            nulls=dict(self._nulls),
            lengths={field: _quantiles(lengths) for field, lengths in self._lengths.items()},
            first_rows=tuple(self._first_rows),
        )

    def _judge(self, row: Row) -> Row | Reject:
        values = {field: text.strip() for field, text in row.values.items()}
        for field, text in values.items():
            size = len(text)
            if self._min_chars <= size <= self._max_chars and size:
                continue
            if not size:
                return _reject(row, f"empty_{field}", "no characters", row.values[field])
            if size < self._min_chars:
                detail = f"{size:,} characters, at least {self._min_chars:,} are needed"
                return _reject(row, f"{field}_too_short", detail, text)
            detail = f"{size:,} characters, at most {self._max_chars:,} are allowed"
            return _reject(row, f"{field}_too_long", detail, text)
        if not self._drop_duplicates:
            return Row(row.number, row.line, values)
        # The length before each text keeps ("ab", "c") and ("a", "bc") apart.
        joined = "".join(f"{len(text)}:{text}" for text in values.values())
        digest = _digest(joined)
        if digest in self._seen:
            text = " | ".join(values.values())
            return _reject(row, "exact_duplicate", "the same as an earlier row", text)
        self._seen.add(digest)
        return Row(row.number, row.line, values)

    def _keep(self, row: Row) -> None:
        self._kept += 1
        for field, text in row.values.items():
            lengths = self._lengths.get(field)
            if lengths is None:
                lengths = self._lengths[field] = Counter()
            lengths[len(text)] += 1
        if len(self._first_rows) < FIRST_ROWS:
            first = {field: excerpt(text) for field, text in row.values.items()}
            self._first_rows.append(first)


def clean(
    rows: Iterable[Row | Reject], *, min_chars: int, max_chars: int
) -> Iterator[Row | Reject]:
    """Clean rows without a report; see `Cleaner`."""
    return Cleaner(min_chars=min_chars, max_chars=max_chars).clean(rows)


class RejectsWriter:
    """Writes rejects, one JSON object a line; the file appears only when all are written.

    Leaving the `with` block by an exception removes what was written so far, and leaves a file
    from an earlier run as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._part = path.with_name(path.name + ".part")
        self._stream: IO[str] | None = None

    def __enter__(self) -> RejectsWriter:
        # Half a surrogate pair cannot be UTF-8; backslashreplace makes the JSON escape of it.
        self._stream = self._part.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stream is not None, "__enter__ opened it"
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        if kind is None:
            os.replace(self._part, self.path)
        else:
            self._part.unlink()

    def write(self, reject: Reject) -> None:
        """Add one line. Only inside the `with` block."""
        assert self._stream is not None, "RejectsWriter is used in a with block"
        self.counts[reject.reason] += 1
        record = {
            "row": reject.number,
            "line": reject.line,
            "reason": reject.reason,
            "detail": reject.detail,
            "excerpt": excerpt(reject.excerpt),
        }
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    def kept(self, rows: Iterable[Row | Reject]) -> Iterator[Row]:
        """Pass the usable rows on and write the others down."""
        for row in rows:
            if isinstance(row, Reject):
                self.write(row)
            else:
                yield row


def _reject(row: Row, reason: str, detail: str, text: str) -> Reject:
    return Reject(row.number, row.line, reason, detail, excerpt(text))


def _digest(text: str) -> bytes:
    # Rows made by hand may hold what no reader lets through: half a surrogate pair.
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _quantiles(lengths: Counter[int]) -> Lengths:
    """Nearest rank: the smallest length that at least this percentage of the rows do not exceed."""
    total = lengths.total()
    ordered = sorted(lengths)

    def percentile(percent: int) -> int:
        rank = -(-total * percent // 100)  # rounded up, in whole numbers
        seen = 0
        for length in ordered:
            seen += lengths[length]
            if seen >= rank:
                return length
        return ordered[-1]

    return Lengths(
        min=ordered[0],
        p5=percentile(5),
        p50=percentile(50),
        p95=percentile(95),
        p99=percentile(99),
        max=ordered[-1],
    )
