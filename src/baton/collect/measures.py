"""What the plots and the overview show of a task: a few scores, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.collect.gather import Result
from baton.collect.table import GIB, score_columns
from baton.record import EvalRecord, ScoreEntry

# Shown first where a record has them: one of words and one of the whole corpus.
_PREFERRED = ("rouge_l_jieba", "bleu_4_zh")
MAIN_SCORES = 3


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number, with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a task: what it is called, its unit, and how to find it in a record."""

    title: str
    unit: str
    of: Callable[[EvalRecord], Value | None]
    from_zero: bool = True

    def find(self, result: Result) -> Value | None:
        return self.of(result.record) if result.record else None


def main_scores(results: Sequence[Result]) -> list[ScoreEntry]:
    """The few scores to show where there is no room for all: one of each kind of metric."""
    columns = score_columns(results)
    chosen = [columns[name] for name in _PREFERRED if name in columns]
    for entry in columns.values():
        if len(chosen) == MAIN_SCORES:
            break
        if all(_family(entry) != _family(other) for other in chosen):
            chosen.append(entry)
    return chosen


def measures(results: Sequence[Result]) -> list[Measure]:
    """Scores first, then dev loss and cost; those that no task has are left out."""
    seconds = [r.record.training.seconds for r in results if r.record]
    every = [*map(_score, main_scores(results)), _DEV_LOSS, _time(seconds), _MEMORY, _SPEED]
    return [measure for measure in every if any(measure.find(result) for result in results)]


def label(entry: ScoreEntry) -> str:
    """A score with its tokenizer and library, without which it cannot be compared."""
    made_by = ", ".join(filter(None, (entry.tokenizer, entry.library)))
    return f"{entry.name} [{made_by}]" if made_by else entry.name


def _family(entry: ScoreEntry) -> str:
    """`rouge1`, `rougeL` and `rouge_l_jieba` are of one family, `rouge`."""
    return entry.column.split("_")[0].rstrip("0123456789").lower()


def _score(entry: ScoreEntry) -> Measure:
    def of(record: EvalRecord) -> Value | None:
        for score in record.scores:
            if score.column == entry.column:
                return Value(value=score.value, low=score.low, high=score.high)
        return None

    unit = f"score (best: {entry.scale:g})"
    return Measure(title=label(entry), unit=unit, of=of, from_zero=False)


def _optional(value: float | None) -> Value | None:
    return None if value is None else Value(value=value)


def _memory(record: EvalRecord) -> Value | None:
    size = record.training.peak_gpu_memory_bytes
    return _optional(None if size is None else size / GIB)


def _time(seconds: Sequence[float]) -> Measure:
    longest = max(seconds, default=0)
    choices = (("hours", 3600, 5400), ("minutes", 60, 120), ("seconds", 1, 0))
    unit, per = next((unit, per) for unit, per, least in choices if longest >= least)
    return Measure(
        title="training time", unit=unit, of=lambda r: Value(value=r.training.seconds / per)
    )


_DEV_LOSS = Measure(
    title="dev loss (lower is better)",
    unit="dev loss",
    of=lambda record: _optional(record.training.dev_loss),
    from_zero=False,
)
_MEMORY = Measure(title="peak GPU memory, training", unit="GiB", of=_memory)
_SPEED = Measure(
    title="training throughput",
    unit="tokens/s",
    of=lambda record: Value(value=record.training.tokens_per_s),
)
