"""The three stages that train: each goes on from the one before, through the one loop."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from baton.errors import NameMissing
from baton.pipelines.clara.batch import BySamples, ClaraSource
from baton.pipelines.clara.config import STAGES, Clara, Stage3, StageName
from baton.pipelines.clara.data import vocabulary_of
from baton.pipelines.clara.final import ABOUT, about, loading
from baton.pipelines.clara.losses import ReadingLoss, RetrievalLoss
from baton.pipelines.clara.model import (
    DECODER,
    ENCODER,
    MEMORY,
    REASONER,
    ROLES,
    ClaraLearner,
    ClaraWeights,
    build,
    copy_weights,
)
from baton.pipelines.clara.presets import Preset, chosen, loop_config, preset_for
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.store.checkpoint import sha256_of
from baton.store.publish import LOADING
from baton.train.adapters import WEIGHTS
from baton.train.batching import pad_multiple
from baton.train.config import RandomModel
from baton.train.environment import environment_of, make_deterministic
from baton.train.layers import is_compiled
from baton.train.loop import Loop
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.tuning.final import place_final
from baton.tuning.model import DATA, TaskModel
from baton.tuning.training import read_report, summarise


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """The model of one stage of a task; `folder` is the task's."""

    config: Clara
    task: TaskModel
    stage: StageName

    @classmethod
    def of(cls, leg: Leg, stage: StageName) -> StageModel:
        return cls(config=leg.config, task=TaskModel.of(leg), stage=stage)

    def tokenizer(self) -> Any:
        """The base's own, with the tokens of clara."""
        return vocabulary_of(self.config, self.task.tokenizer()).tokenizer

    def description(self) -> dict[str, str]:
        """The model as records name it."""
        return self.task.description()

    def learner(self, device: torch.device, *, packed: bool) -> ClaraLearner:
        """The model with fresh adapters: to train (`packed`), or to load into and generate."""
        config, train = self.config, self.config.stage(self.stage).train
        return build(
            config.model,
            config.adapter,
            self.task.tokenizer(),
            stage=self.stage,
            vectors=config.memory.vectors,
            encoder_tokens=config.memory.encoder_tokens,
            base_folder=self.task.base,
            revision=self.task.revision,
            device=device,
            compute_dtype=Precision.choose(train.precision, device).dtype,
            seed=train.seed,
            compiled=packed and is_compiled(train, device),
        )


def stage_of(name: StageName) -> Callable[[Leg], Outcome]:
    """What runs a stage: to its end or to the next handover."""

    def run(leg: Leg) -> Outcome:
        config: Clara = leg.config
        if name not in config.trained:
            leg.log("passed over", until=config.until)
            return Outcome.FINISHED
        loop, learner = build_loop(leg, name)
        outcome = loop.run()
        if outcome is Outcome.FINISHED and leg.is_first:
            summarise(leg, loop, learner)
            _write_final(leg, name)
        return outcome

    return run


def retrain(leg: Leg, step: int) -> Outcome:
    """Train a leg's newest checkpoint on to `step`, for `verify-resume`."""
    name = next(stage for stage in STAGES if stage == leg.record.stage)
    return build_loop(leg, name, stop_at=step)[0].run()


