"""The filter and its companions, word by word as specified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.pipelines.questions_gen.competition import (
    COMPETITION_WEIGHTS,
    DEFAULT_TOPIC,
    DIFFICULTIES,
    TOPICS,
    competition_score,
    difficulty,
    quality,
    topics,
)
from baton.pipelines.questions_gen.data import Census, judge

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
real_data = pytest.mark.real_data
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")


@pytest.mark.parametrize(("keyword", "weight"), COMPETITION_WEIGHTS)
def test_each_keyword_adds_its_weight_once(keyword: str, weight: float) -> None:
    # Some keywords hold others: "prime" none, "competition" none, "combination" is in neither.
    inside = sum(w for k, w in COMPETITION_WEIGHTS if k in keyword)
    assert competition_score(keyword.upper(), f"and {keyword} again") == pytest.approx(inside)
    assert inside >= weight


@pytest.mark.parametrize(
    ("problem", "solution", "score"),
    [
        ("", "", 0.0),
        ("What is 2 + 2?", "4", 0.0),
        ("Determine the integer 3 + 4.", "7", 0.35),
        ("x^3", "", 0.15),
        ("x^2", "", 0.0),
        ("x^{12}", "", 0.15),
        ("x^9 and x^{2}", "", 0.15),
        ("a = 1", "b = 2", 0.0),
        ("a = 1, b = 2", "c = 3", 0.1),
        ("a theorem", "and a lemma", 0.2),
        ("triangle", "prime", 0.1 + 0.2),
        ("Prove that for all integers", "by a lemma", 0.3 + 0.15 + 0.2),
        ("prove find all determine show that", "olympiad", 1.0),
    ],
)
def test_competition_score(problem: str, solution: str, score: float) -> None:
    assert competition_score(problem, solution) == pytest.approx(score, abs=1e-12)


def test_weights_are_summed_in_plain_floats_in_their_order() -> None:
    # prime 0.2, then triangle 0.1: the sum of the two floats is above 0.3, and the row is kept.
    assert competition_score("triangle", "prime") > 0.3
    assert competition_score("contest", "") == 0.3
    assert competition_score("competition", "") == 0.3


@pytest.mark.parametrize(
    ("problem", "solution", "level"),
    [
        ("What is 2 + 2?", "4", "basic"),
        ("A polynomial", "", "intermediate"),
        ("Sum", "1\n2\n3\n4\n5", "basic"),
        ("Sum", "1\n2\n3\n4\n5\n6", "intermediate"),
        ("Prove it", "", "advanced"),
        ("Sum", "By a LEMMA", "advanced"),
        ("From a contest", "", "advanced"),
        ("Olympiad", "", "olympiad"),
        ("Prove this (IMO 1959)", "", "olympiad"),
        ("IMO 1959", "", "basic"),  # needs one of the words before it
        ("Simon proves", "", "olympiad"),  # parts of words count
        ("calculus and polynomial", "theorem, USAMO", "olympiad"),
    ],
)
def test_difficulty(problem: str, solution: str, level: str) -> None:
    assert difficulty(problem, solution) == level


@pytest.mark.parametrize(
    ("problem", "solution", "value"),
    [
        ("", "", 0.1),
        ("a" * 49, "", 0.1),
        ("a" * 50, "", 0.25),
        ("a" * 300, "", 0.25),
        ("a" * 301, "", 0.15),
        ("a" * 50, "b" * 100, 0.25),
        ("a" * 50, "b" * 101, 0.5),
        ("a" * 50, "Therefore it is, therefore it was", 0.35),
        ("a" * 50, "therefore thus hence proof QED", 0.55),
        ("a" * 50 + " What is", "", 0.2),
        ("what is: solve for, find x", "", 0.0),
        ("What is it? Therefore", "what is", 0.05),  # each looks at its own side
        ("a" * 50, "therefore thus hence" + "b" * 100, 0.8),
    ],
)
def test_quality(problem: str, solution: str, value: float) -> None:
    assert quality(problem, solution) == pytest.approx(value, abs=1e-12)


def test_topics_are_named_by_their_keywords_the_most_frequent_first() -> None:
    assert topics("How much is it?", "4") == (DEFAULT_TOPIC,) == ("Basic_Math:Arithmetic",)
    assert topics("A triangle with a right angle and its hypotenuse", "")[0] == "Geometry:Triangles"
    found = topics("The remainder modulo a prime", "")
    assert found == ("Number_Theory:Modular_Arithmetic", "Number_Theory:Primes")
    assert {topic.partition(":")[0] for topic in TOPICS} == {
        "Algebra",
        "Number_Theory",
        "Geometry",
        "Combinatorics",
        "Calculus",
    }


texts = st.text(alphabet=st.sampled_from("prove xy=^{3} imo\nfind all12"), max_size=80)


@given(texts, texts)
def test_judging_is_a_pure_function_with_values_in_range(problem: str, solution: str) -> None:
    row = judge(1, problem, solution)
    assert judge(1, problem, solution) == row
    assert 0 <= row.competition_score <= 1
    assert 0 <= row.quality <= 1
    assert row.difficulty in DIFFICULTIES
    assert set(row.topics) <= {*TOPICS, DEFAULT_TOPIC}
    assert row.topics


@real_data
@needs_shared
@pytest.mark.parametrize(
    ("file", "columns", "read", "kept", "levels"),
    [
        (
            "math_minif2f_test.jsonl",
            ("problem", "solution"),
            244,
            168,
            {"basic": 98, "intermediate": 49, "advanced": 20, "olympiad": 1},
        ),
        (
            "math_gsm8k_train.jsonl",
            ("question", "answer"),
            7473,
            15,
            {"basic": 3, "intermediate": 4, "advanced": 8},
        ),
    ],
)
def test_real_problems_through_the_filter_in_any_order(
    file: str, columns: tuple[str, str], read: int, kept: int, levels: dict[str, int]
) -> None:
    rows = [json.loads(line) for line in (SHARED / file).read_text().splitlines()]
    reports = []
    for ordered in (rows, rows[::-1]):
        census = Census()
        for number, row in enumerate(ordered, start=1):
            judged = judge(number, row[columns[0]], row[columns[1]])
            census.count(judged, is_kept=judged.competition_score > 0.3)
        report = census.to_json()
        reports.append({**report, "topics": dict(sorted(report["topics"].items()))})
    print(*census.lines(), sep="\n")
    assert reports[0]["read"] == read
    assert reports[0]["competition"] == kept
    assert reports[0]["difficulty"] == levels
    assert reports[0] | {"difficulty": levels} == reports[1] | {"difficulty": levels}
