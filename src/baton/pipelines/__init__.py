"""The table of pipelines: what a `pipeline:` line in an experiment may name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.eval.answer import Answerer, Trained
from baton.stage import Leg, Outcome, Stage


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline, loaded in two steps: its configuration without torch, its stages with it.

    Attributes:
        config: the dataclass that a task's configuration decodes to.
        stage_names: in order; `load_stages` returns the stages of these names.
        load_retrain: returns what trains a leg's newest checkpoint on to a given step, for
            `verify-resume`.
        load_answer: returns what makes a trained task answer, for `generate`.
        cpu_stages: those that need no GPU; split off, their jobs ask for none.
        training_stages: those that train and keep checkpoints, in order; the last one that has
            final weights is what is exported.
    """

    name: str
    config: type[Any]
    stage_names: tuple[str, ...]
    load_stages: Callable[[], tuple[Stage, ...]]
    load_retrain: Callable[[], Callable[[Leg, int], Outcome]]
    load_answer: Callable[[], Callable[[Trained], Answerer]]
    cpu_stages: tuple[str, ...] = ("data",)
    training_stages: tuple[str, ...] = ("train",)


def _load_tuning() -> Callable[[Leg, int], Outcome]:
    from baton.tuning.training import retrain

    return retrain


def _clara() -> Pipeline:
    from baton.pipelines.clara.config import STAGES, Clara

    def load() -> tuple[Stage, ...]:
        from baton.pipelines.clara.stages import STAGES

        return STAGES

    def load_retrain() -> Callable[[Leg, int], Outcome]:
        from baton.pipelines.clara.training import retrain

        return retrain

    def answer() -> Callable[[Trained], Answerer]:
        from baton.pipelines.clara.answer import ClaraAnswerer

        return ClaraAnswerer

    return Pipeline(
        name="clara",
        config=Clara,
        stage_names=("data", *STAGES, "eval"),
        load_stages=load,
        load_retrain=load_retrain,
        load_answer=answer,
        training_stages=STAGES,
    )


def _medical_qa() -> Pipeline:
    from baton.pipelines.medical_qa.config import MedicalQA

    def load() -> tuple[Stage, ...]:
        from baton.pipelines.medical_qa.stages import STAGES

        return STAGES

    def answer() -> Callable[[Trained], Answerer]:
        from baton.pipelines.medical_qa.answer import MedicalQAAnswerer

        return MedicalQAAnswerer

    return Pipeline(
        name="medical_qa",
        config=MedicalQA,
        stage_names=("data", "train", "eval"),
        load_stages=load,
        load_retrain=_load_tuning,
        load_answer=answer,
    )


def _raft() -> Pipeline:
    from baton.pipelines.raft.config import Raft

    def load() -> tuple[Stage, ...]:
        from baton.pipelines.raft.stages import STAGES

        return STAGES

    def answer() -> Callable[[Trained], Answerer]:
        from baton.pipelines.raft.answer import RaftAnswerer

        return RaftAnswerer

    return Pipeline(
        name="raft",
        config=Raft,
        stage_names=("data", "train", "eval"),
        load_stages=load,
        load_retrain=_load_tuning,
        load_answer=answer,
    )


def _t5_pretrain() -> Pipeline:
    from baton.pipelines.t5_pretrain.config import T5Pretrain

    def load() -> tuple[Stage, ...]:
        from baton.pipelines.t5_pretrain.stages import STAGES

        return STAGES

    def load_retrain() -> Callable[[Leg, int], Outcome]:
        from baton.pipelines.t5_pretrain.training import retrain

        return retrain

    def answer() -> Callable[[Trained], Answerer]:
        from baton.pipelines.t5_pretrain.answer import T5Answerer

        return T5Answerer

    return Pipeline(
        name="t5_pretrain",
        config=T5Pretrain,
        stage_names=("data", "train", "eval"),
        load_stages=load,
        load_retrain=load_retrain,
        load_answer=answer,
    )


def _questions_gen() -> Pipeline:
    from baton.pipelines.questions_gen.config import QuestionsGen

    def load() -> tuple[Stage, ...]:
        from baton.pipelines.questions_gen.stages import STAGES

        return STAGES

    def load_retrain() -> Callable[[Leg, int], Outcome]:
        from baton.pipelines.questions_gen.training import retrain

        return retrain

    def answer() -> Callable[[Trained], Answerer]:
        from baton.pipelines.questions_gen.answer import QuestionsGenAnswerer

        return QuestionsGenAnswerer

    return Pipeline(
        name="questions_gen",
        config=QuestionsGen,
        stage_names=("data", "sft", "grpo", "propose", "teach", "distill", "eval"),
        load_stages=load,
        load_retrain=load_retrain,
        load_answer=answer,
        cpu_stages=("data", "teach"),
        training_stages=("sft", "grpo", "distill"),
    )


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "clara": _clara,
    "medical_qa": _medical_qa,
    "questions_gen": _questions_gen,
    "raft": _raft,
    "t5_pretrain": _t5_pretrain,
}
"""clara: documents as memory vectors, retrieval learnt from answers. medical_qa: LoRA and QLoRA
over data scale on question answering. questions_gen: competition problems by examples, by reward,
by a teacher. raft: a teacher's grounded answers, distilled. t5_pretrain: an encoder-decoder from
nothing."""
