"""Chat rows: the first question and answer of each conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from baton.data.json_rows import read_objects
from baton.data.source import open_files
from baton.errors import DataError
from baton.pipelines.questions_gen.config import ChatConfig

_ASKER, _ANSWERER = ("human", "user"), ("gpt", "assistant")


def read_chat(config: ChatConfig, *, pinned: str = "") -> Iterator[tuple[str, str]]:
    """Question and answer of every conversation that begins with them (after a system message).

    Raises:
        DataError: a file is missing or has no such column, or no conversation can be used.
    """
    used = 0
    for path in open_files(config, pinned=pinned):
        for number, conversation in enumerate(_conversations(path, config.column), start=1):
            pair = _first_pair(conversation, where=f"{path}: row {number}: {config.column}")
            if pair is not None:
                used += 1
                yield pair
    if not used:
        raise DataError(f"data.chat: no conversation of {config.path or config.hub} can be used")


def _conversations(path: Path, column: str) -> Iterator[Any]:
    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                if column not in file.schema_arrow.names:
                    raise DataError(
                        f"{path}: there is no column {column!r}; the columns are:"
                        f" {', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(batch_size=1024, columns=[column]):
                    yield from batch.column(column).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged Parquet file ({error}); fetch it again") from error
        return
    for line, record in read_objects(path):
        if not isinstance(record, dict) or column not in record:
            raise DataError(f"{path}:{line}: an object with {column!r} is needed")
        yield record[column]


def _first_pair(conversation: Any, *, where: str) -> tuple[str, str] | None:
    if not isinstance(conversation, list):
        raise DataError(f"{where}: a list of turns is needed, got {type(conversation).__name__}")
    turns = []
    for turn in conversation:
        if not isinstance(turn, dict):
            raise DataError(f"{where}: a turn must be an object, got {type(turn).__name__}")
        who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if who != "system":
            turns.append((who, str(text or "").strip()))
    match turns[:2]:
        case [(asker, question), (answerer, answer)] if (
            asker in _ASKER and answerer in _ANSWERER and question and answer
        ):
            return question, answer
    return None
