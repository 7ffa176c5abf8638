"""The eval stage: validation prompts, answered by the best checkpoint, under every convention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from baton.data.pairs import PairEncoder
from baton.eval.config import GenerateConfig
from baton.eval.generate import Answers, generate_responses
from baton.eval.score import ScoreSheet, char_bleu, score_pairs
from baton.pipelines.t5_pretrain import data
from baton.pipelines.t5_pretrain.config import T5Pretrain
from baton.pipelines.t5_pretrain.model import PairModel
from baton.stage import Leg, Outcome
from baton.tuning.evaluation import Exam, Question, hold


def evaluate(leg: Leg) -> Outcome:
    """Answer what is not answered yet, then score everything."""
    config: T5Pretrain = leg.config
    model = PairModel.of(leg)
    encoder = PairEncoder(model.tokenizer(), max_seq_len=config.data.max_seq_len)
    questions = [
        Question(number=pair.number, prompt=pair.prompt, asked=pair.prompt, reference=pair.response)
        for pair in _chosen(leg)
    ]

    def answer(
        network: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        generating: GenerateConfig,
        *,
        ends: Sequence[int],
        **options: Any,
    ) -> Answers | None:
        encoded = encoder.encode(prompts)
        return generate_responses(network, tokenizer, encoded, generating, **options)

    def score(predictions: Sequence[str]) -> ScoreSheet:
        references = [question.reference for question in questions]
        drawn = {"seed": config.eval.seed, "resamples": config.eval.bootstrap_resamples}
        sheet = score_pairs(predictions, references, **drawn)
        first = char_bleu(predictions, references, **drawn)
        return dataclasses.replace(sheet, scores=[first, *sheet.scores])

    return hold(leg, Exam(questions=questions, ends=(), score=score, model=model, answer=answer))


def _chosen(leg: Leg) -> list[data.Pair]:
    """The validation pairs to answer: all, or a seeded draw; long prompts together."""
    config: T5Pretrain = leg.config
    pairs = list(data.read_valid(leg.folder))
    if config.eval.max_samples is not None and config.eval.max_samples < len(pairs):
        rng = np.random.Generator(np.random.PCG64(config.eval.seed))
        pairs = [pairs[i] for i in rng.choice(len(pairs), config.eval.max_samples, replace=False)]
    return sorted(pairs, key=lambda pair: (-len(pair.prompt), pair.number))
