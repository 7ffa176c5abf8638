"""The eval stage: each training stage's best model answers the same prompts, and is compared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from baton.data.tokenise import ChatEncoder
from baton.eval.bootstrap import Floats, bootstrap_mean, paired_difference
from baton.eval.score import Score, ScoreSheet
from baton.pipelines.questions_gen.config import QuestionsGen
from baton.pipelines.questions_gen.data import read_part
from baton.pipelines.questions_gen.evaluator import Quality, grade
from baton.pipelines.questions_gen.evaluator import evaluate as evaluate_one
from baton.pipelines.questions_gen.independent import Independent, Judge
from baton.pipelines.questions_gen.rewards import Reward, keyword_rewards
from baton.pipelines.questions_gen.scoring import question
from baton.pipelines.questions_gen.tfidf import History
from baton.pipelines.questions_gen.training import DISTILL, STAGES, task_model
from baton.stage import Leg, Outcome
from baton.tuning.evaluation import Exam, Question, hold

_CURVES = ("reward", "keyword", "independent")
# In the order of tables and plots.
_MEANINGS = {
    "quality": "evaluator, six checkable parts, 0 to 1",
    "independent": "well formed x (new, answer checked), what keywords cannot win",
    "right": "share of answers that computing confirms",
    "content": "answer computed right 1, a number 0.5, words 0.25, else 0",
    "clarity": "formal checks that hold",
    "difficulty": "steps of the solution with a relation, of six",
    "completeness": "problem, answer, solution, and the solution reaches the answer",
    "originality": "1 - TF-IDF cosine to the nearest training problem",
    "educational": "topic recognised, solution says why",
    "repetition": "share of word triples that repeat themselves; less is better",
    "keyword": "R = 0.4 D + 0.3 N + 0.2 G + 0.1 V, which keywords can win",
}


@dataclass(frozen=True)
class Written:
    """One problem, as everybody judges it."""

    quality: Quality
    independent: Independent
    keyword: Reward

    def values(self) -> dict[str, float]:
        return {
            "quality": self.quality.total,
            **asdict(self.quality),
            "independent": self.independent.total,
            "right": float(self.independent.is_right),
            "repetition": self.independent.repetition,
            "keyword": self.keyword.total,
        }


def evaluate(leg: Leg) -> Outcome:
    """Answer what is not answered yet, then score everything."""
    config: QuestionsGen = leg.config
    model = task_model(leg, DISTILL)
    encoder = ChatEncoder(model.tokenizer(), system=None, max_length=config.data.max_length)
    rows = read_part(leg.folder, "test")
    limit = config.eval.max_samples
    if limit is not None and limit < len(rows):
        rng = np.random.Generator(np.random.PCG64(config.eval.seed))
        rows = [rows[i] for i in sorted(rng.choice(len(rows), limit, replace=False))]
    questions = [
        Question(
            number=row.number,
            prompt=encoder.prompt_text(row.request.text()),
            asked=f"{stage}: {row.request.topic}, {row.request.difficulty}",
            reference=row.target.text(),
            notes={"stage": stage},
            stage=stage,
        )
        for stage in STAGES
        for row in rows
    ]
    training = [row.problem for row in read_part(leg.folder, "train")]
    exam = Exam(
        questions=questions,
        ends=(encoder.end_of_turn,),
        exact=config.grpo.deterministic,
        score=lambda answers: score_stages(
            answers,
            training,
            history=config.grpo.reward.history,
            seed=config.eval.seed,
            resamples=config.eval.bootstrap_resamples,
        ),
        model=model,
        curves=_CURVES,
    )
    return hold(leg, exam)


def score_stages(
    answers: Sequence[str], training: Sequence[str], *, history: int, seed: int, resamples: int
) -> ScoreSheet:
    """Every score of every stage with its interval, and what each stage gained over the last.

    `answers` are those of each stage in turn, to the same prompts.
    """
    count = len(answers) // len(STAGES)
    judge = Judge.of(training)
    known = History(history)
    for problem in training[:history]:
        known.add(problem)
    columns: dict[str, dict[str, Floats]] = {}
    for number, stage in enumerate(STAGES):
        written = _judged(answers[number * count : (number + 1) * count], judge, known)
        columns[stage] = {
            name: np.array([one.values()[name] for one in written]) for name in _MEANINGS
        }
    drawn = {"seed": seed, "resamples": resamples}
    scores = [
        Score.of(
            bootstrap_mean(values, **drawn),
            n=count,
            column=f"{name}_{stage}",
            name=f"{name} ({stage})",
            convention=_meaning(name, values),
        )
        for stage, named in reversed(columns.items())  # the task's own model first
        for name, values in named.items()
    ]
    for earlier, later in itertools.pairwise(STAGES):
        gained = paired_difference(columns[later]["quality"], columns[earlier]["quality"], **drawn)
        scores.append(
            Score.of(
                gained,
                n=count,
                column=f"quality_{later}_minus_{earlier}",
                name="quality gained",
                convention=f"{later} - {earlier}, the same prompts"
                + ("" if gained.excludes_zero else "; not decided: the interval holds 0"),
            )
        )
    return ScoreSheet(
        scores=scores,
        per_sample={
            f"{name}_{stage}": values
            for stage, named in columns.items()
            for name, values in named.items()
        },
        seed=seed,
        resamples=resamples,
    )


def _judged(texts: Sequence[str], judge: Judge, history: History) -> list[Written]:
    keywords = keyword_rewards([question(text) for text in texts], history)
    judged = [judge.score(text) for text in texts]
    return [
        Written(evaluate_one(text, j), j, k)
        for text, j, k in zip(texts, judged, keywords, strict=True)
    ]


def _meaning(name: str, values: Floats) -> str:
    meaning = _MEANINGS[name]
    return f"{meaning}; grade {grade(float(values.mean()))}" if name == "quality" else meaning
