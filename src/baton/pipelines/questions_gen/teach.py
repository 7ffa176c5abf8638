"""The teach stage: a teacher scores, improves and varies the student's problems."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from baton.data.teacher import in_order
from baton.data.tokenise import ChatEncoder, TokenWriter, write_turns
from baton.errors import DataError
from baton.pipelines.questions_gen.config import OpenAITeacher, QuestionsGen
from baton.pipelines.questions_gen.lesson import Instructor, Lesson, Proposal
from baton.pipelines.questions_gen.prompts import Request
from baton.pipelines.questions_gen.propose import read_proposals
from baton.pipelines.questions_gen.symbolic import Symbolic
from baton.pipelines.questions_gen.training import DISTILL, task_model
from baton.pipelines.questions_gen.tutor import Tutor
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.store.checkpoint import sha256_of

TEACH = "teach"
_SHARD = 8


def teach(leg: Leg) -> Outcome:
    """Ask for what is not answered yet, then write what is to be learned."""
    config: QuestionsGen = leg.config
    proposals = read_proposals(leg.folder)
    instructor = _instructor(leg)
    done = set(leg.store.names(f"{TEACH}/shards"))
    shards = [proposals[i : i + _SHARD] for i in range(0, len(proposals), _SHARD)]
    missing = [i for i in range(len(shards)) if _shard(i) not in done]
    for answered, number in enumerate(missing, start=len(shards) - len(missing) + 1):
        if leg.stop.is_set:
            return Outcome.HANDED_OVER
        lessons = list(in_order(instructor.teach, shards[number], parallel=_parallel(config)))
        value = {"lessons": [lesson.to_json() for lesson in lessons]}
        leg.check_fence()
        leg.store.write(_shard(number), dump_json(value))
        leg.report(step=answered, total=len(shards), unit="shards")
    lessons = [
        Lesson.from_json(values)
        for i in range(len(shards))
        for values in json.loads(leg.store.read(_shard(i)))["lessons"]
    ]
    _write(leg, proposals, lessons, instructor.cost())
    return Outcome.FINISHED


def _shard(number: int) -> str:
    return f"{TEACH}/shards/{number:05d}.json"


def _instructor(leg: Leg) -> Instructor:
    config: QuestionsGen = leg.config
    chosen = config.distill.teacher
    if isinstance(chosen, OpenAITeacher):
        return Tutor(
            chosen,
            leg.folder / TEACH / "replies",
            variations=config.distill.variations,
            min_score=config.distill.min_score,
            attempts=config.distill.attempts,
        )
    return Symbolic(config.distill.variations, seed=config.distill.seed)


def _parallel(config: QuestionsGen) -> int:
    chosen = config.distill.teacher
    return chosen.parallel if isinstance(chosen, OpenAITeacher) else 1


def _taught(
    proposals: Sequence[Proposal], lessons: Sequence[Lesson], min_score: float
) -> Iterator[tuple[str, str]]:
    """Prompt and target of everything that is good enough to be learned."""
    by_number = {proposal.number: proposal for proposal in proposals}
    for lesson in lessons:
        if lesson.improved is None or lesson.score < min_score:
            continue
        request = by_number[lesson.number].request
        yield request.text(), lesson.improved.text()
        for variation in lesson.variations:
            varied = Request(request.topic, request.difficulty, variation.kind, lesson.improved)
            yield varied.text(), variation.problem.text()


def _write(
    leg: Leg, proposals: Sequence[Proposal], lessons: Sequence[Lesson], cost: dict[str, Any]
) -> None:
    config: QuestionsGen = leg.config
    least = config.distill.min_score
    dropped = Counter(itertools.chain.from_iterable(lesson.dropped for lesson in lessons))
    dropped["below_min_score"] = sum(
        lesson.improved is not None and lesson.score < least for lesson in lessons
    )
    tokenizer = task_model(leg, DISTILL).tokenizer()
    encoder = ChatEncoder(tokenizer, system=None, max_length=config.data.max_length)
    folder = leg.folder / DISTILL / "taught"
    counts = write_turns(
        encoder,
        _taught(proposals, lessons, least),
        TokenWriter(folder, "train", vocab_size=len(tokenizer)),
        on_dropped=lambda _: None,
    )
    report = {
        "notice": leg.notice,
        "teacher": config.distill.teacher.source,
        "proposals": len(proposals),
        "improved": sum(lesson.improved is not None for lesson in lessons),
        "variations": sum(len(lesson.variations) for lesson in lessons),
        "mean_score": sum(lesson.score for lesson in lessons) / max(len(lessons), 1),
        "dropped": {name: n for name, n in sorted(dropped.items()) if n},
        "tokens": counts,
        "sha256": {"train.tokens": sha256_of(folder / "train.tokens")},
    }
    leg.store.write(f"{DISTILL}/taught/report.json", dump_json(report))
    leg.log("taught", samples=counts["samples"], **{k: str(v) for k, v in cost.items()})
    if not counts["samples"]:
        reasons = ", ".join(f"{n:,} {name}" for name, n in dropped.most_common() if n)
        raise DataError(
            f"of {len(proposals):,} problems that the student wrote, the teacher could make"
            f" nothing to learn from ({reasons or 'no reason'}); see {TEACH}/shards"
        )
