"""ROUGE on Chinese: golden values by hand, the two libraries themselves as oracles."""

import logging
import marshal
import os
import subprocess
import sys
import time

import jieba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge
from rouge_score import rouge_scorer

from baton.eval import rouge
from baton.eval.rouge import RougeF, characters, jieba_tokens, rouge_chinese_f, rouge_score_f

TEXT = "感冒时应该多喝水，多休息，必要时吃感冒药，发热请就医。"
TOKENS = st.lists(st.sampled_from(["头", "痛", "，", "。", "吃药"]), max_size=40)


class Given:
    def tokenize(self, tokens):
        return tokens


def test_the_stock_rouge_score_tokenizer_scores_identical_chinese_as_zero():
    stock = rouge_scorer.RougeScorer(["rouge1", "rougeL"]).score(TEXT, TEXT)
    assert stock["rouge1"].fmeasure == 0
    assert stock["rougeL"].fmeasure == 0

    assert rouge_score_f(jieba_tokens(TEXT), jieba_tokens(TEXT)).rouge_1 == 1
    assert rouge_score_f(characters(TEXT), characters(TEXT)).rouge_1 == 1


def test_repeated_words_count_each_time_in_rouge_score_and_once_in_rouge_chinese():
    prediction, reference = list("痛痛痛药"), list("痛药水")
    # Unigrams: 2 of 4 match 2 of 3; bigrams 痛痛 痛痛 痛药 | 痛药 药水: 1 of 3, 1 of 2; LCS 痛药.
    assert rouge_score_f(prediction, reference) == RougeF(
        rouge_1=pytest.approx(4 / 7), rouge_2=pytest.approx(2 / 5), rouge_l=pytest.approx(4 / 7)
    )
    # As sets {痛 药} | {痛 药 水}: 2 of 2, 2 of 3; {痛痛 痛药} | {痛药 药水}: 1 of 2 twice.
    assert rouge_chinese_f(prediction, reference) == RougeF(
        rouge_1=pytest.approx(4 / 5), rouge_2=pytest.approx(1 / 2), rouge_l=pytest.approx(4 / 7)
    )


def test_shared_commas_raise_rouge_score_above_rouge_chinese_on_unrelated_answers():
    # One comma in common as a set (1 of 4 and 1 of 5), three with multiplicity (3 of 6 and 3 of 7).
    prediction, reference = list("甲，乙，丙，"), list("丁，戊，己，庚")
    assert rouge_score_f(prediction, reference).rouge_1 == pytest.approx(6 / 13)
    assert rouge_chinese_f(prediction, reference).rouge_1 == pytest.approx(2 / 9)


def test_jieba_tokens_are_words_with_punctuation_case_and_white_space_kept():
    assert jieba_tokens("感冒了，吃VC 10mg。") == [
        *["感冒", "了", "，", "吃", "VC", " ", "10mg", "。"]
    ]


def test_characters_are_single_for_chinese_and_whole_runs_for_lower_cased_latin():
    assert characters("口服 Aspirin 100mg，每日1次。\n体温37.5℃") == [
        *["口", "服", "aspirin", "100mg", "每", "日", "1", "次", "体", "温", "37", "5"]
    ]


@pytest.mark.parametrize("convention", [rouge_score_f, rouge_chinese_f])
@pytest.mark.parametrize(
    ("prediction", "reference"), [("", "头痛"), ("头痛", ""), ("", ""), (" \n", "头痛")]
)
def test_an_empty_text_on_either_side_scores_zero(convention, prediction, reference):
    score = convention(jieba_tokens(prediction), jieba_tokens(reference))
    assert score == RougeF(rouge_1=0, rouge_2=0, rouge_l=0)


@pytest.mark.parametrize("convention", [rouge_score_f, rouge_chinese_f])
def test_texts_without_a_common_token_score_zero(convention):
    assert convention(list("头痛"), list("发热")) == RougeF(rouge_1=0, rouge_2=0, rouge_l=0)


