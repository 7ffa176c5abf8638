"""Files of pairs: any format in, two Parquet files, the rejects and a report out, as a stream."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from baton.data.config import PairConfig
from baton.data.pairs import HeldOut
from baton.data.quality import Cleaner, QualityReport, RejectsWriter
from baton.data.rows import Reject, Row, sources_of
from baton.data.source import RowSource
from baton.data.vocabulary import train_vocabulary
from baton.record import dump_json

TRAIN, VALID = "train.parquet", "valid.parquet"
REJECTS, REPORT = "rejects.jsonl", "report.json"
FIELDS = ("prompt", "response")
# A row group is read whole for one row of it; of this size one costs a few MB.
_GROUP_ROWS = 16_384


@dataclass(frozen=True)
class PairReport:
    """What a file of pairs is like."""

    quality: QualityReport
    nulls: dict[str, int]
    train: int
    valid: int

    def lines(self) -> list[str]:
        """For people, one string a line: shape, columns, nulls, lengths, first rows."""
        quality = self.quality
        nulls = ", ".join(f"{field} {count:,}" for field, count in self.nulls.items())
        return [
            f"shape: {quality.read:,} rows x {len(quality.columns)} columns",
            *quality.lines(),
            f"nulls: {nulls}",
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "quality": self.quality.to_json(),
            "nulls": self.nulls,
            "rows": {"train": self.train, "valid": self.valid},
        }


class PairReader:
    """Streams a source's usable pairs, stripped, and counts what it sees.

    Memory does not grow with the rows: duplicates are kept.
    """

    def __init__(self, source: RowSource, config: PairConfig) -> None:
        self._source, self._config = source, config
        self._cleaner = Cleaner(
            min_chars=config.min_chars, max_chars=config.max_chars, drop_duplicates=False
        )
        self._held_out = HeldOut(0.0 if config.valid else config.valid_share, config.seed)
        self._counts = {True: 0, False: 0}

    def rows(self) -> Iterator[Row | Reject]:
        """Usable rows, and the others with their reasons."""
        return self._cleaner.clean(self._source.rows())

    def split(self, rows: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
        """Each row, and whether it is held out for validation; counts both."""
        for row in rows:
            is_held_out = self._held_out(row.values["prompt"])
            self._counts[is_held_out] += 1
            yield row, is_held_out

    def report(self) -> PairReport:
        """What has been read so far."""
        quality = self._cleaner.report(encoding=self._source.encoding, columns=self._source.columns)
        nulls = {}
        for field, wanted in self._config.columns.items():
            names = sources_of(wanted)
            one, several = f"column {names[0]} is null", f"columns {', '.join(names)} are all null"
            nulls[field] = quality.nulls.get(one if len(names) == 1 else several, 0)
        return PairReport(quality, nulls, self._counts[False], self._counts[True])


def convert(source: RowSource, config: PairConfig, folder: Path) -> PairReport:
    """Write `train.parquet`, `valid.parquet`, `rejects.jsonl` and `report.json` to `folder`.

    Each file appears when it is whole; a kill leaves what was there before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader = PairReader(source, config)
    with (
        RejectsWriter(folder / REJECTS) as rejects,
        PairWriter(folder / TRAIN) as train,
        PairWriter(folder / VALID) as valid,
    ):
        for row, is_held_out in reader.split(rejects.kept(reader.rows())):
            (valid if is_held_out else train).append(row)
    report = reader.report()
    beside = folder / f".{REPORT}"
    beside.write_bytes(dump_json(report.to_json()))
    os.replace(beside, folder / REPORT)
    return report


def examine(source: RowSource, config: PairConfig) -> PairReport:
    """Read everything and write nothing."""
    reader = PairReader(source, config)
    for _ in reader.rows():
        pass
    return reader.report()


def write_vocabulary(
    source: RowSource, config: PairConfig, folder: Path, *, vocab: int, rows: int
) -> list[str]:
    """Train a tokenizer on the first `rows` usable pairs; returns what to tell people of it."""
    reader = PairReader(source, config)
    pairs = itertools.islice((row for row in reader.rows() if isinstance(row, Row)), rows)
    tokenizer = train_vocabulary(texts_of(pairs), vocab=vocab)
    tokenizer.save_pretrained(folder)
    special = ("pad", "eos", "unk", "bos")
    ids = ", ".join(f"{name} {getattr(tokenizer, f'{name}_token_id')}" for name in special)
    return [f"{len(tokenizer):,} tokens, written to {folder}", f"special ids: {ids}"]


def texts_of(rows: Iterable[Row]) -> Iterator[str]:
    """Prompts and responses, one after the other."""
    return (row.values[name] for row in rows for name in FIELDS)


class PairWriter:
    """Writes a Parquet file of two text columns, a row group at a time."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._held: list[Row] = []

    def __enter__(self) -> PairWriter:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([(name, pa.string()) for name in FIELDS])
        self._file = pq.ParquetWriter(self._part, self._schema, compression="zstd")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._part.unlink()
            return
        self._flush()
        self._file.close()
        with open(self._part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(self._part, self._path)

    def append(self, row: Row) -> None:
        """Add a row; it is written with the next row group."""
        self._held.append(row)
        if len(self._held) == _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = [[row.values[name] for row in self._held] for name in FIELDS]
        self._file.write_table(pa.table(columns, schema=self._schema))
        self._held.clear()
