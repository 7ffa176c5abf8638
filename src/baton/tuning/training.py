"""The train stage: the base, its adapter and the token files, given to the one loop."""

from __future__ import annotations

import json
from typing import Any

from baton.data.tokenise import TokenFile
from baton.generation.answer import require_engine
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.train.environment import environment_of, make_deterministic
from baton.train.learner import Learner
from baton.train.loop import Loop
from baton.train.loss import CausalLoss
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.train.sharding import ranks_to_shard_over
from baton.tuning.best import HISTORY, TRAIN
from baton.tuning.final import write_final
from baton.tuning.model import DATA, Model, TaskModel, Tuning

# What training took, written at its end.
SUMMARY = "summary.json"


def train(leg: Leg) -> Outcome:
    """Train to the end or to the next handover, then write down what it took and what it made."""
    config: Tuning = leg.config
    loop, learner = build_loop(leg)
    return run(leg, loop, learner, TaskModel.of(leg), method=config.adapter.method)


def run(leg: Leg, loop: Loop, learner: Learner, model: Model, *, method: str) -> Outcome:
    """Run a loop; at its end write the summary, the history of evaluations and the best model.

    Raises:
        ConfigError: the evaluation that follows asks for an engine that is not here.
    """
    require_engine(leg.config.eval.generate)
    outcome = loop.run()
    if outcome is Outcome.FINISHED and leg.is_first:
        summarise(leg, loop, learner)
        write_final(leg, learner, model, method=method, stage=loop.folder)
    return outcome


def summarise(leg: Leg, loop: Loop, learner: Learner) -> None:
    """Write down what a finished loop took, and its evaluations, below the loop's folder."""
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
    leg.store.write(f"{loop.folder}/{SUMMARY}", dump_json(summary))
    leg.store.write(f"{loop.folder}/{HISTORY}", dump_json([list(row) for row in state.dev_history]))


def retrain(leg: Leg, step: int) -> Outcome:
    """Train a leg's newest checkpoint on to `step`, for `verify-resume`."""
    return build_loop(leg, stop_at=step)[0].run()


def build_loop(leg: Leg, *, stop_at: int | None = None) -> tuple[Loop, Learner]:
    """Everything the loop needs, from the task's configuration and its data folder."""
    config: Tuning = leg.config
    ranks = Ranks.of(leg.peers)
    if config.train.deterministic:
        make_deterministic()
    over = ranks_to_shard_over(config.train, ranks)
    learner = TaskModel.of(leg).learner(ranks.device, packed=True, over=over)
    report = read_report(leg)
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
            train=TokenFile(leg.folder / DATA, "train"),
            dev=TokenFile(leg.folder / DATA, "dev"),
            sharded=learner.sharded,
            versions=report.get("versions", 1),
            folder=TRAIN,
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


def read_report(leg: Leg) -> dict[str, Any]:
    """What the data stage counted: `rows`, `tokens` and `sha256` by name of the file.

    `versions` is how often the training file holds every sample, one an epoch; 1 if left out.
    """
    report: dict[str, Any] = json.loads(leg.store.read(f"{DATA}/report.json"))
    return report
