"""The eval stage: test questions, answered by the best checkpoint, under every convention."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from baton.data.tokenise import ChatEncoder
from baton.eval.score import score_pairs
from baton.pipelines.medical_qa import data
from baton.pipelines.medical_qa.config import MedicalQA
from baton.stage import Leg, Outcome
from baton.tuning.evaluation import Exam, Question, hold
from baton.tuning.model import TaskModel


def evaluate(leg: Leg) -> Outcome:
    """Answer what is not answered yet, then score everything."""
    config: MedicalQA = leg.config
    encoder = ChatEncoder(
        TaskModel.of(leg).tokenizer(),
        system=config.data.system,
        max_length=config.data.max_length,
    )
    questions = [
        Question(
            number=row.number,
            prompt=encoder.prompt_text(row.question),
            asked=row.question,
            reference=row.answer,
        )
        for row in chosen_rows(leg.folder, config)
    ]
    exam = Exam(
        questions=questions,
        ends=(encoder.end_of_turn,),
        exact=config.train.deterministic,
        score=lambda predictions: score_pairs(
            predictions,
            [question.reference for question in questions],
            seed=config.eval.seed,
            resamples=config.eval.bootstrap_resamples,
        ),
    )
    return hold(leg, exam)


def chosen_rows(folder: Path, config: MedicalQA) -> list[data.QARow]:
    """The test rows to answer: all, or a seeded draw; long questions together."""
    rows = data.read_test(folder)
    if config.eval.max_samples is not None and config.eval.max_samples < len(rows):
        rng = np.random.Generator(np.random.PCG64(config.eval.seed))
        rows = [rows[i] for i in rng.choice(len(rows), config.eval.max_samples, replace=False)]
    # Batches of like length pad little.
    return sorted(rows, key=lambda row: (-len(row.question), row.number))
