"""BLEU-4 on Chinese text in four conventions, which differ by a factor of six on one pair.

`zh_statistics` + `corpus_bleu`  sacrebleu, tokenize="zh", one score for the whole corpus, 0..100
`char_statistics`                the same with every character a token
`nltk_method1`                   mean over samples of NLTK sentence BLEU, smoothing method 1, 0..1
`nltk_method3`                   the same with method 3, x 100, 0..100: LLaMA-Factory, ms-swift

Papineni et al. (ACL 2002); Post, *A Call for Clarity in Reporting BLEU Scores* (WMT 2018);
smoothing methods: Chen and Cherry (WMT 2014).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.errors import DataError
from baton.eval.bootstrap import LEVEL, RESAMPLES, Floats, Interval, percentiles, resampled_sums

# One row a sample, int64: what corpus BLEU needs, and all that it needs.
# prediction length, reference length, clipped matches of 1..4-grams, 1..4-grams in the prediction
Statistics = npt.NDArray[np.int64]
_COLUMNS = 10
_MATCHES = slice(2, 6)
_TOTALS = slice(6, 10)


def zh_statistics(predictions: Sequence[str], references: Sequence[str]) -> Statistics:
    """sacrebleu's sufficient statistics of each pair, shape (n, 10), with tokenize="zh"."""
    return _statistics(predictions, references, tokenize="zh")


def char_statistics(predictions: Sequence[str], references: Sequence[str]) -> Statistics:
    """The same with every character a token, Latin letters included: shape (n, 10)."""
    return _statistics(predictions, references, tokenize="char")


def _statistics(
    predictions: Sequence[str], references: Sequence[str], *, tokenize: str
) -> Statistics:
    # effective_order touches the sentence score alone (unused here) and silences a warning.
    metric = _sacrebleu().BLEU(tokenize=tokenize, effective_order=True)
    rows = np.zeros((len(predictions), _COLUMNS), dtype=np.int64)
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        pair = metric.sentence_score(prediction, [reference])
        row[:] = [pair.sys_len, pair.ref_len, *pair.counts, *pair.totals]
    return rows


def corpus_bleu(statistics: Statistics) -> float:
    """Corpus BLEU-4, 0..100: the same number as `sacrebleu.corpus_bleu(..., tokenize="zh")`."""
    _refuse_empty(statistics)
    predicted, wanted, *counts = statistics.sum(axis=0).tolist()
    score = _sacrebleu().BLEU.compute_bleu(
        counts[:4], counts[4:], predicted, wanted, smooth_method="exp"
    )
    return float(score.score)


def corpus_bleu_interval(
    statistics: Statistics, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """Corpus BLEU-4 with its bootstrap interval: the corpus is resampled, not a mean of scores."""
    _refuse_empty(statistics)
    sums = resampled_sums(statistics.astype(np.float64), seed=seed, resamples=resamples)
    low, high = percentiles(bleu_of_sums(sums), level=level)
    return Interval(mean=corpus_bleu(statistics), low=low, high=high)


def paired_corpus_bleu_difference(
    a: Statistics,
    b: Statistics,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Corpus BLEU of `a` minus that of `b` on the same test rows, each draw taken from both."""
    if len(a) != len(b):
        raise DataError(
            f"a paired difference needs the same test rows on both sides, got {len(a)} and {len(b)}"
        )
    _refuse_empty(a)
    both = np.concatenate([a, b], axis=1).astype(np.float64)
    sums = resampled_sums(both, seed=seed, resamples=resamples)
    differences = bleu_of_sums(sums[:, :_COLUMNS]) - bleu_of_sums(sums[:, _COLUMNS:])
    low, high = percentiles(differences, level=level)
    return Interval(mean=corpus_bleu(a) - corpus_bleu(b), low=low, high=high)


def bleu_of_sums(sums: Floats) -> Floats:
    """BLEU-4 of each row of summed statistics (m, 10), as sacrebleu computes it: shape (m,).

    Smoothing "exp" (sacrebleu's default): the k-th order without a match counts 1 / 2^k of one.
    """
    predicted, wanted = sums[:, 0], sums[:, 1]
    matches, totals = sums[:, _MATCHES], sums[:, _TOTALS]
    unmatched = matches == 0
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=1), matches)
    precisions = 100 * smoothed / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(predicted, 1)))
    bleu = brevity * np.exp(np.log(precisions).mean(axis=1))
    # No 4-gram in any prediction, or no match at all: sacrebleu scores 0, smoothing or not.
    scored = (totals > 0).all(axis=1) & (matches > 0).any(axis=1)
    return np.where(scored, bleu, 0.0)


@functools.cache
def signature(tokenize: str = "zh") -> str:
    """sacrebleu's own signature of this score: references, case, tokenizer, smoothing, version."""
    metric = _sacrebleu().BLEU(tokenize=tokenize)
    metric.corpus_score(["无"], [["无"]])  # the number of references is known only afterwards
    return str(metric.get_signature())


def nltk_method1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """NLTK sentence BLEU-4 of two token lists, smoothing method 1 (epsilon 0.1), 0..1."""
    return _sentence_bleu(prediction, reference, "method1")


def nltk_method3(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """NLTK sentence BLEU-4, smoothing method 3 (NIST), times 100: 0..100.

    LLaMA-Factory passes `list(text)`: every character, white space and punctuation included; it
    also rounds each pair to 4 digits, which moves a mean by less than 5e-5. ms-swift did the
    same before it went over to jieba words with method 3, leaving empty predictions out.
    """
    return 100 * _sentence_bleu(prediction, reference, "method3")


def _sentence_bleu(prediction: Sequence[str], reference: Sequence[str], method: str) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not prediction or not reference:
        return 0.0
    smoothing = getattr(SmoothingFunction(), method)
    return float(sentence_bleu([reference], prediction, smoothing_function=smoothing))


def _refuse_empty(statistics: Statistics) -> None:
    if len(statistics) == 0:
        raise DataError("no corpus BLEU without samples: there are no scored samples")


def _sacrebleu() -> Any:
    import sacrebleu

    return sacrebleu
