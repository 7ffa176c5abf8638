"""Answers that are computed, scores that keywords cannot win, and the quality of a problem."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.pipelines.questions_gen.answers import Verdict, check, compute
from baton.pipelines.questions_gen.evaluator import GRADES, WEIGHTS, evaluate, grade
from baton.pipelines.questions_gen.expressions import NotExact, parse
from baton.pipelines.questions_gen.independent import Judge, repetition, well_formed
from baton.pipelines.questions_gen.problem import (
    Problem,
    final_answer,
    read_problem,
    without_marker,
)
from baton.pipelines.questions_gen.rewards import keyword_rewards
from baton.pipelines.questions_gen.tfidf import History

GOOD = Problem(
    "Find the greatest common divisor of 84 and 126.",
    "42",
    "We have 84 = 2 * 42.\nAlso 126 = 3 * 42.\nSince 2 and 3 share no factor, gcd = 42.",
)


@pytest.mark.parametrize(
    ("problem", "answer", "verdict"),
    [
        ("Determine the integer 3 + 4.", "7", "right"),
        ("Determine the integer 3 + 4.", "8", "wrong"),
        ("Determine the integer 3 + 4.", "", "missing"),
        ("Determine the integer 3 + 4.", "seven", "wrong"),
        (r"Compute $12\cdot 7+5$.", "$89$", "right"),
        (r"Evaluate \frac{1}{2}+\frac{1}{3}.", r"\boxed{\frac{5}{6}}", "right"),
        ("What is 2.5 * 4?", "10", "right"),
        ("Calculate the value of (1 + 2)^3 / 9.", "3", "right"),
        ("Compute 1,000 + 1.", "1001", "right"),
        (r"Evaluate \sqrt{16} + 1.", "5", "right"),
        ("Find the greatest common divisor of 12 and 18.", "6", "right"),
        ("Find the least common multiple of 4 and 6.", "12", "right"),
        ("Find the remainder when 2^10 is divided by 7.", "2", "right"),
        ("Solve x^2 - 5x + 6 = 0.", "x = 2 or x = 3", "right"),
        ("Solve x^2 - 5x + 6 = 0.", "2", "wrong"),
        ("Find x if 2x + 3 = 7.", "x = 2", "right"),
        ("How many ways are there?", "12", "unknown"),
        ("Prove that it is so.", "see above", "no number"),
        ("What is 9^9^9?", "1", "unknown"),
        ("Compute 7.", "7", "unknown"),  # asks for nothing, so it is not right without end
        ("Compute 1 / 0.", "0", "unknown"),
    ],
)
def test_answers_are_computed_where_they_can_be(problem: str, answer: str, verdict: str) -> None:
    assert check(Problem(problem, answer)) is Verdict(verdict)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "9**9**9",
        "10**65",
        "(" * 150 + ")" * 150,
        "1/0",
        "a.b",
        "[1, 2]",
        "x if x else 1",
        "sqrt(2, 3)",
        "True",
        "",
        "1" * 300,
        "lambda: 1",
    ],
)
def test_nothing_that_a_model_writes_is_run_or_grows_without_end(text: str) -> None:
    with pytest.raises(NotExact):
        parse(text)


@given(st.text(max_size=60))
def test_reading_an_expression_gives_one_or_says_that_it_is_none(text: str) -> None:
    with contextlib.suppress(NotExact):
        parse(text)
    compute(text)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_sums_and_products_of_whole_numbers_come_out_right(a: int, b: int) -> None:
    assert check(Problem(f"Compute {a} + {b}.", str(a + b))) is Verdict.RIGHT
    assert check(Problem(f"Compute {a} * {b}.", str(a * b))) is Verdict.RIGHT
    assert check(Problem(f"Compute {a} + {b}.", str(a + b + 1))) is Verdict.WRONG


def test_a_problem_is_read_back_as_it_was_written() -> None:
    assert read_problem(GOOD.text()) == GOOD
    assert read_problem("Problem: What?\nSolution: so") == Problem("What?", "", "so")
    assert read_problem("olympiad prove therefore") is None
    assert read_problem("Answer: 7") is None
    assert read_problem("") is None
    again = read_problem("Problem: one\nProblem: two\nAnswer: 1")
    assert again == Problem("one", "1", "")


plain = st.text(st.characters(codec="ascii", exclude_characters=":\r\x0b\x0c\x1c\x1d\x1e"))


@given(plain, plain, plain)
def test_any_text_without_headings_survives(problem: str, answer: str, solution: str) -> None:
    written = Problem(problem.strip() or "p", answer.strip(), solution.strip())
    assert read_problem(written.text()) == written


def test_final_answers_are_found_as_data_sets_write_them() -> None:
    assert final_answer("so \\boxed{1} and \\boxed{\\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer("4 + 3 = 7\n#### 7") == "7"
    assert final_answer("it follows") == ""
    assert without_marker("4 + 3 = 7\n#### 7") == "4 + 3 = 7"


@pytest.mark.parametrize("spam", ["olympiad prove therefore ", "expert prove hence theorem "])
def test_keyword_spam_wins_the_keyword_reward_and_nothing_else(spam: str) -> None:
    judge = Judge.of([GOOD.problem])
    history = History(100)
    history.add(GOOD.problem)
    fake = spam * 12
    dressed = f"Problem: {fake}.\nAnswer: {fake}"
    honest, _ = keyword_rewards([GOOD.problem, "Draw a circle."], history)
    for text in (fake, dressed):
        hacked, _ = keyword_rewards([text, "Draw a circle."], history)
        assert hacked.total > 0.7 > honest.total + 0.3
        judged = judge.score(text)
        assert judged.total < 0.05
        assert judged.repetition > 0.8
        assert evaluate(text, judged).grade == "F"
    other = Judge.of(["Draw a circle."]).score(GOOD.text())
    assert other.total > 0.9


def test_the_independent_score_looks_at_form_novelty_and_the_answer() -> None:
    new = Judge.of(["Draw a circle."])
    assert new.score(GOOD.text()).is_right
    wrong = Problem(GOOD.problem, "41", GOOD.solution)
    assert new.score(wrong.text()).total < new.score(GOOD.text()).total - 0.3
    copied = Judge.of([GOOD.problem])
    assert copied.score(GOOD.text()).novelty == pytest.approx(0)
    assert copied.score(GOOD.text()).total < new.score(GOOD.text()).total - 0.2


@pytest.mark.parametrize(
    ("problem", "value"),
    [
        ("Find all integers n with n^2 = 4n.", 1.0),
        ("Find all integers n with n^2 = 4n", 0.8),
        ("Find $n with n = 2.", 0.8),
        ("Find (n with n = 2.", 0.8),
        ("How many 7?", 0.8),
        ("olympiad prove therefore", 0.0),
        ("integers 3 + 4", 0.0),
        ("Compute the integral over [0, 1) of x^2.", 1.0),
    ],
)
def test_well_formed(problem: str, value: float) -> None:
    assert well_formed(Problem(problem)) == pytest.approx(value)


def test_repetition_is_the_share_of_triples_seen_before() -> None:
    assert repetition("one two three four") == 0.0
    assert repetition("") == repetition("one two") == 0.0
    assert repetition("a b c a b c") == pytest.approx(1 / 4)
    assert repetition("a " * 12) == pytest.approx(9 / 10)


def test_the_parts_of_quality_add_up_and_have_the_weights_of_the_guide() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert list(WEIGHTS.values()) == [0.25, 0.20, 0.20, 0.15, 0.10, 0.10]
    judged = Judge.of(["Draw a circle."]).score(GOOD.text())
    quality = evaluate(GOOD.text(), judged)
    assert (quality.content, quality.clarity, quality.completeness) == (1.0, 1.0, 1.0)
    assert quality.difficulty == pytest.approx(3 / 6)
    assert quality.educational == 1.0
    expected = sum(WEIGHTS[name] * getattr(quality, name) for name in WEIGHTS)
    assert quality.total == pytest.approx(expected)


@pytest.mark.parametrize(
    ("total", "name"),
    [
        *GRADES,
        (1.0, "A+"),
        (0.8999, "A"),
        (0.3999, "F"),
        (0.0, "F"),
    ],
)
def test_grades_begin_at_their_cut_off(total: float, name: str) -> None:
    assert grade(total) == name


@given(st.text(max_size=200))
def test_any_text_is_judged_between_0_and_1(text: str) -> None:
    judged = Judge.of(["Draw a circle."]).score(text)
    assert 0 <= judged.total <= 1
    assert 0 <= evaluate(text, judged).total <= 1
