"""Read the two large records fast: 10,000 of them are collected while a person waits.

Decoding by annotations costs 1 to 10 ms a record, most of it for long lists of numbers. A
record in the usual form is built here directly; anything else (a key too many, a string where
a number belongs) goes to the decoder, which says exactly what is wrong.
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from baton.errors import DamagedError
from baton.eval.bootstrap import Floats
from baton.record import (
    SCHEMA,
    EvalRecord,
    GenerationFigures,
    PerSample,
    Sample,
    ScoreEntry,
    TrainingFigures,
    replace,
)

T = TypeVar("T")

# More points than a panel has pixels only cost time.
CURVE_POINTS = 300


class _Unusual(Exception):
    """Not what baton writes itself; the decoder must have a look."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """An eval record without its curves, and the curves as (points, 2): step, loss.

    The train curve is averaged over neighbouring points to at most `CURVE_POINTS`.
    """

    record: EvalRecord
    train_curve: Floats
    dev_curve: Floats


def read_eval_record(data: bytes, *, where: str, curves: bool = True) -> Read:
    """Decode and check one `eval.json`. Raises `DamagedError` or `NewerSchemaError`.

    Without `curves` they come back empty; they are most of a record's bytes and of its time.
    """
    if not curves:
        data = _without_curves(data)
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
        train, dev = _curve(values.get("loss_curve")), _curve(values.get("dev_curve"))
        record = _eval_record(values | {"loss_curve": [], "dev_curve": []})
    except (ValueError, AttributeError, TypeError, _Unusual):
        record = EvalRecord.from_json(data, where=where)
        train, dev = (
            _exact_curve(curve, where=f"{where}: {name}")
            for name, curve in (("loss_curve", record.loss_curve), ("dev_curve", record.dev_curve))
        )
        record = replace(record, loss_curve=[], dev_curve=[])
    return Read(record=record, train_curve=thinned(train), dev_curve=dev)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Scores of each test row as arrays: `rows` (n,), each of `scores` (n,), `bleu` (n, k)."""

    rows: npt.NDArray[np.int64]
    scores: dict[str, Floats]
    bleu: npt.NDArray[np.int64]


def read_per_sample(data: bytes, *, where: str) -> Rows:
    """Decode and check one `per_sample.json`. Raises `DamagedError` or `NewerSchemaError`."""
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
        if values["schema"] != SCHEMA:
            raise _Unusual
        read = Rows(
            rows=_integers(values["rows"], width=None),
            scores={column: _numbers(scores) for column, scores in values["scores"].items()},
            bleu=_integers(values["bleu_statistics"], width=10),
        )
    except (ValueError, KeyError, AttributeError, TypeError, _Unusual):
        PerSample.from_json(data, where=where)  # says what is wrong, if its types are
        raise DamagedError(f"{where}: its rows are not all of one length") from None
    for name, column in {**read.scores, "bleu_statistics": read.bleu}.items():
        if len(column) != len(read.rows) and not (name == "bleu_statistics" and not len(column)):
            raise DamagedError(
                f"{where}: {name} has {len(column)} values for {len(read.rows)} rows;"
                " it was damaged"
            )
    return read


def _without_curves(data: bytes) -> bytes:
    """Cut the curves out of a record as `Record.to_json` writes it; any other comes back whole.

    A line break followed by two blanks and a quote begins a key of the outermost object: in
    strings JSON has no line breaks, and inner objects stand further in.
    """
    start = data.find(b'\n  "loss_curve": [')
    end = data.find(b'\n  "samples": [', start)
    if start < 0 or end < 0 or data.count(b'\n  "', start, end) != 2:
        return data
    return data[:start] + b'\n  "loss_curve": [],\n  "dev_curve": [],' + data[end:]


