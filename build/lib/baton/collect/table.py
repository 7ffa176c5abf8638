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
    """Cost and size; every name carries its unit."""
    training = record.training if record else None
    generation = record.generation if record else None
    return {
        "train_start_utc": training and training.started,
        "train_end_utc": training and training.ended,
        "train_seconds": training and training.seconds,
        "legs": training and training.legs,
        "steps": training and training.steps,
        "best_step": training and training.best_step,
        "dev_loss": training and training.dev_loss,
        "train_samples": training and training.samples,
        "train_tokens": training and training.tokens,
        "train_tokens_per_s": training and training.tokens_per_s,
        "train_samples_per_s": training and training.samples_per_s,
        "train_peak_gpu_memory_gib": training and _in(GIB, training.peak_gpu_memory_bytes),
        "trainable_parameters": training and training.trainable_parameters,
        "total_parameters": training and training.total_parameters,
        "adapter_mib": training and _in(MIB, training.adapter_bytes),
        "generation_seconds": generation and generation.seconds,
        "generation_samples": generation and generation.samples,
        "generation_new_tokens": generation and generation.new_tokens,
        "generation_samples_per_s": generation and generation.samples_per_s,
        "generation_new_tokens_per_s": generation and generation.new_tokens_per_s,
        "generation_peak_gpu_memory_gib": generation and _in(GIB, generation.peak_gpu_memory_bytes),
        "decoding": generation and generation.decoding,
        "max_new_tokens": generation and generation.max_new_tokens,
        "generation_batch_size": generation and generation.batch_size,
        "n": record.scores[0].n if record and record.scores else None,
    }


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


def _in(unit: int, size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / unit


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)
