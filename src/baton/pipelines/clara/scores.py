"""EM, F1 and cover-EM of short answers as the reference scores them, and in Chinese; recall@k."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from baton.eval.bootstrap import bootstrap_mean
from baton.eval.rouge import characters
from baton.eval.score import Score, ScoreSheet

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = frozenset({"yes", "no", "noanswer"})

Tokens = Callable[[str], list[str]]


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces; exactly True reads yes."""
    if text == "True":
        text = "yes"
    elif text == "False":
        text = "no"
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def english(text: str) -> list[str]:
    """Words of a normalised answer."""
    return normalise(text).split()


def chinese(text: str) -> list[str]:
    """Characters (Latin words whole), full-width punctuation and articles gone."""
    return [token for token in characters(text) if token not in ("a", "an", "the")]


def exact_match(prediction: str, gold: str, tokens: Tokens = english) -> float:
    """1.0 where both have the same tokens in the same order; two empty answers match."""
    return float(tokens(prediction) == tokens(gold))


def f1(prediction: str, gold: str, tokens: Tokens = english) -> float:
    """Harmonic mean of precision and recall over tokens; 0 where nothing is shared.

    Also 0 where either side is yes, no or noanswer and the other is not the same.
    """
    ours, theirs = tokens(prediction), tokens(gold)
    if ours != theirs and any(" ".join(side) in _CLOSED for side in (ours, theirs)):
        return 0.0
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def cover_match(prediction: str, gold: str, tokens: Tokens = english) -> float:
    """1.0 where every gold token occurs in the prediction, as often as in the gold."""
    return float(not Counter(tokens(gold)) - Counter(tokens(prediction)))


def recall(chosen: Sequence[int], positives: Sequence[int]) -> float:
    """Share of the supporting documents that are among those that were chosen."""
    return len(set(chosen) & set(positives)) / len(positives)


_METRICS: Mapping[str, tuple[str, Callable[[str, str, Tokens], float]]] = {
    "f1": ("F1", f1),
    "cover_em": ("cover-EM", cover_match),
    "exact_match": ("EM", exact_match),
}


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer of one system; `chosen` is None where nothing was chosen."""

    prediction: str
    golds: Sequence[str]
    chosen: Sequence[int] | None = None
    positives: Sequence[int] | None = None


@dataclass(frozen=True)
class _Kind:
    """A way to compare with golds: which of them, and what counts as a token."""

    suffix: str
    tokenizer: str
    library: str
    convention: str
    tokens: Tokens
    every_gold: bool


_KINDS = (
    _Kind("", "words", "reference", "first gold only", english, every_gold=False),
    _Kind("_best", "words", "", "best over all golds", english, every_gold=True),
    _Kind("_zh", "char", "", "best over all golds, Chinese by character", chinese, every_gold=True),
)


def score_systems(
    systems: Mapping[str, Sequence[Answered]], *, seed: int, resamples: int
) -> ScoreSheet:
    """Every score of every system; those of the trained one, `clara`, have plain names."""
    scores: list[Score] = []
    for system, rows in systems.items():
        ending, name = ("", "") if system == "clara" else (f"_{system}", f" ({system})")
        for position, kind in enumerate(_KINDS):
            for column, (label, measure) in _METRICS.items():
                if position == 0 and column == "exact_match":
                    # Among the first, which plots show.
                    scores += _recall(rows, seed, resamples)
                values = [_value(row, kind, measure) for row in rows]
                scores.append(
                    Score.of(
                        bootstrap_mean(values, seed=seed, resamples=resamples),
                        n=len(values),
                        column=f"{column}{kind.suffix}{ending}",
                        name=f"{label}{name}",
                        tokenizer=kind.tokenizer,
                        library=kind.library,
                        convention=kind.convention,
                    )
                )
    return ScoreSheet(scores=scores, seed=seed, resamples=resamples)


def _recall(rows: Sequence[Answered], seed: int, resamples: int) -> list[Score]:
    known = [row for row in rows if row.chosen is not None and row.positives]
    if not known:
        return []
    without = len(rows) - len(known)
    values = [recall(row.chosen or (), row.positives or ()) for row in known]
    k = max(len(row.chosen or ()) for row in known)
    convention = (
        f"share of pos_index among the {k} chosen; {without} rows without positives left out"
    )
    return [
        Score.of(
            bootstrap_mean(values, seed=seed, resamples=resamples),
            n=len(values),
            column="recall_at_k",
            name=f"recall@{k}",
            convention=convention,
        )
    ]


def _value(row: Answered, kind: _Kind, measure: Callable[[str, str, Tokens], float]) -> float:
    golds = row.golds if kind.every_gold else row.golds[:1]
    return max(measure(row.prediction, gold, kind.tokens) for gold in golds)
