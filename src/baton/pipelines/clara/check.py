"""What files of rows hold, their mistakes, and what would make a poor model; and their split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.data.json_lines import JsonLines
from baton.data.json_rows import read_objects
from baton.data.split import split
from baton.errors import DataError
from baton.pipelines.clara.rows import AskRow, SayRow, examine_ask, examine_say

# The guide's least numbers of rows.
LEAST_ROWS = {"stage1": 100, "stage2": 50, "stage3": 50}
# So many characters a token, at most, in any language we know: longer documents will be cut.
_CHARS_A_TOKEN = 6


@dataclass
class Findings:
    """Mistakes make a file unusable; notes are about rows that would teach badly."""

    stage: str
    rows: int = 0
    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    summary: str = ""


def stage_of(path: Path) -> str:
    """Which stage the first row of a file is for: stage 1 names its kind; others are stage 3."""
    for _, record in read_objects(path):
        return "stage1" if isinstance(record, dict) and "data_type" in record else "stage3"
    raise DataError(f"{path}: holds no rows")


def check(path: Path, *, stage: str, top_k: int, doc_max_length: int) -> Findings:
    """Read every row as a stage would."""
    found = Findings(stage)
    rows: list[SayRow] | list[AskRow]
    if stage == "stage1":
        rows, found.mistakes = examine_say(path)
        kinds = Counter(row.kind for row in rows)
        pairs = sum(len(row.questions) for row in rows)
        found.summary = (
            f"{len(rows):,} rows of stage 1: {kinds['qa']:,} qa with {pairs:,} pairs,"
            f" {kinds['paraphrase']:,} paraphrases"
        )
    else:
        most = top_k if stage == "stage2" else None
        rows, found.mistakes = examine_ask(path, least=top_k, most=most)
        counts = sorted({len(row.documents) for row in rows})
        without = sum(not row.positives for row in rows)
        spread = f"{counts[0]} to {counts[-1]}" if counts else "no"
        found.summary = (
            f"{len(rows):,} rows of stage {stage[-1]}: {spread} documents a row,"
            f" {without:,} rows without pos_index"
        )
        twice = Counter(row.question for row in rows)
        found.notes += [
            f"{path}: {count} rows ask {question!r}"
            for question, count in twice.items()
            if count > 1
        ]
        if without == len(rows) and rows:
            found.notes.append(f"{path}: no row has pos_index, so recall cannot be measured")
    found.rows = len(rows)
    if len(rows) < LEAST_ROWS[stage]:
        found.notes.append(
            f"{path}: {len(rows)} rows are fewer than the {LEAST_ROWS[stage]} that the guide"
            f" recommends for stage {stage[-1]}"
        )
    limit = _CHARS_A_TOKEN * doc_max_length
    for row in rows:
        for document in row.documents:
            if len(document) > limit:
                found.notes.append(
                    f"{path}:{row.line}: a document of {len(document):,} characters is more than"
                    f" {doc_max_length} tokens; what is beyond is not read"
                )
    return found


def split_file(path: Path, out: Path, *, held_out: float, seed: int) -> tuple[int, int]:
    """Write `train.jsonl` and `held_out.jsonl` of a file's rows below `out`; returns their numbers.

    The rows that a task with the same seed would hold out of the whole file.

    Raises:
        DataError: there are too few rows, or one is not JSON.
    """
    records: list[Any] = []
    for line, record in read_objects(path):
        if not isinstance(record, dict):
            raise DataError(f"{path}:{line}: not a JSON object; run baton data clara check")
        records.append(record)
    try:
        parts = split(len(records), seed=seed, shares=(1 - held_out, held_out / 2, held_out / 2))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    held = {*parts.dev.tolist(), *parts.test.tolist()}
    with JsonLines(out / "train.jsonl") as train, JsonLines(out / "held_out.jsonl") as rest:
        for number, record in enumerate(records):
            (rest if number in held else train).write(record)
    return train.count, rest.count
