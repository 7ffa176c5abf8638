"""ROUGE-1, -2 and -L (F-measure) on Chinese text, in the two conventions people report.

The stock tokenizer of `rouge_score` keeps `[a-z0-9]+` only, so that two identical Chinese
strings score 0. Here the tokens come from us:

`jieba_tokens`  words, punctuation and case kept: what LLaMA-Factory and the usual guides feed
                to `rouge_chinese`, so that the two conventions differ in counting alone.
`characters`    what rouge_score's own tokenizer does (lower-case, punctuation dropped), with
                one token per Chinese character: independent of any dictionary.

Lin, *ROUGE: A Package for Automatic Evaluation of Summaries* (2004).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

# `[^\W_]` is any other letter or digit: Chinese, Greek, full-width. Each is a token of its own.
_CHARACTER = re.compile(r"[0-9a-z]+|[^\W_]")

# rouge_chinese adds this to the denominator of F; identical texts score 0.999999995.
_ROUGE_CHINESE_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RougeF:
    """F-measures of one pair of texts, 0..1."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


ZERO = RougeF(rouge_1=0.0, rouge_2=0.0, rouge_l=0.0)


def jieba_tokens(text: str) -> list[str]:
    """`jieba.lcut(text)`: words, punctuation and white space, nothing dropped, case kept."""
    tokens: list[str] = _jieba().lcut(text)
    return tokens


def characters(text: str) -> list[str]:
    """Chinese characters one by one, runs of Latin letters and digits as one lower-case token.

    Punctuation and white space are dropped, as in rouge_score's own tokenizer; so a text of
    punctuation alone has no tokens and scores 0.
    """
    return _CHARACTER.findall(text.lower())


def rouge_score_f(prediction: Sequence[str], reference: Sequence[str]) -> RougeF:
    """The `rouge_score` convention on given tokens: n-grams count as often as they occur.

    Tokens of white space are ignored. No tokens on either side scores 0.
    """
    ours = [token for token in prediction if not token.isspace()]
    theirs = [token for token in reference if not token.isspace()]
    if not ours or not theirs:
        return ZERO
    ngrams = _rouge_scorer().score(theirs, ours)
    common = lcs_length(theirs, ours)
    return RougeF(
        rouge_1=float(ngrams["rouge1"].fmeasure),
        rouge_2=float(ngrams["rouge2"].fmeasure),
        rouge_l=_rouge_score_fmeasure(common / len(ours), common / len(theirs)),
    )


def rouge_chinese_f(prediction: Sequence[str], reference: Sequence[str]) -> RougeF:
    """The `rouge_chinese` convention on jieba tokens: n-grams are SETS, repeats count once.

    As in LLaMA-Factory: tokens joined by spaces, and 0 where either side has nothing but white
    space (the library raises there). Where a sentence ends at a line break the library sees an
    empty word; it is in the public numbers, so it is kept. Elsewhere ROUGE-L equals rouge_score's.
    """
    ours, theirs = " ".join(prediction), " ".join(reference)
    if not ours.split() or not theirs.split():
        return ZERO
    rouge = _rouge_chinese()
    ngrams = rouge.get_scores(ours, theirs)[0]
    our_words, their_words = _rouge_chinese_words(ours), _rouge_chinese_words(theirs)
    common = lcs_length(their_words, our_words)
    precision, recall = common / len(our_words), common / len(their_words)
    return RougeF(
        rouge_1=float(ngrams["rouge-1"]["f"]),
        rouge_2=float(ngrams["rouge-2"]["f"]),
        rouge_l=2.0 * (precision * recall / (precision + recall + _ROUGE_CHINESE_EPSILON)),
    )


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one big-integer step per token of `b`.

    Both libraries fill a table of len(a) x len(b) in Python (rouge_chinese in a dict: GBs for
    an answer that repeats itself up to the token limit). Hyyrö, *Bit-parallel LCS-length
    computation revisited* (2004), gives the same number some hundred times faster.
    """
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | (1 << i)
    full = (1 << len(a)) - 1
    unmatched = full
    for token in b:
        matches = unmatched & positions.get(token, 0)
        unmatched = ((unmatched + matches) | (unmatched - matches)) & full
    return len(a) - unmatched.bit_count()


@functools.cache
def _jieba() -> Any:
    """jieba's default segmenter, built from the dictionary in its own package.

    jieba's `initialize()` would read `jieba.cache` from the shared temporary folder, which any
    process (or another version of jieba) may have written, and announce it on stderr. Building
    the table costs a second a process, touches no file and gives the same words everywhere.
    """
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


class _GivenTokens:
    """rouge_score's tokenizer interface for texts that are lists of tokens already."""

    def tokenize(self, tokens: list[str]) -> list[str]:
        return tokens


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer  # drags in all of nltk and scikit-learn: seconds

    return rouge_scorer.RougeScorer(["rouge1", "rouge2"], tokenizer=_GivenTokens())


def _rouge_score_fmeasure(precision: float, recall: float) -> float:
    from rouge_score import scoring

    return float(scoring.fmeasure(precision, recall))


@functools.cache
def _rouge_chinese() -> Any:
    from rouge_chinese import Rouge

    return Rouge(metrics=["rouge-1", "rouge-2"])


def _rouge_chinese_words(joined: str) -> list[str]:
    """The words rouge_chinese compares for ROUGE-L, empty ones at line breaks included."""
    sentences = [" ".join(line.split()) for line in _rouge_chinese().cut_sent(joined) if line]
    return [word for sentence in sentences for word in sentence.split(" ")]
