"""BLEU-4 on Chinese: golden values by hand, sacrebleu and NLTK themselves as oracles."""

import math
import random

import numpy as np
import pytest
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from baton.errors import DataError
from baton.eval import bleu
from baton.eval.rouge import jieba_tokens

PREDICTION = "感冒了要多喝水，注意休息，可以吃点感冒药。"
REFERENCE = "感冒时应该多喝水，多休息，必要时吃感冒药，发热请就医。"


def random_corpus(n, seed, longest=12):
    rng = random.Random(seed)
    text = lambda: "".join(rng.choices("头痛发热，。A1 ", k=rng.randint(0, longest)))  # noqa: E731
    return [text() for _ in range(n)], [text() for _ in range(n)]


def test_five_characters_of_which_the_last_is_wrong_score_the_fourth_root_of_a_fifth():
    # Precisions 4/5, 3/4, 2/3, 1/2; their product is 1/5, the lengths are equal.
    expected = 0.2**0.25
    prediction, reference = "甲乙丙丁戊", "甲乙丙丁己"
    statistics = bleu.zh_statistics([prediction], [reference])
    assert statistics.tolist() == [[5, 5, 4, 3, 2, 1, 5, 4, 3, 2]]
    assert bleu.corpus_bleu(statistics) == pytest.approx(100 * expected)
    assert bleu.nltk_method1(prediction, reference) == pytest.approx(expected)
    assert bleu.nltk_method3(prediction, reference) == pytest.approx(100 * expected)


def test_without_a_matching_4_gram_the_smoothing_methods_differ():
    # Precisions 3/4, 2/3, 1/2 and none of one 4-gram: method 1 counts 0.1 of it, the others 1/2.
    prediction, reference = "甲乙丙丁", "甲乙丙己"
    assert bleu.nltk_method1(prediction, reference) == pytest.approx((0.25 * 0.1) ** 0.25)
    assert bleu.nltk_method3(prediction, reference) == pytest.approx(100 * (0.25 * 0.5) ** 0.25)
    corpus = bleu.corpus_bleu(bleu.zh_statistics([prediction], [reference]))
    assert corpus == pytest.approx(100 * (0.25 * 0.5) ** 0.25)


def test_a_prediction_of_two_thirds_the_length_pays_the_brevity_penalty():
    statistics = bleu.zh_statistics(["甲乙丙丁"], ["甲乙丙丁戊己"])
    assert bleu.corpus_bleu(statistics) == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert bleu.nltk_method3("甲乙丙丁", "甲乙丙丁戊己") == pytest.approx(100 * math.exp(-0.5))


def test_the_conventions_differ_more_than_fourfold_on_one_pair():
    words = bleu.nltk_method1(jieba_tokens(PREDICTION), jieba_tokens(REFERENCE))
    assert 100 * words == pytest.approx(3.86, abs=0.01)
    assert bleu.nltk_method3(list(PREDICTION), list(REFERENCE)) == pytest.approx(18.07, abs=0.01)


def test_identical_texts_score_one_or_a_hundred_and_disjoint_or_empty_ones_zero():
    def three(prediction, reference):
        return [
            bleu.nltk_method1(prediction, reference),
            bleu.nltk_method3(prediction, reference),
            bleu.corpus_bleu(bleu.zh_statistics([prediction], [reference])),
        ]

    assert three(REFERENCE, REFERENCE) == pytest.approx([1, 100, 100])
    assert three("甲乙丙丁", "戊己庚辛") == [0, 0, 0]
    assert three("", REFERENCE) == [0, 0, 0]
    assert three(REFERENCE, "") == [0, 0, 0]
    assert three("", "") == [0, 0, 0]


def test_nltk_called_directly_gives_the_same_sentence_scores():
    smoothing = SmoothingFunction()
    for prediction, reference in zip(*random_corpus(60, seed=1), strict=True):
        if not prediction or not reference:
            continue
        for ours, method, scale in (
            (bleu.nltk_method1, smoothing.method1, 1),
            (bleu.nltk_method3, smoothing.method3, 100),
        ):
            theirs = sentence_bleu(
                [list(reference)],
                list(prediction),
                weights=(0.25, 0.25, 0.25, 0.25),
                smoothing_function=method,
            )
            assert ours(list(prediction), list(reference)) == scale * theirs