@given(TOKENS, TOKENS)
@settings(max_examples=200, deadline=None)
def test_rouge_score_called_directly_gives_the_same_three_numbers(prediction, reference):
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Given())
    expected = scorer.score(reference, prediction)
    assert rouge_score_f(prediction, reference) == RougeF(
        rouge_1=expected["rouge1"].fmeasure,
        rouge_2=expected["rouge2"].fmeasure,
        rouge_l=expected["rougeL"].fmeasure,
    )


WORDS_AND_BREAKS = st.lists(
    st.sampled_from(["头", "痛", "，", "。", "？", "”", "吃药", "\n", " ", "......", "…", "…"]),
    max_size=40,
)


@given(WORDS_AND_BREAKS, WORDS_AND_BREAKS)
@settings(max_examples=300, deadline=None)
def test_rouge_chinese_called_as_llama_factory_does_gives_the_same_three_numbers(
    prediction, reference
):
    ours, theirs = " ".join(prediction), " ".join(reference)
    if not ours.split() or not theirs.split():
        expected = {key: {"f": 0.0} for key in ("rouge-1", "rouge-2", "rouge-l")}
    else:
        expected = Rouge().get_scores(ours, theirs)[0]
    assert rouge_chinese_f(prediction, reference) == RougeF(
        rouge_1=expected["rouge-1"]["f"],
        rouge_2=expected["rouge-2"]["f"],
        rouge_l=expected["rouge-l"]["f"],
    )


def test_rouge_l_agrees_between_the_conventions_on_texts_of_one_line():
    prediction, reference = jieba_tokens("感冒了要多喝水，注意休息。"), jieba_tokens(TEXT)
    expected = rouge_score_f(prediction, reference).rouge_l
    assert rouge_chinese_f(prediction, reference).rouge_l == pytest.approx(expected, abs=1e-7)


def test_a_model_that_repeats_itself_for_pages_is_scored_in_under_two_seconds():
    jieba_tokens("预热")
    endless, reference = ["头", "痛", "。"] * 5000, ["头", "晕", "痛", "。"] * 2500
    rouge_score_f(["热"], ["热"])
    start = time.perf_counter()
    for convention in (rouge_score_f, rouge_chinese_f):
        # Each 头 … 痛 。 of the reference is found in order.
        assert convention(endless, reference).rouge_l == pytest.approx(2 * 7500 / 25000)
    assert time.perf_counter() - start < 2


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_cutting_words_writes_no_cache_and_nothing_on_stderr(tmp_path):
    done = run_python(
        "from baton.eval.rouge import jieba_tokens; print(jieba_tokens('高血压患者'))",
        TMPDIR=str(tmp_path),
    )
    assert done.stdout == "['高血压', '患者']\n"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_somebody_else_left_in_the_temporary_folder_is_not_read(tmp_path):
    words = {"高": 0, "高血": 10**9, "压": 0, "压患": 0, "压患者": 10**9}
    (tmp_path / "jieba.cache").write_bytes(marshal.dumps((words, 2 * 10**9)))
    stock = run_python("import jieba; print(jieba.lcut('高血压患者'))", TMPDIR=str(tmp_path))
    assert stock.stdout == "['高血', '压患者']\n"  # the trap is real

    done = run_python(
        "from baton.eval.rouge import jieba_tokens; print(jieba_tokens('高血压患者'))",
        TMPDIR=str(tmp_path),
    )
    assert done.stdout == "['高血压', '患者']\n"


def test_our_segmenter_cuts_like_jiebas_own(tmp_path):
    jieba.setLogLevel(logging.CRITICAL)
    own = jieba.Tokenizer()
    own.tmp_dir = str(tmp_path)
    for text in (TEXT, "口服阿司匹林100mg，每日1次。\n维生素B12缺乏", "", "Hello 世界"):
        assert jieba_tokens(text) == own.lcut(text)


def test_importing_the_scorers_loads_none_of_the_scoring_libraries():
    done = run_python(
        "import sys, baton.eval.score\n"
        "heavy = {'torch', 'jieba', 'nltk', 'sacrebleu', 'rouge_score', 'rouge_chinese'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert done.stdout == "[]\n"


@given(TOKENS, TOKENS)
@settings(max_examples=100, deadline=None)
def test_the_common_subsequence_is_as_long_as_the_table_says(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
            )
    assert rouge.lcs_length(a, b) == table[-1][-1]
