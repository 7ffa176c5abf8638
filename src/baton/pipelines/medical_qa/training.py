"""The train stage: the base, its adapter and the token files, given to the one loop."""

from __future__ import annotations

import torch

from baton.data.tokenise import TokenFile
from baton.pipelines.medical_qa import data
from baton.pipelines.medical_qa.config import MedicalQA
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.train.config import pin_key
from baton.train.environment import environment_of, make_deterministic
from baton.train.learner import Learner, build_learner
from baton.train.loop import Loop
from baton.train.loss import CausalLoss
from baton.train.precision import Precision
from baton.train.ranks import Ranks

FOLDER = "train"
SUMMARY = f"{FOLDER}/summary.json"


def train(leg: Leg) -> Outcome:
    """Train to the end or to the next handover, then write down what it took."""
    loop, learner = build_loop(leg)
    outcome = loop.run()
    if outcome is Outcome.FINISHED and leg.is_first:
        state, timing = loop.state, loop.timing
        seconds = timing.training_seconds
        best = state.best
        summary = {
            "started": timing.first_started,
            "ended": leg.now(),
            "legs": leg.record.number,
            "seconds": round(seconds, 3),
            "steps": state.step,
            "best_step": best[0] if best else state.step,
            "dev_loss": best[1] if best else None,
            "samples": state.samples,
            "tokens": state.tokens,
            "labelled_tokens": state.labelled_tokens,
            "samples_per_s": round(state.samples / seconds, 3),
            "tokens_per_s": round(state.tokens / seconds, 1),
            "peak_gpu_memory_bytes": timing.peak_gpu_memory_bytes or None,
            "trainable_parameters": learner.trainable_parameters,
            "total_parameters": learner.total_parameters,
        }
        leg.store.write(SUMMARY, dump_json(summary))
        leg.store.write(
            f"{FOLDER}/dev_history.json", dump_json([list(row) for row in state.dev_history])
        )
    return outcome


def build_loop(leg: Leg, *, stop_at: int | None = None) -> tuple[Loop, Learner]:
    """Everything the loop needs, from the task's configuration and its data folder."""
    config: MedicalQA = leg.config
    ranks = Ranks.of(leg.peers)
    if config.train.deterministic:
        make_deterministic()
    learner = learner_for(leg, ranks.device, packed=True)
    report = data.read_report(leg)
    return (
        Loop(
            leg=leg,
            ranks=ranks,
            config=config.train,
            model=learner.model,
            weights=learner.weights,
            loss=CausalLoss(
                learner.network,
                compute_dtype=Precision.choose(config.train.precision, ranks.device).dtype,
            ),
            train=TokenFile(leg.folder / data.FOLDER, "train"),
            dev=TokenFile(leg.folder / data.FOLDER, "dev"),
            folder=FOLDER,
            identity={
                "base": learner.base_fingerprint,
                "data": report["sha256"]["train.tokens"][:16],
            },
            environment=environment_of(ranks),
            allow_changed=leg.allow_changed,
            stop_at=stop_at,
        ),
        learner,
    )


def learner_for(leg: Leg, device: torch.device, *, packed: bool) -> Learner:
    """The task's model: for training (`packed`) or, on the same base, for evaluation."""
    config: MedicalQA = leg.config
    return build_learner(
        config.model,
        config.adapter,
        base_folder=leg.folder / data.BASE,
        revision=leg.plan.pins.get(pin_key(config.model), ""),
        device=device,
        compute_dtype=Precision.choose(config.train.precision, device).dtype,
        packed=packed,
        seed=config.train.seed,
        activation_checkpointing=packed and config.train.activation_checkpointing,
    )
