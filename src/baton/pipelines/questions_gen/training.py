"""The three training stages: supervised, by reward, by a teacher; each begins where one ended."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from baton.data.tokenise import ChatEncoder, TokenFile
from baton.generation.sampler import Sampler
from baton.pipelines.questions_gen.config import QuestionsGen
from baton.pipelines.questions_gen.data import read_part
from baton.pipelines.questions_gen.grpo_loss import GrpoLoss
from baton.pipelines.questions_gen.independent import Judge
from baton.pipelines.questions_gen.memory import log_memory
from baton.pipelines.questions_gen.prompts import Request
from baton.pipelines.questions_gen.reference import Reference
from baton.pipelines.questions_gen.rollouts import Policy, Rollouts
from baton.pipelines.questions_gen.scoring import Scorer
from baton.pipelines.questions_gen.validation import Validation
from baton.stage import Leg, Outcome
from baton.train.batch import TokenSource
from baton.train.batching import Packed, pad_multiple
from baton.train.config import TrainConfig
from baton.train.cursor import Indices
from baton.train.environment import environment_of, make_deterministic
from baton.train.learner import Learner
from baton.train.logprobs import TokenLogprobs
from baton.train.loop import Loop
from baton.train.loss import CausalLoss
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.tuning.best import fetch_best
from baton.tuning.model import DATA, TaskModel
from baton.tuning.training import read_report, run

SFT, GRPO, DISTILL = "sft", "grpo", "distill"
STAGES = (SFT, GRPO, DISTILL)


def train_sft(leg: Leg) -> Outcome:
    """Supervised fine-tuning on the kept problems."""
    return _train(leg, SFT)


def train_grpo(leg: Leg) -> Outcome:
    """Group relative policy optimisation from the best supervised weights."""
    return _train(leg, GRPO)


def train_distill(leg: Leg) -> Outcome:
    """Supervised fine-tuning on what the teacher made, from the best weights of GRPO."""
    return _train(leg, DISTILL)


def retrain(leg: Leg, step: int) -> Outcome:
    """Train a leg's newest checkpoint on to `step`, for `verify-resume`."""
    return Trainee(leg, leg.record.stage).loop(stop_at=step).run()


def config_of(config: QuestionsGen, stage: str) -> TrainConfig:
    """What a training stage is told."""
    chosen: TrainConfig = getattr(config, stage)
    return chosen


def task_model(leg: Leg, stage: str) -> TaskModel:
    """The task's model as a stage trains it."""
    config: QuestionsGen = leg.config
    view = config.view(config_of(config, stage))
    return TaskModel(config=view, folder=leg.folder, pins=leg.plan.pins)


def load_best(leg: Leg, learner: Learner, stage: str, ranks: Ranks) -> int:
    """Give a learner the best weights of a finished stage; returns their step."""
    folder = leg.folder / f".begin-{ranks.rank}"
    checkpoints = leg.checkpoints(f"{stage}/checkpoints")
    step = fetch_best(checkpoints, leg.store, folder, task=leg.task.name, stage=stage)
    learner.weights.load(folder)
    shutil.rmtree(folder)
    return step


def _train(leg: Leg, stage: str) -> Outcome:
    config: QuestionsGen = leg.config
    trainee = Trainee(leg, stage)
    loop = trainee.loop()
    log_memory(leg, trainee.ranks.device, f"{stage} begins")
    outcome = run(leg, loop, trainee.learner, trainee.model, method=config.adapter.method)
    log_memory(leg, trainee.ranks.device, f"{stage} ends")
    return outcome


