"""The data stage: problems and chat rows in, token files, prompts and a report out."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton.data.quality import Cleaner, RejectsWriter
from baton.data.rows import Row
from baton.data.source import open_source
from baton.data.split import split
from baton.data.tokenise import ChatEncoder, TokenWriter, write_turns
from baton.errors import DataError
from baton.pipelines.questions_gen.chat import read_chat
from baton.pipelines.questions_gen.competition import (
    competition_score,
    difficulty,
    quality,
    topics,
)
from baton.pipelines.questions_gen.config import QuestionsGen
from baton.pipelines.questions_gen.problem import Problem, final_answer, without_marker
from baton.pipelines.questions_gen.prompts import Request
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.store.checkpoint import sha256_of
from baton.tuning.model import DATA, TaskModel

PARTS = ("train", "dev", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A row and what it was judged to be; `number` is its place in the source, from 1."""

    number: int
    problem: str
    answer: str
    solution: str
    competition_score: float
    difficulty: str
    quality: float
    topics: tuple[str, ...]

    @property
    def request(self) -> Request:
        """What the model would have been asked to get this problem."""
        return Request(self.topics[0], self.difficulty)

    @property
    def target(self) -> Problem:
        return Problem(self.problem, self.answer, without_marker(self.solution))


def judge(number: int, problem: str, solution: str) -> Judged:
    """A row with everything that the filter and the prompts need to know of it."""
    return Judged(
        number=number,
        problem=problem,
        answer=final_answer(solution),
        solution=solution,
        competition_score=competition_score(problem, solution),
        difficulty=difficulty(problem, solution),
        quality=quality(problem, solution),
        topics=topics(problem, solution),
    )


class Census:
    """Counts what was read and kept, for people."""

    def __init__(self) -> None:
        self.read = 0
        self.kept = 0
        self._difficulty: Counter[str] = Counter()
        self._topics: Counter[str] = Counter()
        self._quality = 0.0
        self._answers = 0

    def count(self, row: Judged, *, is_kept: bool) -> None:
        self.read += 1
        if is_kept:
            self.kept += 1
            self._difficulty[row.difficulty] += 1
            self._topics[row.topics[0]] += 1
            self._quality += row.quality
            self._answers += bool(row.answer)

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "competition": self.kept,
            "with_answer": self._answers,
            "mean_quality": round(self._quality / self.kept, 4) if self.kept else None,
            "difficulty": dict(self._difficulty.most_common()),
            "topics": dict(self._topics.most_common()),
        }

    def lines(self) -> Iterator[str]:
        """The same, a line at a time."""
        share = f" ({self.kept / self.read:.1%})" if self.read else ""
        yield f"{self.kept:,} of {self.read:,} rows are competition problems{share}"
        if self.kept:
            yield f"{self._answers:,} of them have a final answer"
            yield f"mean quality: {self._quality / self.kept:.3f}"
            yield "difficulty: " + _shares(self._difficulty)
            yield "topics: " + _shares(self._topics)


