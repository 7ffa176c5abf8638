"""The eval stage: test rows with and without their oracle, answered and judged."""

from __future__ import annotations

import numpy as np

from baton.pipelines.raft.config import Raft
from baton.pipelines.raft.data import AskedRow, read_test
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.prompt import Prompter
from baton.pipelines.raft.scores import Given, score_answers
from baton.stage import Leg, Outcome
from baton.tuning.evaluation import Exam, Question, hold
from baton.tuning.model import TaskModel


def evaluate(leg: Leg) -> Outcome:
    """Answer what is not answered yet, then score everything."""
    config: Raft = leg.config
    format = load_format(config.data.format)
    prompter = Prompter(TaskModel.of(leg).tokenizer(), format, max_length=config.data.max_length)
    rows = _chosen(read_test(leg.folder), config)
    given = [
        Given(documents=row.documents, oracle=row.oracle, reference=row.reference) for row in rows
    ]
    questions = [
        Question(
            number=row.number,
            prompt=prompter.prompt_text(row.question, row.documents),
            asked=row.question,
            reference=row.reference,
            notes={"oracle": row.oracle, "documents": row.documents},
        )
        for row in rows
    ]
    exam = Exam(
        questions=questions,
        ends=(prompter.end_of_turn,),
        exact=config.train.deterministic,
        score=lambda answers: score_answers(
            answers,
            given,
            format,
            seed=config.eval.seed,
            resamples=config.eval.bootstrap_resamples,
        ),
    )
    return hold(leg, exam)


def _chosen(rows: list[AskedRow], config: Raft) -> list[AskedRow]:
    """All, or a seeded draw of questions with everything asked about them; long ones together."""
    limit = config.eval.max_samples
    pairs = sorted({row.number // 2 for row in rows})
    if limit is not None and limit < len(pairs):
        rng = np.random.Generator(np.random.PCG64(config.eval.seed))
        drawn = {pairs[i] for i in rng.choice(len(pairs), limit, replace=False)}
        rows = [row for row in rows if row.number // 2 in drawn]
    # Batches of like length pad little.
    return sorted(rows, key=lambda row: (-sum(map(len, row.documents)), row.number))
