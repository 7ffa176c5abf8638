"""`results_summary.csv`: one row a task, in plan order, whether or not it has a result."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from baton.collect.gather import Result
from baton.record import EvalRecord, Plan, ScoreEntry

Cell = str | int | float | None
Row = dict[str, Cell]

GIB = 2**30
MIB = 2**20


# Where each figure is found: column name with its unit, attribute of the record, divisor.
_TRAINING: list[tuple[str, str, int]] = [
    ("train_start_utc", "started", 1),
    ("train_end_utc", "ended", 1),
    ("train_seconds", "seconds", 1),
    ("legs", "legs", 1),
    ("steps", "steps", 1),
    ("best_step", "best_step", 1),
    ("dev_loss", "dev_loss", 1),
    ("train_samples", "samples", 1),
    ("train_tokens", "tokens", 1),
    ("train_tokens_per_s", "tokens_per_s", 1),
    ("train_samples_per_s", "samples_per_s", 1),
    ("train_peak_gpu_memory_gib", "peak_gpu_memory_bytes", GIB),
    ("trainable_parameters", "trainable_parameters", 1),
    ("total_parameters", "total_parameters", 1),
    ("adapter_mib", "adapter_bytes", MIB),
]
_GENERATION: list[tuple[str, str, int]] = [
    ("generation_seconds", "seconds", 1),
    ("generation_samples", "samples", 1),
    ("generation_new_tokens", "new_tokens", 1),
    ("generation_samples_per_s", "samples_per_s", 1),
    ("generation_new_tokens_per_s", "new_tokens_per_s", 1),
    ("generation_peak_gpu_memory_gib", "peak_gpu_memory_bytes", GIB),
    ("decoding", "decoding", 1),
    ("max_new_tokens", "max_new_tokens", 1),
    ("generation_batch_size", "batch_size", 1),
]


def summary_rows(plan: Plan, results: Sequence[Result]) -> list[Row]:
    """One dict a task, all with the same keys. None is unknown or missing, never zero.

    `notice` is the first column if any task has one: a comment line above the header would
    break whoever reads the file as CSV.
    """
    axes = list(dict.fromkeys(name for result in results for name in result.task.labels))
    scores = score_columns(results)
    named = _named(axes, scores)
    rows = []
    for result in results:
        record = result.record
        row: Row = {"notice": record.notice if record else plan.notice, "task": result.name}
        row |= {named[f"axis {axis}"]: result.task.labels.get(axis) for axis in axes}
        row |= {"state": result.state, "reason": result.reason or None}
        entries = {score.column: score for score in record.scores} if record else {}
        for column in scores:
            entry, name = entries.get(column), named[f"score {column}"]
            row[name] = entry.value if entry else None
            row[f"{name}_low"] = entry.low if entry else None
            row[f"{name}_high"] = entry.high if entry else None
        rows.append(row | _figures(record))
    if not any(row["notice"] for row in rows):
        for row in rows:
            del row["notice"]
    return rows


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """The rows as UTF-8 CSV: six significant digits, an empty cell for None, LF line ends."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
        writer.writerows([_text(cell) for cell in row.values()] for row in rows)
    return text.getvalue().encode()


def score_columns(results: Sequence[Result]) -> dict[str, ScoreEntry]:
    """Every score column of any task, in the order of first appearance, with an example."""
    columns: dict[str, ScoreEntry] = {}
    for result in results:
        for score in result.record.scores if result.record else []:
            columns.setdefault(score.column, score)
    return columns


def _figures(record: EvalRecord | None) -> Row:
    """Cost and size of one task; every cell is None without a record."""
    row: Row = {}
    for figures, columns in (
        (record and record.training, _TRAINING),
        (record and record.generation, _GENERATION),
    ):
        for column, name, unit in columns:
            value = getattr(figures, name, None)
            row[column] = value if value is None or unit == 1 else value / unit
    row["n"] = record.scores[0].n if record and record.scores else None
    return row


def _named(axes: Sequence[str], scores: Sequence[str] | dict[str, ScoreEntry]) -> dict[str, str]:
    """Column names of axes and scores; one that is taken already gets its kind in front."""
    taken = {"notice", "task", "state", "reason", *_figures(None)}
    named = {}
    for kind, names in (("axis", axes), ("score", scores)):
        for name in names:
            column = name
            while {column, f"{column}_low", f"{column}_high"} & taken:
                column = f"{kind}_{column}"
            taken |= {column} if kind == "axis" else {column, f"{column}_low", f"{column}_high"}
            named[f"{kind} {name}"] = column
    return named


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)
