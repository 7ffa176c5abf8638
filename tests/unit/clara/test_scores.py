"""Scores of short answers on pairs whose values are known."""

from __future__ import annotations

import pytest

from baton.pipelines.clara.scores import (
    Answered,
    chinese,
    cover_match,
    exact_match,
    f1,
    normalise,
    recall,
    score_systems,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog & an Owl!", "cat dog owl"),
        ("True", "yes"),
        ("False", "no"),
        ("true", "true"),
        ("it's Ann's", "its anns"),
        ("theatre", "theatre"),
        ("", ""),
        ("中文。答案", "中文。答案"),
    ],
)
def test_answers_are_normalised(text, expected) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "f", "cover"),
    [
        ("The Eiffel Tower", "eiffel tower", 1, 1, 1),
        ("in Paris, France", "Paris", 0, 0.5, 1),
        ("Paris", "Paris France", 0, 2 / 3, 0),
        ("rome", "Paris", 0, 0, 0),
        ("yes it is", "yes", 0, 0, 1),
        ("yes", "no", 0, 0, 0),
        ("yes", "True", 1, 1, 1),
        ("noanswer", "Paris", 0, 0, 0),
        ("", "", 1, 0, 1),
        ("", "Paris", 0, 0, 0),
        ("a b b", "b b b", 0, 0.8, 0),
        ("b c b", "b b", 0, 0.8, 1),
    ],
)
def test_em_f1_and_cover_of_known_pairs(prediction, gold, em, f, cover) -> None:
    assert exact_match(prediction, gold) == em
    assert f1(prediction, gold) == pytest.approx(f)
    assert cover_match(prediction, gold) == cover


def test_chinese_is_compared_by_character_without_full_width_punctuation() -> None:
    assert chinese("阿司匹林,100 mg。") == ["阿", "司", "匹", "林", "100", "mg"]
    assert exact_match("阿司匹林。", "阿司匹林", chinese) == 1
    assert f1("阿司", "阿司匹林", chinese) == pytest.approx(2 / 3)
    assert cover_match("是阿司匹林吗?", "阿司匹林", chinese) == 1


def test_recall_counts_positives_among_the_chosen() -> None:
    assert recall([4, 1], [1]) == 1
    assert recall([4, 1], [1, 2]) == 0.5
    assert recall([0], [3]) == 0


def test_a_set_of_known_answers_has_known_scores() -> None:
    rows = [
        Answered(prediction="Paris", golds=["paris", "x"], chosen=[2, 0], positives=[2]),
        Answered(prediction="y", golds=["x", "the y"], chosen=[1, 0], positives=[2, 1]),
        Answered(prediction="z w", golds=["z"], chosen=[1, 0], positives=None),
        Answered(prediction="", golds=["z"], chosen=[0, 1], positives=[2]),
    ]
    text = [Answered(prediction="x", golds=row.golds) for row in rows]
    sheet = score_systems({"clara": rows, "text": text}, seed=0, resamples=100)
    values = {score.column: score.value for score in sheet.scores}
    assert values["exact_match"] == 0.25
    assert values["f1"] == pytest.approx((1 + 0 + 2 / 3 + 0) / 4)
    assert values["cover_em"] == 0.5
    assert values["exact_match_best"] == 0.5
    assert values["f1_best"] == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    assert values["recall_at_k"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert values["exact_match_text"] == 0.25
    assert values["exact_match_best_text"] == 0.5
    assert "recall_at_k_text" not in values
    found = sheet.score("recall_at_k")
    assert (found.name, found.n) == ("recall@2", 3)
    assert "1 rows without positives left out" in found.convention
    assert sheet.score("f1").convention != sheet.score("f1_best").convention
    assert [score.column for score in sheet.scores][:4] == [
        "f1", "cover_em", "recall_at_k", "exact_match"
    ]  # fmt: skip