@pytest.mark.parametrize(("n", "longest"), [(1, 3), (1, 12), (3, 4), (40, 12), (40, 80)])
@pytest.mark.parametrize("seed", range(8))
def test_the_corpus_score_is_exactly_sacrebleus(n, longest, seed):
    predictions, references = random_corpus(n, seed, longest)
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score
    statistics = bleu.zh_statistics(predictions, references)
    assert bleu.corpus_bleu(statistics) == expected
    assert bleu.corpus_bleu_interval(statistics, seed=0, resamples=2).mean == expected


def test_many_resampled_corpora_at_once_score_as_sacrebleu_scores_each():
    predictions, references = random_corpus(30, seed=3, longest=9)
    statistics = bleu.zh_statistics(predictions, references)
    rng = np.random.default_rng(0)
    # Small draws too: they are the ones without a 4-gram, or without any match.
    draws = [rng.integers(0, 30, size=size) for size in [1] * 40 + [2] * 40 + [30] * 40]
    sums = np.array([statistics[draw].sum(axis=0) for draw in draws], dtype=float)
    expected = [
        sacrebleu.corpus_bleu(
            [predictions[i] for i in draw], [[references[i] for i in draw]], tokenize="zh"
        ).score
        for draw in draws
    ]
    assert {score == 0 for score in expected} == {True, False}
    assert bleu.bleu_of_sums(sums) == pytest.approx(expected, rel=1e-12)


def test_the_interval_encloses_the_score_narrows_with_rows_and_repeats_with_its_seed():
    few = bleu.zh_statistics(*random_corpus(50, seed=4, longest=40))
    many = np.tile(few, (20, 1))
    wide, narrow = (bleu.corpus_bleu_interval(rows, seed=7) for rows in (few, many))
    assert wide.low < wide.mean < wide.high
    assert narrow.mean == wide.mean
    # Twenty times the rows: an interval sqrt(20) = 4.5 times as narrow.
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert ratio == pytest.approx(20**0.5, rel=0.15)
    assert bleu.corpus_bleu_interval(few, seed=7) == wide
    assert bleu.corpus_bleu_interval(few, seed=8) != wide


def test_one_row_gives_an_interval_that_is_the_point():
    interval = bleu.corpus_bleu_interval(bleu.zh_statistics([PREDICTION], [REFERENCE]), seed=0)
    assert [interval.low, interval.high] == pytest.approx([interval.mean] * 2)


def test_a_run_that_is_a_little_better_on_every_row_is_decided_by_pairing():
    predictions, references = random_corpus(200, seed=5, longest=40)
    better = [p + r[:4] for p, r in zip(predictions, references, strict=True)]
    a = bleu.zh_statistics(better, references)
    b = bleu.zh_statistics(predictions, references)
    difference = bleu.paired_corpus_bleu_difference(a, b, seed=0)
    assert difference.mean == bleu.corpus_bleu(a) - bleu.corpus_bleu(b)
    assert difference.excludes_zero
    same = bleu.paired_corpus_bleu_difference(a, a, seed=0)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_no_rows_and_unequal_rows_are_data_errors():
    none = bleu.zh_statistics([], [])
    one = bleu.zh_statistics(["甲"], ["甲"])
    with pytest.raises(DataError):
        bleu.corpus_bleu(none)
    with pytest.raises(DataError):
        bleu.corpus_bleu_interval(none, seed=0)
    with pytest.raises(DataError):
        bleu.paired_corpus_bleu_difference(none, none, seed=0)
    with pytest.raises(DataError, match="0 and 1"):
        bleu.paired_corpus_bleu_difference(none, one, seed=0)


def test_the_signature_names_tokenizer_smoothing_and_version():
    expected = f"nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|version:{sacrebleu.__version__}"
    assert bleu.signature() == expected