def build_loop(
    leg: Leg, name: StageName, *, stop_at: int | None = None
) -> tuple[Loop, ClaraLearner]:
    """Everything the loop needs, from the task's configuration, data and earlier stages."""
    config: Clara = leg.config
    ranks = Ranks.of(leg.peers)
    stage = config.stage(name)
    if stage.train.deterministic:
        make_deterministic()
    sizes = _sizes(leg, ranks, name)
    learner = StageModel.of(leg, name).learner(ranks.device, packed=True)
    origin = _start_from_earlier(leg, name, learner)
    precision = Precision.choose(stage.train.precision, ranks.device)
    loss: ReadingLoss | RetrievalLoss
    if isinstance(stage, Stage3):
        loss = RetrievalLoss(learner, stage, compute_dtype=precision.dtype)
    else:
        loss = ReadingLoss(learner, stage, compute_dtype=precision.dtype)
    ids = learner.vocabulary.memory_ids
    has_queries = name == "stage3"
    folder = leg.folder / DATA
    loop = Loop(
        leg=leg,
        ranks=ranks,
        config=loop_config(config, name, sizes),
        model=learner.model,
        weights=learner.weights,
        loss=loss,
        part=loss.part,
        batching=BySamples(
            device=ranks.device,
            full=config.full_sample(name),
            memory_ids=(ids[0], ids[-1] + 1),
            share_documents=has_queries,
            pad_to=pad_multiple(ranks.device, precision),
        ),
        train=ClaraSource(folder, f"{name}/train", has_queries=has_queries, most=sizes.samples),
        dev=ClaraSource(folder, f"{name}/dev", has_queries=has_queries, most=None),
        folder=name,
        identity={
            "base": learner.base_fingerprint,
            "data": read_report(leg)["sha256"][f"{name}/train.tokens"][:16],
            **origin,
        },
        environment=environment_of(ranks),
        allow_changed=leg.allow_changed,
        stop_at=stop_at,
    )
    return loop, learner


def _sizes(leg: Leg, ranks: Ranks, name: StageName) -> Preset:
    """Batch, micro-batch and samples; a preset is chosen by the first leg and kept."""
    config: Clara = leg.config
    train = config.stage(name).train
    preset = train.preset
    if preset == "auto":
        kept = f"{name}/preset.json"
        try:
            preset = json.loads(leg.store.read(kept))["preset"]
        except NameMissing:
            preset = ranks.broadcast(_preset_of(ranks.device))
            if leg.is_first:
                leg.store.write(kept, dump_json({"preset": preset}))
    sizes = chosen(train, name, preset)
    leg.log(
        "preset",
        name=preset,
        batch_samples=sizes.batch_samples,
        micro_batch=sizes.micro_batch,
        samples=sizes.samples or "all",
    )
    return sizes


def _preset_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "off"
    return preset_for(torch.cuda.get_device_properties(device).total_memory / 1e9)


def _start_from_earlier(leg: Leg, name: StageName, learner: ClaraLearner) -> dict[str, str]:
    """Give a fresh model what earlier stages trained; returns what identifies it.

    Stage 2 takes the encoder of stage 1 (and its decoder, if asked to); stage 3 takes encoder and
    decoder of stage 2, and its query reasoner starts as a copy of the encoder.
    """
    config: Clara = leg.config
    if name == "stage1":
        return {}
    earlier = leg.folder / STAGES[STAGES.index(name) - 1] / "final"
    weights: Any = learner.weights
    assert isinstance(weights, ClaraWeights)
    roles = [ENCODER, DECODER]
    if name == "stage2" and config.stage2.init_decoder == "fresh":
        roles = [ENCODER]
    weights.load_only(earlier, roles)
    if name == "stage3":
        weights.start_from(earlier, ENCODER, REASONER)
    digest = hashlib.sha256()
    for file in [*(f"{role}/{WEIGHTS}" for role in roles), MEMORY]:
        digest.update(sha256_of(earlier / file).encode())
    return {"from": digest.hexdigest()[:16]}


def _write_final(leg: Leg, name: StageName) -> None:
    """Put the best weights below `<stage>/final`, as a folder that loads by itself."""
    config: Clara = leg.config
    model = StageModel.of(leg, name)

    def fill(best: Path, final: Path) -> None:
        copy_weights(best, final, ROLES[name])
        model.tokenizer().save_pretrained(final)
        (final / ABOUT).write_bytes(dump_json(about(config, name, model.description())))
        (final / LOADING).write_text(loading(), encoding="utf-8")
        if isinstance(config.model, RandomModel):
            # Nobody could fetch it from anywhere.
            shutil.copytree(model.task.base, final / "base")

    place_final(leg, model, fill, method=config.adapter.method, stage=name)