def _shares(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def prepare(leg: Leg) -> Outcome:
    """Judge, filter, split and tokenise; for a random model also build it."""
    config: QuestionsGen = leg.config
    folder = leg.folder / DATA
    folder.mkdir(parents=True, exist_ok=True)
    census = Census()
    with RejectsWriter(folder / "rejects.jsonl") as rejects:
        kept: list[Judged] = []
        for row in _judged(leg, rejects):
            if leg.stop.is_set:
                return Outcome.HANDED_OVER
            is_kept = row.competition_score > config.data.min_competition_score
            census.count(row, is_kept=is_kept)
            if is_kept:
                kept.append(row)
    for line in census.lines():
        leg.log("data", note=line)
    parts = _split(kept, census, config)
    chat = _chat_rows(leg, len(parts["train"]))
    pairs = {name: [_pair(row) for row in rows] for name, rows in parts.items()}
    model = TaskModel(config=config.view(config.sft), folder=leg.folder, pins=leg.plan.pins)
    model.build_if_random(itertools.chain.from_iterable([*pairs["train"], *chat]))
    model.require_context(config.data.max_length)
    tokenizer = model.tokenizer()
    encoder = ChatEncoder(tokenizer, system=None, max_length=config.data.max_length)
    tokens = {
        name: write_turns(
            encoder,
            rows,
            TokenWriter(folder, name, vocab_size=len(tokenizer)),
            on_dropped=lambda _: None,
        )
        for name, rows in (
            ("train", _mixed(pairs["train"], chat, config.data.seed)),
            ("dev", pairs["dev"][: config.data.dev_rows]),
        )
    }
    for name, counts in tokens.items():
        if not counts["samples"]:
            raise DataError(
                f"all {counts['prompts_too_long']:,} {name} rows were dropped: the prompt alone"
                f" fills data.max_length ({config.data.max_length}); raise it"
            )
    for name, rows in parts.items():
        _write(leg, name, rows)
    files = ("train.tokens", "train.index", "dev.tokens", "dev.index")
    report = {
        "notice": leg.notice,
        "rows": {
            "pool": len(kept),
            "chat": len(chat),
            **{name: len(rows) for name, rows in parts.items()},
        },
        "census": census.to_json(),
        "rejects": dict(rejects.counts),
        "tokens": tokens,
        "sha256": {
            name: sha256_of(folder / name)
            for name in (*files, *(f"{part}.jsonl" for part in PARTS))
        },
    }
    leg.store.write(f"{DATA}/report.json", dump_json(report))
    leg.log("data", **{name: len(rows) for name, rows in parts.items()}, chat=len(chat))
    return Outcome.FINISHED


def read_part(folder: Path, name: str) -> list[Judged]:
    """The rows of `train`, `dev` or `test`, in their order."""
    with open(folder / DATA / f"{name}.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Judged(**row | {"topics": tuple(row["topics"])}) for row in rows]


def _judged(leg: Leg, rejects: RejectsWriter) -> Iterator[Judged]:
    data = leg.config.data
    source = open_source(data, pinned=leg.plan.pins.get(data.pin_key, ""))
    cleaner = Cleaner(min_chars=data.min_chars, max_chars=data.max_chars)
    row: Row
    for row in rejects.kept(cleaner.clean(source.rows())):
        yield judge(row.number, row.values["problem"], row.values["solution"])


def _split(kept: list[Judged], census: Census, config: QuestionsGen) -> dict[str, list[Judged]]:
    try:
        parts = split(
            len(kept),
            seed=config.data.seed,
            shares=config.data.shares,
            train_rows=config.data.rows,
            n_read=census.read,
        )
    except DataError as error:
        raise DataError(
            f"data: {error} (usable are rows with a competition score above"
            f" {config.data.min_competition_score:g})"
        ) from error
    return {name: [kept[i] for i in getattr(parts, name)] for name in PARTS}


def _chat_rows(leg: Leg, problems: int) -> list[tuple[str, str]]:
    """As many as make up the chat share of the mix, drawn evenly from all there are."""
    config: QuestionsGen = leg.config
    chat = config.data.chat
    if chat is None or chat.share == 0:
        return []
    rows = list(read_chat(chat, pinned=leg.plan.pins.get(chat.pin_key, "")))
    wanted = round(problems * chat.share / (1 - chat.share))
    if wanted > len(rows):
        raise DataError(
            f"data.chat.share: {chat.share:g} of the mix are {wanted:,} chat rows, but there are"
            f" {len(rows):,}; lower it, or set data.rows"
        )
    rng = np.random.Generator(np.random.PCG64([config.data.seed, 2]))
    return [rows[i] for i in rng.choice(len(rows), wanted, replace=False)]


def _pair(row: Judged) -> tuple[str, str]:
    return row.request.text(), row.target.text()


def _mixed(
    problems: Sequence[tuple[str, str]], chat: Sequence[tuple[str, str]], seed: int
) -> list[tuple[str, str]]:
    rows = [*problems, *chat]
    rng = np.random.Generator(np.random.PCG64([seed, 3]))
    return [rows[i] for i in rng.permutation(len(rows))] if chat else rows


def _write(leg: Leg, name: str, rows: Iterable[Judged]) -> None:
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    leg.store.write(f"{DATA}/{name}.jsonl", "".join(lines).encode("utf-8", "replace"))
