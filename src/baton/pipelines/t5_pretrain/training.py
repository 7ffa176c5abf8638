"""The train stage: a T5 and the token files, given to the one loop."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np

from baton.data.tokenise import TokenFile
from baton.eval.config import GenerateConfig
from baton.pipelines.t5_pretrain import data
from baton.pipelines.t5_pretrain.config import T5Pretrain
from baton.pipelines.t5_pretrain.dev_bleu import DevBleu
from baton.pipelines.t5_pretrain.model import PairModel
from baton.stage import Leg, Outcome
from baton.train.cursor import Indices
from baton.train.environment import environment_of, make_deterministic
from baton.train.learner import Learner
from baton.train.loop import Loop, ReadAhead
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.train.seq2seq import Padded, Seq2SeqLoss
from baton.tuning.best import TRAIN
from baton.tuning.model import DATA
from baton.tuning.training import run

# A disk that answers within ten milliseconds keeps up with 200 samples a step.
_READ_AHEAD_STEPS = 8


def train(leg: Leg) -> Outcome:
    """Train to the end or to the next handover, then write down what it took and what it made."""
    loop, learner = build_loop(leg)
    return run(leg, loop, learner, PairModel.of(leg), method="full")


def retrain(leg: Leg, step: int) -> Outcome:
    """Train a leg's newest checkpoint on to `step`, for `verify-resume`."""
    return build_loop(leg, stop_at=step)[0].run()


def build_loop(leg: Leg, *, stop_at: int | None = None) -> tuple[Loop, Learner]:
    """Everything the loop needs, from the task's configuration and its data folder."""
    config: T5Pretrain = leg.config
    ranks = Ranks.of(leg.peers)
    if config.train.deterministic:
        make_deterministic()
    model = PairModel.of(leg)
    learner = model.learner(ranks.device, packed=True)
    leg.log("model", parameters=learner.total_parameters)
    pairs, valid = TokenFile(leg.folder / DATA, "train"), TokenFile(leg.folder / DATA, "valid")
    network = learner.network
    loop = Loop(
        leg=leg,
        ranks=ranks,
        config=config.train,
        model=learner.model,
        weights=learner.weights,
        loss=Seq2SeqLoss(
            network,
            compute_dtype=Precision.choose(config.train.precision, ranks.device).dtype,
            compiled=learner.compiled,
        ),
        batching=Padded(
            device=ranks.device,
            pad=int(network.config.pad_token_id),
            start=int(network.config.decoder_start_token_id),
            pad_to=config.train.pad_to,
            fixed_rows=config.train.fixed_shapes,
            pin=not config.train.low_memory,
        ),
        train=pairs,
        dev=valid,
        score=_dev_bleu(leg, ranks, learner, valid) if config.dev_score.samples else None,
        read_ahead=_read_ahead(pairs, low_memory=config.train.low_memory),
        folder=TRAIN,
        identity={
            "base": learner.base_fingerprint,
            "data": data.read_report(leg)["sha256"]["train.tokens"][:16],
        },
        environment=environment_of(ranks),
        allow_changed=leg.allow_changed,
        stop_at=stop_at,
    )
    return loop, learner


def _dev_bleu(leg: Leg, ranks: Ranks, learner: Learner, valid: TokenFile) -> DevBleu:
    config: T5Pretrain = leg.config
    chosen = list(itertools.islice(data.read_valid(leg.folder), config.dev_score.samples))
    samples = [valid.sample(number) for number in range(len(chosen))]
    return DevBleu(
        leg=leg,
        ranks=ranks,
        network=learner.network,
        tokenizer=PairModel.of(leg).tokenizer(),
        pairs=chosen,
        prompts=[tokens[:prompt].tolist() for tokens, prompt in samples],
        config=GenerateConfig(
            max_new_tokens=config.dev_score.max_new_tokens or config.data.max_seq_len,
            batch_size=config.dev_score.batch_size,
        ),
    )


def _read_ahead(source: TokenFile, *, low_memory: bool) -> ReadAhead:
    if low_memory:
        return ReadAhead(1, partial(_release_and_need, source))
    return ReadAhead(_READ_AHEAD_STEPS, source.will_need)


def _release_and_need(source: TokenFile, indices: Indices) -> None:
    source.release()
    source.will_need(np.asarray(indices))