def thinned(curve: Floats) -> Floats:
    """At most `CURVE_POINTS` points, each the mean of its neighbours."""
    if len(curve) <= CURVE_POINTS:
        return curve
    edges = np.linspace(0, len(curve), CURVE_POINTS + 1).astype(int)
    return np.add.reduceat(curve, edges[:-1]) / np.diff(edges)[:, None]


def _curve(rows: Any) -> Floats:
    if not rows and isinstance(rows, list):
        return np.empty((0, 2))
    array = np.asarray(rows)
    # kind: np.asarray would silently read strings and booleans as numbers.
    if array.dtype.kind not in "fi" or array.ndim != 2 or array.shape[1] != 2:
        raise _Unusual
    if not np.isfinite(array).all():
        raise _Unusual
    return array.astype(np.float64)


def _exact_curve(rows: list[list[float]], *, where: str) -> Floats:
    if any(len(row) != 2 for row in rows):
        raise DamagedError(f"{where}: every point must be [step, loss]; the record was damaged")
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _numbers(values: Any) -> Floats:
    array = np.asarray(values, dtype=None if values else np.float64)
    if array.dtype.kind not in "fi" or array.ndim != 1 or not np.isfinite(array).all():
        raise _Unusual
    return array.astype(np.float64)


def _integers(values: Any, *, width: int | None) -> npt.NDArray[np.int64]:
    if not values and isinstance(values, list):
        return np.empty((0,) if width is None else (0, width), dtype=np.int64)
    array = np.asarray(values)
    if array.dtype.kind != "i" or array.ndim != (1 if width is None else 2):
        raise _Unusual
    if width is not None and array.shape[1] != width:
        raise _Unusual
    return array.astype(np.int64)


def _eval_record(values: dict[str, Any]) -> EvalRecord:
    kinds = _kinds(EvalRecord)
    if values.keys() != kinds.keys() or values["schema"] != SCHEMA:
        raise _Unusual
    for name, kind in kinds.items():
        if kind and type(values[name]) not in kind:
            raise _Unusual
    for name in ("labels", "model", "environment"):
        if not all(type(text) is str for text in values[name].values()):
            raise _Unusual
    return EvalRecord(
        **values
        | {
            "scores": [_flat(ScoreEntry, score) for score in values["scores"]],
            "samples": [_flat(Sample, sample) for sample in values["samples"]],
            "training": _flat(TrainingFigures, values["training"]),
            "generation": _flat(GenerationFigures, values["generation"]),
        }
    )


def _flat(cls: type[T], values: Any) -> T:
    """A dataclass whose fields are all text or numbers."""
    if type(values) is not dict:
        raise _Unusual
    floats = _floats_of((cls, *values, *map(type, values.values())))
    if floats is None or not all(math.isfinite(values[name]) for name in floats):
        raise _Unusual
    return cls(**values)


@functools.lru_cache(maxsize=1000)
def _floats_of(signature: tuple[Any, ...]) -> list[str] | None:
    """Which fields are floats, if these names and types (one half each) are those of the class.

    Thousands of records have the same few signatures, so this is looked up and not computed.
    """
    cls, rest = signature[0], signature[1:]
    names, found = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    kinds = _kinds(cls)
    if set(names) != kinds.keys():
        return None
    if any(kind not in kinds[name] for name, kind in zip(names, found, strict=True)):
        return None
    return [name for name, kind in zip(names, found, strict=True) if kind is float]


@functools.cache
def _kinds(cls: Hashable) -> dict[str, tuple[type, ...]]:
    """For each field the types its JSON value may have; none for what is checked elsewhere."""
    kinds: dict[str, tuple[type, ...]] = {}
    for name, hint in typing.get_type_hints(cls).items():
        union = isinstance(hint, types.UnionType)
        members = typing.get_args(hint) if union else (typing.get_origin(hint) or hint,)
        plain = all(member in (str, int, float, types.NoneType, list, dict) for member in members)
        kinds[name] = tuple(members) if plain else ()
    return kinds


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
