"""The propose stage: the best model of GRPO writes the problems that a teacher will look at."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from baton.data.tokenise import ChatEncoder
from baton.generation.sampler import Sampler
from baton.pipelines.questions_gen.config import QuestionsGen
from baton.pipelines.questions_gen.data import read_part
from baton.pipelines.questions_gen.lesson import Proposal
from baton.pipelines.questions_gen.training import GRPO, load_best, task_model
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.train.cursor import Cursor
from baton.train.loop import mix_seed
from baton.train.ranks import Ranks

PROPOSE = "propose"
_PROPOSALS = f"{PROPOSE}/proposals.jsonl"
_ORDER = 4


def propose(leg: Leg) -> Outcome:
    """Write what is not written yet, shard by shard."""
    config: QuestionsGen = leg.config
    ranks = Ranks.of(leg.peers)
    wanted, size = config.distill.problems, config.eval.generate.batch_size
    shards = [range(i, min(i + size, wanted)) for i in range(0, wanted, size)]
    done = set(leg.store.names(f"{PROPOSE}/shards"))
    missing = [i for i in range(len(shards)) if _shard(i) not in done]
    mine = missing[ranks.rank :: ranks.size]
    if mine:
        _write(leg, ranks, shards, mine)
    if ranks.agree(leg.stop.is_set)[0]:
        return Outcome.HANDED_OVER
    if leg.is_first:
        rows = [row for i in range(len(shards)) for row in json.loads(leg.store.read(_shard(i)))]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        leg.store.write(_PROPOSALS, lines.encode("utf-8", "replace"))
        leg.log("proposed", problems=len(rows))
    return Outcome.FINISHED


def read_proposals(folder: Path) -> list[Proposal]:
    """What the student wrote, in its order."""
    with open(folder / _PROPOSALS, encoding="utf-8") as lines:
        return [Proposal(**json.loads(line)) for line in lines]


def _shard(number: int) -> str:
    return f"{PROPOSE}/shards/{number:05d}.json"


def _write(leg: Leg, ranks: Ranks, shards: list[range], mine: list[int]) -> None:
    config: QuestionsGen = leg.config
    model = task_model(leg, GRPO)
    learner = model.learner(ranks.device, packed=False)
    load_best(leg, learner, GRPO, ranks)
    learner.model.eval()
    tokenizer = model.tokenizer()
    encoder = ChatEncoder(tokenizer, system=None, max_length=config.data.max_length)
    rows = read_part(leg.folder, "train")
    seed = mix_seed(config.distill.seed, _ORDER)
    order = Cursor(len(rows), config.distill.problems, seed).at(0).tolist()
    sampler = Sampler(
        model=learner.model,
        sampling=config.grpo.sampling,
        max_new_tokens=config.eval.generate.max_new_tokens,
        ends=[encoder.end_of_turn],
        rows=config.eval.generate.batch_size,
    )
    for number in mine:
        requests = [rows[order[i]].request for i in shards[number]]
        texts = [encoder.prompt_text(request.text()) for request in requests]
        drawn = sampler.draw(
            tokenizer(texts, add_special_tokens=False)["input_ids"],
            [mix_seed(seed, i) for i in shards[number]],
            should_stop=lambda: leg.stop.is_set,
        )
        if drawn is None:
            return
        written = tokenizer.batch_decode(drawn, skip_special_tokens=True)
        proposals = [
            Proposal(i, request.topic, request.difficulty, text.strip())
            for i, request, text in zip(shards[number], requests, written, strict=True)
        ]
        leg.check_fence()
        leg.store.write(_shard(number), dump_json([asdict(row) for row in proposals]))
        leg.report(step=number + 1, total=len(shards), unit="shards")
