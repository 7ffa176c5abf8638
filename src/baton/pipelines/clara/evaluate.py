"""The eval stage: test rows answered from vectors, and by the base from texts; all scored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from baton.errors import DataError
from baton.eval.config import GenerateConfig
from baton.eval.generate import Answers
from baton.eval.score import ScoreSheet
from baton.pipelines.clara.config import Clara, System
from baton.pipelines.clara.data import TestRow, read_test
from baton.pipelines.clara.model import ClaraLearner
from baton.pipelines.clara.responder import Asked, Responder
from baton.pipelines.clara.scores import Answered, score_systems
from baton.pipelines.clara.training import StageModel
from baton.stage import Leg, Outcome
from baton.store.publish import publish
from baton.train.precision import Precision
from baton.tuning.evaluation import Exam, Question, hold, shard_name
from baton.tuning.model import TaskModel


def evaluate(leg: Leg) -> Outcome:
    """Answer what is not answered yet, then score everything and write the model card."""
    config: Clara = leg.config
    rows = _chosen(read_test(leg.folder), config)
    if not rows:
        raise DataError("there are no test rows; name some in data.test, or raise data.held_out")
    examinee = Examinee(leg)
    questions = [
        Question(
            number=row.number * len(config.eval.systems) + position,
            prompt=(system, Asked(row.question, tuple(row.documents))),
            asked=row.question,
            reference=row.golds[0],
            notes={"system": system, "golds": row.golds, "positives": row.positives},
        )
        for position, system in enumerate(config.eval.systems)
        for row in rows
    ]
    exam = Exam(
        questions=questions,
        ends=(),
        score=lambda answers: _score(leg, rows, answers),
        model=examinee,
        answer=examinee.answer,
        stage=config.until,
        before=config.trained[:-1],
    )
    outcome = hold(leg, exam)
    if outcome is Outcome.FINISHED and leg.is_first:
        # A store that people load models from writes its own over it, with its address.
        publish(leg.store, "", (config.until,))
    return outcome


class Examinee:
    """The model of the last trained stage, as the exam wants it."""

    def __init__(self, leg: Leg) -> None:
        config: Clara = leg.config
        self._config = config
        self._model = StageModel.of(leg, config.until)
        self._task = TaskModel.of(leg)
        self._responder: Responder | None = None

    def tokenizer(self) -> Any:
        return self._model.tokenizer()

    def description(self) -> dict[str, str]:
        return self._model.description()

    def learner(self, device: torch.device, *, packed: bool) -> ClaraLearner:
        config = self._config
        learner = self._model.learner(device, packed=packed)
        self._responder = Responder(
            learner,
            top_k=config.stage(config.until).documents,
            retrieves=config.until == "stage3",
            precision=Precision.choose(config.stage(config.until).train.precision, device),
        )
        return learner

    def answer(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[tuple[System, Asked]],
        config: GenerateConfig,
        *,
        ends: Sequence[int],
        seed: int,
        should_stop: Callable[[], bool],
    ) -> Answers | None:
        """Answer a batch, of several systems perhaps, in the order of the prompts."""
        assert self._responder is not None, "the learner was asked for first"
        parts: list[tuple[list[int], Answers, list[list[int]] | None]] = []
        for system in dict.fromkeys(system for system, _ in prompts):
            places = [i for i, (own, _) in enumerate(prompts) if own == system]
            asks = [prompts[i][1] for i in places]
            chosen: list[list[int]] | None = None
            if system == "clara":
                found, chosen = self._responder.answer(
                    asks, config, seed=seed, should_stop=should_stop
                )
            else:
                if system == "no_document":
                    asks = [dataclasses.replace(ask, documents=()) for ask in asks]
                limit = self._text_limit(config)
                found = self._responder.answer_from_text(
                    asks, config, limit=limit, seed=seed, should_stop=should_stop
                )
            if found is None:
                return None
            parts.append((places, found, chosen))
        return _joined(len(prompts), parts)

    def _text_limit(self, config: GenerateConfig) -> int | None:
        context = self._task.context()
        return None if context is None else context - config.max_new_tokens


def _joined(
    count: int, parts: Sequence[tuple[list[int], Answers, list[list[int]] | None]]
) -> Answers:
    texts, tokens = [""] * count, [0] * count
    notes: list[dict[str, Any]] = [{} for _ in range(count)]
    for places, answers, chosen in parts:
        for position, place in enumerate(places):
            texts[place] = answers.texts[position]
            tokens[place] = answers.new_tokens[position]
            if chosen is not None:
                notes[place] = {"chosen": chosen[position]}
    return Answers(texts, tokens, sum(answers.seconds for _, answers, _ in parts), notes)


def _score(leg: Leg, rows: Sequence[TestRow], answers: Sequence[str]) -> ScoreSheet:
    config: Clara = leg.config
    notes: list[dict[str, Any]] = []
    number = 0
    while len(notes) < len(answers):
        notes += json.loads(leg.store.read(shard_name(number)))["notes"]
        number += 1
    systems: dict[str, list[Answered]] = {}
    for position, system in enumerate(config.eval.systems):
        span = slice(position * len(rows), (position + 1) * len(rows))
        systems[system] = [
            Answered(
                prediction=answer,
                golds=row.golds,
                chosen=note.get("chosen") if config.until == "stage3" else None,
                positives=row.positives,
            )
            for row, answer, note in zip(rows, answers[span], notes[span], strict=True)
        ]
    return score_systems(systems, seed=config.eval.seed, resamples=config.eval.bootstrap_resamples)


def _chosen(rows: list[TestRow], config: Clara) -> list[TestRow]:
    """All, or a seeded draw."""
    limit = config.eval.max_samples
    if limit is None or limit >= len(rows):
        return rows
    rng = np.random.Generator(np.random.PCG64(config.eval.seed))
    drawn = sorted(rng.choice(len(rows), limit, replace=False).tolist())
    return [rows[i] for i in drawn]