class Trainee:
    """The model of a stage with all that its loop needs."""

    def __init__(self, leg: Leg, stage: str) -> None:
        self.leg, self.stage = leg, stage
        self.config: QuestionsGen = leg.config
        self.train = config_of(self.config, stage)
        self.ranks = Ranks.of(leg.peers)
        if self.train.deterministic:
            make_deterministic()
        self.model = task_model(leg, stage)
        self.learner = self.model.learner(self.ranks.device, packed=True)
        self.begin = ""
        before = STAGES.index(stage)
        if before:
            step = load_best(leg, self.learner, STAGES[before - 1], self.ranks)
            self.begin = f"{STAGES[before - 1]} {step}"
        self.tokenizer = self.model.tokenizer()
        self.precision = Precision.choose(self.train.precision, self.ranks.device)
        self.dtype = self.precision.dtype
        self.report = read_report(leg)
        grpo = self.config.grpo
        self.sampler = Sampler(
            model=self.learner.model,
            sampling=grpo.sampling,
            max_new_tokens=grpo.max_new_tokens,
            ends=[self._encoder().end_of_turn],
            rows=grpo.sample_batch,
        )

    def loop(self, *, stop_at: int | None = None) -> Loop:
        learner = self.learner
        causal = CausalLoss(learner.network, compute_dtype=self.dtype)
        folder = DISTILL if self.stage == DISTILL else DATA
        samples: dict[str, Any] = {"train": TokenFile(self.leg.folder / DATA, "train")}
        data = self.report["sha256"]["train.tokens"][:16]
        if self.stage == DISTILL:
            samples = {"train": TokenFile(self.leg.folder / folder / "taught", "train")}
            data = self._taught()
        special: dict[str, Any] = {"loss": causal}
        if self.stage == GRPO:
            rollouts, loss = self._rollouts()
            packed = self._packed()
            samples = {"train": rollouts}
            special = {
                "loss": loss,
                "batching": rollouts,
                "maker": rollouts,
                "dev_loss": causal,
                "dev_batching": packed,
            }
        return Loop(
            leg=self.leg,
            ranks=self.ranks,
            config=self._loop_config(),
            model=learner.model,
            weights=learner.weights,
            dev=TokenFile(self.leg.folder / DATA, "dev"),
            score=self._validation(),
            folder=self.stage,
            identity={"base": learner.base_fingerprint, "data": data, "begin": self.begin},
            environment=environment_of(self.ranks),
            allow_changed=self.leg.allow_changed,
            stop_at=stop_at,
            **samples,
            **special,
        )

    def _loop_config(self) -> TrainConfig:
        if self.stage == GRPO:
            return dataclasses.replace(
                self.config.grpo, batch_samples=self.config.grpo.samples_a_step
            )
        return self.train

    def _taught(self) -> str:
        report = json.loads(self.leg.store.read(f"{DISTILL}/taught/report.json"))
        return str(report["sha256"]["train.tokens"][:16])

    def _packed(self) -> Packed:
        return Packed(self.ranks.device, pad_multiple(self.ranks.device, self.precision))

    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, system=None, max_length=self.config.data.max_length)

    def _validation(self) -> Validation:
        return Validation.of(
            self.leg,
            self.ranks,
            stage=self.stage,
            stages_before=STAGES[: STAGES.index(self.stage)],
            sampler=self.sampler,
            tokenizer=self.tokenizer,
            encoder=self._encoder(),
        )

    def _rollouts(self) -> tuple[Rollouts, GrpoLoss]:
        config = self.config.grpo
        rows = read_part(self.leg.folder, "train")
        logprobs = TokenLogprobs(
            self.learner.network,
            compute_dtype=self.dtype,
            temperature=config.sampling.temperature,
        )
        loss = GrpoLoss(logprobs, clip=config.clip, beta=config.beta, corrected=config.corrected_kl)
        rollouts = Rollouts(
            leg=self.leg,
            ranks=self.ranks,
            folder=self.stage,
            config=config,
            requests=[row.request for row in rows],
            policy=self._policy(logprobs),
            scorer=Scorer(config.reward, Judge.of([row.problem for row in rows])),
            loss=loss,
            packed=self._packed(),
        )
        return rollouts, loss

    def _policy(self, logprobs: TokenLogprobs) -> Policy:
        config = self.config.grpo
        encoder, tokenizer = self._encoder(), self.tokenizer
        room = self.config.data.max_length - config.max_new_tokens
        reference = Reference(self.learner.model) if config.beta else None

        def draw(prompts: list[list[int]], count: int, seeds: list[int]) -> list[list[int]] | None:
            return self.sampler.draw(
                prompts, seeds, count=count, should_stop=lambda: self.leg.stop.is_urgent
            )

        def encode(requests: Sequence[Request]) -> list[list[int] | None]:
            texts = [encoder.prompt_text(request.text()) for request in requests]
            rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return [row if len(row) <= room else None for row in rows]

        def decode(rows: list[list[int]]) -> list[str]:
            texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
            return [text.strip() for text in texts]

        def now(source: TokenSource, indices: Indices) -> list[np.ndarray[Any, Any]]:
            return self._logprobs(logprobs, source, indices)

        def then(source: TokenSource, indices: Indices) -> list[np.ndarray[Any, Any]]:
            assert reference is not None, "asked with beta only"
            with reference.restored():
                return self._logprobs(logprobs, source, indices)

        return Policy(sample=draw, encode=encode, decode=decode, logprobs=now, reference=then)

    def _logprobs(
        self, logprobs: Callable[[Any], torch.Tensor], source: TokenSource, indices: Indices
    ) -> list[np.ndarray[Any, Any]]:
        """Log-probabilities of each sample's labels, through the very forward that trains."""
        packed, budget = self._packed(), self.config.grpo.tokens_per_micro_batch
        found: dict[int, np.ndarray[Any, Any]] = {}
        self.learner.model.eval()
        [share] = packed.cut(source, indices, ranks=1, budget=budget)
        for places in share:
            rows = indices[places]
            batch = packed.collate(source, rows, budget=budget)
            with torch.no_grad(), self.precision.autocast():
                values = logprobs(batch).cpu().numpy()
            ends = np.cumsum(source.labelled(rows))
            for place, part in zip(places, np.split(values, ends[:-1]), strict=True):
                found[place] = part
        return [found[place] for place in range(len(indices))]
