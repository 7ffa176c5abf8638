"""Score generated answers against references: every convention, each named with its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from baton.errors import DataError
from baton.eval import bleu, rouge
from baton.eval.bootstrap import LEVEL, RESAMPLES, Floats, Interval, bootstrap_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a test set, and everything needed to compare it with somebody else's."""

    column: str  # stable name in CSV files: rouge_1_jieba
    name: str  # the metric: rouge1
    tokenizer: str  # jieba | char | zh
    library: str  # whose counting: rouge_score | rouge_chinese | sacrebleu | nltk method1 …
    convention: str  # the rest of it in words, or sacrebleu's signature
    scale: int  # the best possible value: 1 or 100
    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(
        cls,
        interval: Interval,
        *,
        n: int,
        column: str,
        name: str,
        convention: str,
        tokenizer: str = "",
        library: str = "",
        scale: int = 1,
    ) -> Score:
        """The score whose value and bounds are an interval's; `n` counts what it is a mean of."""
        return cls(
            column=column,
            name=name,
            tokenizer=tokenizer,
            library=library,
            convention=convention,
            scale=scale,
            value=interval.mean,
            low=interval.low,
            high=interval.high,
            n=n,
        )

    @property
    def key(self) -> str:
        """The name for people: `rouge1[jieba, rouge_score]`."""
        return f"{self.name}[{self.tokenizer}, {self.library}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSheet:
    """All scores of one test set, and what a paired comparison with another run needs.

    `per_sample` has one float a row for every column that is a mean over samples. Corpus BLEU
    is not one: its rows are in `bleu_statistics` (n, 10), for `paired_corpus_bleu_difference`.
    Either may be empty: then there is nothing to compare row by row.
    """

    scores: list[Score]
    per_sample: dict[str, Floats] = dataclasses.field(default_factory=dict)
    bleu_statistics: bleu.Statistics = dataclasses.field(
        default_factory=lambda: np.zeros((0, 10), dtype=np.int64)
    )
    seed: int
    resamples: int
    level: float = LEVEL

    def score(self, column: str) -> Score:
        """The score of one column; KeyError if there is none of that name."""
        return {score.column: score for score in self.scores}[column]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a column means, before there are numbers."""

    column: str
    name: str
    tokenizer: str
    library: str
    convention: str
    scale: int = 1


def _rouge_kinds(suffix: str, tokenizer: str, library: str, convention: str) -> list[_Kind]:
    return [
        _Kind(
            column=f"rouge_{order}_{suffix}",
            name=f"rouge{order.upper()}",
            tokenizer=tokenizer,
            library=library,
            convention=convention,
        )
        for order in ("1", "2", "l")
    ]


_MEANS = [
    *_rouge_kinds(
        "jieba", "jieba", "rouge_score", "F1, n-grams with multiplicity; punctuation and case kept"
    ),
    *_rouge_kinds(
        "char",
        "char",
        "rouge_score",
        "F1, n-grams with multiplicity; lower case, Latin runs whole, punctuation dropped",
    ),
    *_rouge_kinds(
        "jieba_set",
        "jieba",
        "rouge_chinese",
        "F1, n-grams as sets; punctuation and case kept; LLaMA-Factory",
    ),
    _Kind(
        column="bleu_4_jieba_method1",
        name="bleu4",
        tokenizer="jieba",
        library="nltk method1",
        convention="mean of sentence BLEU; punctuation, case and white space kept",
    ),
    _Kind(
        column="bleu_4_char_method3",
        name="bleu4",
        tokenizer="char",
        library="nltk method3",
        convention="mean of sentence BLEU x100; every character kept; LLaMA-Factory",
        scale=100,
    ),
]


def score_pairs(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> ScoreSheet:
    """Score each prediction against the reference of the same row, in every convention.

    An empty prediction is a row that scores 0, never a row left out. `seed` draws the
    bootstrap samples only; the values do not depend on it.
    Raises DataError for no rows, or for lists of different lengths.
    """
    if len(predictions) != len(references):
        raise DataError(
            f"every prediction needs one reference, got {len(predictions)} predictions "
            f"and {len(references)} references"
        )
    if not predictions:
        raise DataError("nothing to score: the test set is empty (see max_samples and the split)")

    rows = [_score_pair(*pair) for pair in zip(predictions, references, strict=True)]
    per_sample = {
        kind.column: column
        for kind, column in zip(_MEANS, np.array(rows, dtype=np.float64).T.copy(), strict=True)
    }
    scores = [
        _labelled(
            kind,
            bootstrap_mean(per_sample[kind.column], seed=seed, resamples=resamples, level=level),
            n=len(rows),
        )
        for kind in _MEANS
    ]

    statistics = bleu.zh_statistics(predictions, references)
    corpus = _Kind(
        column="bleu_4_zh",
        name="bleu4",
        tokenizer="zh",
        library="sacrebleu",
        convention=f"corpus BLEU; {bleu.signature()}",
        scale=100,
    )
    interval = bleu.corpus_bleu_interval(statistics, seed=seed, resamples=resamples, level=level)
    scores.append(_labelled(corpus, interval, n=len(rows)))
    return ScoreSheet(
        scores=scores,
        per_sample=per_sample,
        bleu_statistics=statistics,
        seed=seed,
        resamples=resamples,
        level=level,
    )


def char_bleu(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Score:
    """Corpus BLEU-4 over characters with the standard brevity penalty, 0..100."""
    statistics = bleu.char_statistics(predictions, references)
    kind = _Kind(
        column="bleu_4_char",
        name="bleu4",
        tokenizer="char",
        library="sacrebleu",
        convention=f"corpus BLEU; {bleu.signature('char')}",
        scale=100,
    )
    interval = bleu.corpus_bleu_interval(statistics, seed=seed, resamples=resamples, level=level)
    return _labelled(kind, interval, n=len(predictions))


def _score_pair(prediction: str, reference: str) -> list[float]:
    """The numbers of one row, in the order of `_MEANS`."""
    # jieba is the expensive step: each text is cut once, for four conventions.
    our_words, their_words = rouge.jieba_tokens(prediction), rouge.jieba_tokens(reference)
    rouges = [
        rouge.rouge_score_f(our_words, their_words),
        rouge.rouge_score_f(rouge.characters(prediction), rouge.characters(reference)),
        rouge.rouge_chinese_f(our_words, their_words),
    ]
    return [
        *(f for three in rouges for f in (three.rouge_1, three.rouge_2, three.rouge_l)),
        bleu.nltk_method1(our_words, their_words),
        bleu.nltk_method3(list(prediction), list(reference)),
    ]


def _labelled(kind: _Kind, interval: Interval, *, n: int) -> Score:
    return Score.of(interval, n=n, **dataclasses.asdict(kind))
