"""The score sheet: every convention present, labelled, with interval and per-sample values."""

import re

import numpy as np
import pytest
import sacrebleu

from baton.errors import DataError
from baton.eval.bootstrap import bootstrap_mean, paired_difference
from baton.eval.score import score_pairs

PREDICTIONS = ["感冒了要多喝水，注意休息，可以吃点感冒药。", "建议清淡饮食。", ""]
REFERENCES = [
    "感冒时应该多喝水，多休息，必要时吃感冒药，发热请就医。",
    "您好，建议您清淡饮食，避免劳累。",
    "请及时就医。",
]

KEYS = {
    "rouge_1_jieba": "rouge1[jieba, rouge_score]",
    "rouge_2_jieba": "rouge2[jieba, rouge_score]",
    "rouge_l_jieba": "rougeL[jieba, rouge_score]",
    "rouge_1_char": "rouge1[char, rouge_score]",
    "rouge_2_char": "rouge2[char, rouge_score]",
    "rouge_l_char": "rougeL[char, rouge_score]",
    "rouge_1_jieba_set": "rouge1[jieba, rouge_chinese]",
    "rouge_2_jieba_set": "rouge2[jieba, rouge_chinese]",
    "rouge_l_jieba_set": "rougeL[jieba, rouge_chinese]",
    "bleu_4_jieba_method1": "bleu4[jieba, nltk method1]",
    "bleu_4_char_method3": "bleu4[char, nltk method3]",
    "bleu_4_zh": "bleu4[zh, sacrebleu]",
}


@pytest.fixture(scope="module")
def sheet():
    return score_pairs(PREDICTIONS, REFERENCES, seed=1, resamples=200)


def test_every_score_has_a_stable_column_and_a_key_that_names_the_tokenizer(sheet):
    assert {score.column: score.key for score in sheet.scores} == KEYS
    assert all(score.tokenizer in score.key for score in sheet.scores)


def test_every_score_is_within_its_scale_and_its_interval(sheet):
    for score in sheet.scores:
        assert 0 <= score.low <= score.value <= score.high <= score.scale, score.key
        assert score.n == 3
    assert {score.column for score in sheet.scores if score.scale == 100} == {
        "bleu_4_char_method3",
        "bleu_4_zh",
    }


def test_a_mean_is_the_mean_of_its_per_sample_values_with_their_bootstrap_interval(sheet):
    assert set(sheet.per_sample) == set(KEYS) - {"bleu_4_zh"}
    for column, values in sheet.per_sample.items():
        interval = bootstrap_mean(values, seed=1, resamples=200)
        score = sheet.score(column)
        assert (score.value, score.low, score.high) == (interval.mean, interval.low, interval.high)


def test_corpus_bleu_is_sacrebleus_and_carries_its_signature(sheet):
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES], tokenize="zh").score
    assert sheet.score("bleu_4_zh").value == expected
    assert "tok:zh|smooth:exp|version:" in sheet.score("bleu_4_zh").convention
    assert sheet.bleu_statistics.shape == (3, 10)


def test_an_empty_prediction_counts_as_a_row_that_scores_zero(sheet):
    assert all(values[2] == 0 for values in sheet.per_sample.values())
    assert all(values[0] > 0 for values in sheet.per_sample.values())


def test_a_golden_pair_gives_the_numbers_counted_by_hand():
    one = score_pairs(PREDICTIONS[:1], REFERENCES[:1], seed=0, resamples=10)
    value = {score.column: score.value for score in one.scores}
    # 12 words (11 kinds): 感冒 了 要 多喝水 ， 注意 休息 ， 可以 吃点 感冒药 。
    # 17 words (14 kinds): 感冒 时 应该 多喝水 ， 多 休息 ， 必要 时 吃 感冒药 ， 发热 请 就医 。
    # In common 7 (6 kinds): 感冒 多喝水 ， ， 休息 感冒药 。 F = 2 x common / (ours + theirs).
    # Without punctuation 18 and 23 characters, in common 感感冒冒要多喝水休息吃药: 12.
    assert value["rouge_1_jieba"] == pytest.approx(14 / 29)
    assert value["rouge_1_jieba_set"] == pytest.approx(12 / 25)
    assert value["rouge_1_char"] == pytest.approx(24 / 41)
    assert value["bleu_4_char_method3"] == pytest.approx(18.07, abs=0.01)
    assert value["bleu_4_jieba_method1"] == pytest.approx(0.0386, abs=1e-4)


def test_identical_answers_score_the_whole_scale_and_unrelated_ones_nothing():
    same = score_pairs(REFERENCES, REFERENCES, seed=0, resamples=20)
    for score in same.scores:
        assert score.value == pytest.approx(score.scale), score.key
    none = score_pairs(["甲乙丙丁戊"] * 2, ["子丑寅卯辰"] * 2, seed=0, resamples=20)
    assert [(score.value, score.low, score.high) for score in none.scores] == [(0, 0, 0)] * 12


def test_the_same_seed_repeats_the_sheet_and_another_moves_only_the_intervals(sheet):
    again = score_pairs(PREDICTIONS, REFERENCES, seed=1, resamples=200)
    assert again.scores == sheet.scores
    other = score_pairs(PREDICTIONS * 4, REFERENCES * 4, seed=2, resamples=200)
    moved = score_pairs(PREDICTIONS * 4, REFERENCES * 4, seed=3, resamples=200)
    assert [s.value for s in other.scores] == [s.value for s in moved.scores]
    assert [s.low for s in other.scores] != [s.low for s in moved.scores]


def test_two_runs_on_the_same_rows_can_be_compared_row_by_row(sheet):
    better = score_pairs(REFERENCES, REFERENCES, seed=1, resamples=20)
    for column in sheet.per_sample:
        difference = paired_difference(better.per_sample[column], sheet.per_sample[column], seed=0)
        assert difference.excludes_zero, column
        assert difference.mean > 0


def test_an_empty_test_set_is_a_data_error_that_says_where_to_look():
    with pytest.raises(DataError, match="test set is empty"):
        score_pairs([], [], seed=0)


def test_missing_references_are_a_data_error_with_both_numbers():
    with pytest.raises(DataError, match=re.escape("2 predictions and 1 references")):
        score_pairs(["甲", "乙"], ["甲"], seed=0)


def test_per_sample_values_are_one_contiguous_float_array_a_column(sheet):
    for values in sheet.per_sample.values():
        assert values.dtype == np.float64
        assert values.shape == (3,)
