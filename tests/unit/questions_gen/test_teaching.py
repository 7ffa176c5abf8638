"""Distillation: asked once, retried, resumed, counted; what is malformed costs only itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.data.teacher import in_order
from baton.errors import TeacherError
from baton.pipelines.questions_gen.answers import Verdict, check
from baton.pipelines.questions_gen.config import OpenAITeacher
from baton.pipelines.questions_gen.lesson import CRITERIA, Lesson, Proposal, why_not_taught
from baton.pipelines.questions_gen.problem import Problem
from baton.pipelines.questions_gen.symbolic import Symbolic
from baton.pipelines.questions_gen.tutor import Tutor

_PLACE = Path(__file__).parents[2] / "services" / "teacher.py"
_SPEC = importlib.util.spec_from_file_location("teacher_service", _PLACE)
assert _SPEC is not None
assert _SPEC.loader is not None
service = importlib.util.module_from_spec(_SPEC)
sys.modules["teacher_service"] = service
_SPEC.loader.exec_module(service)

PROPOSALS = [
    Proposal(i, "Basic_Math:Arithmetic", "basic", Problem(f"Compute {i} + 7.", str(i)).text())
    for i in range(12)
]


def tutor(url: str, cache: Path, **options: Any) -> Tutor:
    named = {"attempts": 4, "timeout_seconds": 1.0, "price_in": 1.0, "price_out": 2.0}
    config = OpenAITeacher(source="openai", url=url, model="rule", **named)
    return Tutor(config, cache, **({"variations": 3, "min_score": 0.5, "attempts": 3} | options))


def teach_all(teaching: Tutor) -> list[Lesson]:
    return list(in_order(teaching.teach, PROPOSALS, parallel=4))


def test_a_proposal_is_scored_improved_and_varied(tmp_path: Path) -> None:
    with service.Server(service.Teacher(service.competition)) as server:
        teaching = tutor(server.url, tmp_path)
        lesson = teaching.teach(PROPOSALS[0])
    assert lesson.scores.keys() == set(CRITERIA)
    assert all(0.5 <= score <= 0.9 for score in lesson.scores.values())
    assert lesson.improved is not None
    assert check(lesson.improved) is Verdict.RIGHT
    assert [v.kind for v in lesson.variations] == ["context", "parameters", "application"]
    assert len({v.problem.problem for v in lesson.variations} | {lesson.improved.problem}) == 4
    assert Lesson.from_json(json.loads(json.dumps(lesson.to_json()))) == lesson
    cost = teaching.cost()
    assert cost["asked"] == 5
    assert cost["cost"] == pytest.approx(
        (cost["prompt_tokens"] * 1.0 + cost["completion_tokens"] * 2.0) / 1e6
    )
    assert cost["cost"] > 0


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with service.Server(service.Teacher(service.competition)) as server:
        first = tutor(server.url, tmp_path)
        lessons = teach_all(first)
        again = tutor(server.url, tmp_path)
        assert teach_all(again) == lessons
        assert set(server.teacher.asked.values()) == {1}
    assert (again.cost()["asked"], again.cost()["cost"]) == (0, 0.0)
    assert again.cost()["cached"] == first.cost()["asked"] == len(PROPOSALS) * 5


def test_a_teacher_with_every_fault_is_asked_again_and_says_the_same(tmp_path: Path) -> None:
    with service.Server(service.Teacher(service.competition)) as server:
        lessons = teach_all(tutor(server.url, tmp_path / "quiet"))
    with service.Server(
        service.Teacher(service.competition, faults_one_in=3, silent_seconds=1.5)
    ) as server:
        teaching = tutor(server.url, tmp_path / "faulty")
        # A text that is no use is a reply all the same: asked for anew, it may be another one.
        assert [one.number for one in teach_all(teaching)] == [one.number for one in lessons]
        assert teaching.cost()["retried"] > 0
        assert sum(server.teacher.answered.values()) == len(server.teacher.answered)
    assert teaching.malformed["no JSON"] > 0


def test_a_teacher_that_dies_leaves_what_it_said_to_the_next_leg(tmp_path: Path) -> None:
    teacher = service.Teacher(service.competition, dies_after=17)
    with service.Server(teacher) as server:
        first = tutor(server.url, tmp_path)
        with pytest.raises(TeacherError, match="is kept"):
            list(in_order(first.teach, PROPOSALS, parallel=1))
        said = sum(teacher.answered.values())
        assert said == 17
        teacher.dies_after = None
        second = tutor(server.url, tmp_path)
        teach_all(second)
        assert set(teacher.answered.values()) == {1}
        assert second.cost()["asked"] == len(PROPOSALS) * 5 - said


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I cannot judge that.", "no JSON"),
        ("{'correctness': 5}", "no JSON"),
        ('{"correctness": 5', "no JSON"),
        ('{"correctness": 5}', "no number for clarity"),
        (json.dumps(dict.fromkeys(CRITERIA, "five")), "no number for correctness"),
        (json.dumps(dict.fromkeys(CRITERIA, True)), "no number for correctness"),
        (json.dumps(dict.fromkeys(CRITERIA, 11)), "correctness out of range"),
        ('{"correctness": ' + "[" * 100_000, "no JSON"),
    ],
)
def test_malformed_scores_are_asked_for_again_counted_and_left_out(
    reply: str, reason: str, tmp_path: Path
) -> None:
    with service.Server(service.Teacher(lambda _: reply)) as server:
        teaching = tutor(server.url, tmp_path, attempts=3)
        lesson = teaching.teach(PROPOSALS[0])
    assert lesson == Lesson(number=0, dropped=["score: malformed"])
    assert teaching.malformed == {reason: 3}
    assert teaching.cost()["malformed"] == {reason: 3}


def test_a_malformed_answer_that_comes_right_the_second_time_is_used(tmp_path: Path) -> None:
    seen: set[str] = set()

    def moody(prompt: str) -> str:
        is_new = prompt not in seen
        seen.add(prompt)
        return "Let me think." if is_new else service.competition(prompt)

    with service.Server(service.Teacher(moody)) as server:
        teaching = tutor(server.url, tmp_path)
        lesson = teaching.teach(PROPOSALS[0])
    assert lesson.improved is not None
    assert len(lesson.variations) == 3
    assert teaching.malformed == {"no JSON": 5}


def replying(**problem: Any) -> Callable[[str], str]:
    def rule(prompt: str) -> str:
        return service.competition(prompt) if "Judge" in prompt else json.dumps(problem)

    return rule


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"problem": "Compute 2 + 3.", "answer": 6, "solution": "so"}, "improved: wrong_answer"),
        ({"problem": "Compute 2 + 3.", "solution": "so"}, "improved: malformed"),
        ({"problem": " ", "answer": 5, "solution": "so"}, "improved: malformed"),
        ({"problem": ["Compute"], "answer": 5, "solution": "so"}, "improved: malformed"),
    ],
)
def test_a_wrong_improvement_is_not_taught(
    problem: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with service.Server(service.Teacher(replying(**problem))) as server:
        lesson = tutor(server.url, tmp_path).teach(PROPOSALS[0])
    assert lesson.improved is None
    assert lesson.dropped == [reason]


def test_a_request_that_is_refused_costs_only_itself(tmp_path: Path) -> None:
    teacher = service.Teacher(service.competition, refuses="Compute 3 + 7.")
    with service.Server(teacher) as server:
        lessons = teach_all(tutor(server.url, tmp_path))
    assert [one.number for one in lessons if one.improved is None] == [3]
    assert lessons[3].dropped == ["score: refused"]


def test_changed_numbers_with_the_old_answer_are_not_passed_on(tmp_path: Path) -> None:
    source = Problem("How many ways are there for 4 men?", "24", "4! = 24")
    same = Problem("How many ways are there for 5 men?", "24", "unchanged")
    assert why_not_taught(same, source=source) == "answer_unchanged"
    assert why_not_taught(source, source=source) == "not_varied"
    assert why_not_taught(same) == ""
    assert why_not_taught(Problem("Compute 1 + 1.", "")) == "no_answer"
    lazy = {"problem": "Compute 2 + 3.", "answer": 5, "solution": "2 + 3 = 5"}
    with service.Server(service.Teacher(replying(**lazy))) as server:
        lesson = tutor(server.url, tmp_path).teach(PROPOSALS[0])
    assert lesson.dropped == ["parameters: not_varied"]


def test_computer_algebra_corrects_and_varies_with_new_answers() -> None:
    teaching = Symbolic(3, seed=1)
    wrong = Proposal(4, "Basic_Math:Arithmetic", "basic", Problem("Compute 8 * 9.", "71").text())
    lesson = teaching.teach(wrong)
    assert lesson.improved == Problem("Compute 8 * 9.", "72", "Computing it gives 72.")
    assert lesson.scores["correctness"] == 0.0
    assert len({v.problem.answer for v in lesson.variations} | {"72"}) == 4
    for variation in lesson.variations:
        assert check(variation.problem) is Verdict.RIGHT
        assert why_not_taught(variation.problem, source=lesson.improved) == ""
    assert teaching.teach(wrong) == lesson


def test_computer_algebra_makes_nothing_of_what_it_cannot_compute() -> None:
    teaching = Symbolic(1, seed=1)
    words = Proposal(0, "t", "basic", "Problem: Prove that it is so.\nAnswer: yes")
    assert teaching.teach(words) == Lesson(number=0, dropped=["not_computable"])
    assert teaching.teach(Proposal(1, "t", "basic", "spam")).dropped == ["no_problem"]
