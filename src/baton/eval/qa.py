"""Exact match and F1 of short answers, in English and Chinese.

As SQuAD scores them (Rajpurkar et al., EMNLP 2016): lower case, punctuation and English articles
dropped. Chinese characters are tokens of their own, as in CMRC 2018 (Cui et al., EMNLP 2019).
"""

from __future__ import annotations

from collections import Counter

from baton.eval.rouge import characters

_ARTICLES = frozenset({"a", "an", "the"})


def answer_tokens(text: str) -> list[str]:
    """What of a short answer counts."""
    return [token for token in characters(text) if token not in _ARTICLES]


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where both have the same tokens in the same order, else 0.0."""
    return float(answer_tokens(prediction) == answer_tokens(reference))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over tokens with multiplicity, 0..1.

    Two answers without tokens are equal; one without against one with tokens scores 0.
    """
    ours, theirs = answer_tokens(prediction), answer_tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))
