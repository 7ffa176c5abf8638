"""Which task is better, and can the test rows tell? Best values, and paired comparisons."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from baton.collect.axes import Axis, Matrix
from baton.collect.gather import Result
from baton.collect.quick import Rows, read_per_sample
from baton.errors import BatonError, DataError
from baton.eval.bleu import bleu_of_sums, corpus_bleu
from baton.eval.bootstrap import RESAMPLES, Floats, Interval, percentiles, resampled_sums
from baton.record import ScoreEntry
from baton.store.base import Store

# A page of 24 pairs is more than anybody reads; each costs a bootstrap of all its scores.
PAIRS = 24
SEED = 0

NO_DIFFERENCE = "no difference can be claimed"


def is_comparable(a: ScoreEntry, b: ScoreEntry) -> bool:
    """Were both counted in the same way?"""
    return (a.name, a.tokenizer, a.library, a.convention, a.scale) == (
        b.name,
        b.tokenizer,
        b.library,
        b.convention,
        b.scale,
    )


def higher_is_better(entries: Sequence[ScoreEntry]) -> bool:
    """`scale` is the best possible value: scores below it should rise, others should fall."""
    return any(entry.value < entry.scale for entry in entries)


def marks(entries: Sequence[ScoreEntry | None]) -> list[str]:
    """For one score of several tasks: `best`, `near` (its interval meets the best's) or nothing.

    Nothing is marked where there is nothing to compare: fewer than two values, or values
    counted in different ways.
    """
    present = [entry for entry in entries if entry is not None]
    nothing = [""] * len(entries)
    if len(present) < 2 or not all(is_comparable(present[0], entry) for entry in present):
        return nothing
    choose = max if higher_is_better(present) else min
    best = choose(present, key=lambda entry: entry.value)
    return [
        ""
        if entry is None
        else "best"
        if entry.value == best.value
        else "near"
        if entry.low <= best.high and entry.high >= best.low
        else ""
        for entry in entries
    ]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two tasks that differ in one label alone; `at` is what they share."""

    a: Result
    b: Result
    axis: str
    at: dict[str, str]

    @property
    def title(self) -> str:
        return f"{self.a.task.labels[self.axis]} − {self.b.task.labels[self.axis]}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score of `pair.a` minus that of `pair.b` over the same `rows` test rows."""

    pair: Pair
    entry: ScoreEntry
    interval: Interval
    rows: int
    higher_is_better: bool

    @property
    def is_decided(self) -> bool:
        """One test row cannot vary, so its interval is unknown, not narrow."""
        return self.rows > 1 and self.interval.excludes_zero

    @property
    def verdict(self) -> str:
        """What may be said at 95 %; an interval that touches zero claims nothing."""
        if not self.is_decided:
            return NO_DIFFERENCE
        a_wins = (self.interval.mean > 0) == self.higher_is_better
        return f"{(self.pair.a if a_wins else self.pair.b).name} is better"


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Differences in the order of pairs and scores, pairs that cannot be compared and why.

    `left_out` counts the pairs beyond the first `PAIRS`.
    """

    differences: list[Difference]
    refused: list[tuple[Pair, str]]
    left_out: int


def paired_comparisons(store: Store, matrix: Matrix, results: Sequence[Result]) -> Comparisons:
    """Compare tasks that differ in one label: choices with each other, numbers with the next.

    Reads `per_sample.json` of the tasks compared; a missing or damaged one costs its pairs only.
    """

    # Neighbouring pairs share tasks; a large test split makes each of these tens of MB.
    @functools.lru_cache(maxsize=16)
    def rows_of(task: str) -> Rows | str:
        name = f"tasks/{task}/eval/per_sample.json"
        try:
            return read_per_sample(store.read(name), where=name)
        except BatonError as error:
            return " ".join(str(error).split())

    pairs, count = _pairs(matrix, [result for result in results if result.record])
    differences: list[Difference] = []
    refused = []
    for pair in pairs:
        try:
            differences += _differences(pair, rows_of)
        except DataError as error:
            refused.append((pair, str(error)))
    return Comparisons(differences=differences, refused=refused, left_out=count - len(pairs))


def _pairs(matrix: Matrix, results: Sequence[Result]) -> tuple[list[Pair], int]:
    """The first `PAIRS` pairs, choices before numbers, and how many there are in all."""
    pairs: list[Pair] = []
    count = 0
    # A sort by False, True keeps the order of the plan among axes of one kind.
    for axis in sorted(matrix.axes, key=lambda axis: axis.values is not None):
        for group in _groups(axis, results):
            steps = axis.values is not None
            count += len(group) - 1 if steps else math.comb(len(group), 2)
            chosen = itertools.pairwise(group) if steps else itertools.combinations(group, 2)
            for first, second in itertools.islice(chosen, PAIRS - len(pairs)):
                # More data minus less, so that a gain is positive.
                a, b = (second, first) if steps else (first, second)
                at = {name: text for name, text in a.task.labels.items() if name != axis.name}
                pairs.append(Pair(a=a, b=b, axis=axis.name, at=at))
    return pairs, count


def _groups(axis: Axis, results: Sequence[Result]) -> Iterator[list[Result]]:
    """Tasks that agree in every label but this axis's, in the order of its labels."""
    order = {label: index for index, label in enumerate(axis.labels)}
    groups: dict[tuple[tuple[str, str], ...], dict[str, Result]] = {}
    for result in results:
        labels = result.task.labels
        if axis.name in labels:
            rest = tuple(sorted(item for item in labels.items() if item[0] != axis.name))
            groups.setdefault(rest, {}).setdefault(labels[axis.name], result)
    for group in groups.values():
        yield [group[label] for label in sorted(group, key=order.__getitem__)]


def _differences(pair: Pair, rows_of: Callable[[str], Rows | str]) -> list[Difference]:
    """All scores that both tasks have, each with the interval of one shared set of draws."""
    assert pair.a.record is not None  # pairs are made of results only
    assert pair.b.record is not None
    a, b = _common_rows(pair, rows_of)
    theirs = {entry.column: entry for entry in pair.b.record.scores}
    entries = [
        entry
        for entry in pair.a.record.scores
        if entry.column in theirs and is_comparable(entry, theirs[entry.column])
    ]
    means = [entry for entry in entries if entry.column in a.scores and entry.column in b.scores]
    has_statistics = len(a.bleu) > 0 and len(b.bleu) > 0
    corpus = [
        entry
        for entry in entries
        if has_statistics and entry.library == "sacrebleu" and entry.column not in a.scores
    ]
    if not means and not corpus:
        raise DataError("the two tasks have no score of the same name and convention in common")
    intervals = _intervals(a, b, [entry.column for entry in means], with_bleu=bool(corpus))
    return [
        Difference(
            pair=pair,
            entry=entry,
            interval=interval,
            rows=len(a.rows),
            higher_is_better=higher_is_better([entry, theirs[entry.column]]),
        )
        for entry, interval in zip([*means, *corpus[:1]], intervals, strict=True)
    ]


def _intervals(a: Rows, b: Rows, columns: Sequence[str], *, with_bleu: bool) -> list[Interval]:
    """As `paired_difference` of each column and `paired_corpus_bleu_difference`, in one pass."""
    n, k = len(a.rows), len(columns)
    differences: Floats = np.empty((n, k))
    for index, column in enumerate(columns):
        differences[:, index] = a.scores[column] - b.scores[column]
    means = differences.mean(axis=0)
    parts = [differences - means]
    if with_bleu:
        parts += [a.bleu.astype(np.float64), b.bleu.astype(np.float64)]
    everything = np.concatenate(parts, axis=1)
    sums = resampled_sums(everything, seed=SEED, resamples=RESAMPLES)
    intervals = []
    for index, mean in enumerate(means.tolist()):
        low, high = percentiles(sums[:, index] / n, level=0.95)
        intervals.append(Interval(mean=mean, low=mean + low, high=mean + high))
    if with_bleu:
        width = a.bleu.shape[1]
        drawn = bleu_of_sums(sums[:, k : k + width]) - bleu_of_sums(sums[:, k + width :])
        low, high = percentiles(drawn, level=0.95)
        mean = corpus_bleu(a.bleu) - corpus_bleu(b.bleu)
        intervals.append(Interval(mean=mean, low=low, high=high))
    return intervals


def _common_rows(pair: Pair, rows_of: Callable[[str], Rows | str]) -> tuple[Rows, Rows]:
    """Both tasks' scores on the test rows that both have, in one order."""
    found = [rows_of(result.name) for result in (pair.a, pair.b)]
    for problem in found:
        if isinstance(problem, str):
            raise DataError(problem)
    a, b = (rows for rows in found if isinstance(rows, Rows))
    rows, in_a, in_b = np.intersect1d(a.rows, b.rows, return_indices=True)
    if not len(rows):
        raise DataError("the two tasks were tested on different rows")
    if len(rows) == len(a.rows) == len(b.rows):
        _refuse_other_questions(pair)
    if np.array_equal(a.rows, b.rows):
        return a, b
    return _taken(a, in_a), _taken(b, in_b)


def _refuse_other_questions(pair: Pair) -> None:
    """Equal row numbers of two data sets are not the same questions."""
    references = [
        [sample.reference for sample in result.record.samples]
        for result in (pair.a, pair.b)
        if result.record
    ]
    shared = min(map(len, references))
    if references[0][:shared] != references[1][:shared]:
        raise DataError("the two tasks were tested on different questions")


def _taken(rows: Rows, index: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Rows:
    return Rows(
        rows=rows.rows[index],
        scores={column: values[index] for column, values in rows.scores.items()},
        bleu=rows.bleu[index] if len(rows.bleu) else rows.bleu,
    )
