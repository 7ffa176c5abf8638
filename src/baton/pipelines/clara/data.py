"""The data stage: rows in, token files of prompts, documents and queries, test rows, a report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.config.home import find_file
from baton.data.split import count_leaks, split
from baton.data.tokenise import TokenWriter
from baton.errors import DataError
from baton.pipelines.clara.config import Clara, StageName
from baton.pipelines.clara.memory import Vocabulary
from baton.pipelines.clara.prompt import Prompter
from baton.pipelines.clara.rows import AskRow, Row, SayRow, read_ask, read_say
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.store.checkpoint import sha256_of
from baton.tuning.model import DATA, TaskModel

TEST = "test.jsonl"
# How often a handover is asked for while rows become tokens.
_ROWS_A_LOOK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRow:
    """A question to be answered; every gold counts as right, the first one is what is learnt."""

    number: int
    question: str
    documents: list[str]
    golds: list[str]
    positives: list[int] | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The rows of a stage: those that train, those that choose the best checkpoint, the rest."""

    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[AskRow]


def prepare(leg: Leg) -> Outcome:
    """Validate, split and tokenise the rows of every stage; for a random model also build it."""
    config: Clara = leg.config
    parts = {name: _parts(config, name) for name in config.trained}
    model = TaskModel.of(leg)
    model.build_if_random(_texts(parts.values()))
    _require_context(model, config)
    vocabulary = vocabulary_of(config, model.tokenizer())
    prompter = Prompter(vocabulary)
    writing = _Writing(leg, config, prompter)
    counts: dict[str, Any] = {}
    for name, part in parts.items():
        for kind, rows in (("train", part.train), ("dev", part.dev)):
            found = writing.stage(name, kind, rows)
            if found is None:
                return Outcome.HANDED_OVER
            counts[f"{name}/{kind}"] = found
        if not counts[f"{name}/train"]["samples"]:
            raise DataError(
                f"data.{name}: no training row is left: all prompts are longer than"
                f" {name}.max_length ({config.stage(name).max_length}); raise it"
            )
    documents = writing.documents()
    if documents is None:
        return Outcome.HANDED_OVER
    last = parts[config.until]
    test = _test_rows(config, last)
    folder = leg.folder / DATA
    _write_test(folder / TEST, test)
    questions = [row.question for row in last.train if isinstance(row, AskRow)]
    report = {
        "notice": leg.notice,
        "rows": {
            **{
                f"{name}_{kind}": len(rows)
                for name, part in parts.items()
                for kind, rows in (("train", part.train), ("dev", part.dev))
            },
            "test": len(test),
            "test_without_positives": sum(not row.positives for row in test),
        },
        "tokens": {"train": counts[f"{config.until}/train"], **counts},
        "documents": documents,
        "questions_also_in_train": {
            "test": count_leaks(iter(questions), (row.question for row in test))
        },
        "sha256": {
            name: sha256_of(folder / name)
            for name in ["documents.tokens", TEST, *(f"{key}.tokens" for key in counts)]
        },
    }
    leg.store.write(f"{DATA}/report.json", dump_json(report))
    leg.log(
        "data",
        **{name: counts[f"{name}/train"]["samples"] for name in parts},
        documents=documents["documents"],
        cut=documents["documents_cut"],
        test=len(test),
    )
    return Outcome.FINISHED


def vocabulary_of(config: Clara, tokenizer: Any) -> Vocabulary:
    """Extend the base's tokenizer as the configuration says."""
    return Vocabulary.extend(
        tokenizer,
        vectors=config.memory.vectors,
        encoder_tokens=config.memory.encoder_tokens,
    )


def read_test(folder: Path) -> list[TestRow]:
    """The rows to be answered, in their order."""
    with open(folder / DATA / TEST, encoding="utf-8") as lines:
        return [TestRow(**json.loads(line)) for line in lines]


def _parts(config: Clara, name: StageName) -> Parts:
    path = find_file(getattr(config.data, name))
    rows: list[Row]
    if name == "stage1":
        rows = list(read_say(path))
    elif name == "stage2":
        rows = list(read_ask(path, least=config.stage2.top_k, most=config.stage2.top_k))
    else:
        rows = list(read_ask(path, least=config.stage3.top_k))
    held = config.data.held_out
    try:
        found = split(len(rows), seed=config.data.seed, shares=(1 - held, held / 2, held / 2))
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from error
    train, dev, test = ([rows[i] for i in part] for part in (found.train, found.dev, found.test))
    if name != config.until or config.data.test is not None:
        return Parts(train=train, dev=[*dev, *test], test=[])
    return Parts(train=train, dev=dev, test=[row for row in test if isinstance(row, AskRow)])


def _test_rows(config: Clara, last: Parts) -> list[TestRow]:
    rows = last.test
    if config.data.test is not None:
        top_k = config.stage(config.until).documents
        most = top_k if config.until == "stage2" else None
        rows = read_ask(find_file(config.data.test), least=top_k, most=most)
    return [
        TestRow(
            number=row.number,
            question=row.question,
            documents=list(row.documents),
            golds=list(row.golds),
            positives=None if row.positives is None else list(row.positives),
        )
        for row in rows
    ]


def _texts(parts: Any) -> Iterator[str]:
    for part in parts:
        for row in part.train:
            yield from row.documents
            if isinstance(row, SayRow):
                yield from row.questions
                yield from row.answers
            else:
                yield row.question
                yield row.golds[0]


def _require_context(model: TaskModel, config: Clara) -> None:
    limit = model.context()
    needed = {f"{name}.max_length": config.stage(name).max_length for name in config.trained}
    memory = config.memory
    needed["memory.doc_max_length"] = memory.encoder_tokens + memory.vectors
    for key, tokens in needed.items():
        if limit is not None and tokens > limit:
            raise DataError(
                f"{key}: {tokens} tokens are more than the model's context of {limit}; lower it"
            )


class _Writing:
    """Token files of a task; documents are numbered as they are met, and written once."""

    def __init__(self, leg: Leg, config: Clara, prompter: Prompter) -> None:
        self._leg, self._config, self._prompter = leg, config, prompter
        self._folder = leg.folder / DATA
        self._size = len(prompter.tokenizer)
        self._numbers: dict[str, int] = {}

    def stage(self, name: StageName, kind: str, rows: Sequence[Row]) -> dict[str, int] | None:
        """Write the rows of a stage; None if a handover was asked for half-way."""
        stage = self._config.stage(name)
        place = self._folder / name
        turns = TokenWriter(place, kind, vocab_size=self._size)
        # Numbers of documents are larger than any vocabulary, perhaps.
        lists = TokenWriter(place, f"{kind}_documents", vocab_size=2**32)
        queries = (
            TokenWriter(place, f"{kind}_queries", vocab_size=self._size)
            if name == "stage3"
            else None
        )
        counts = dict.fromkeys(
            ("samples", "tokens", "labelled_tokens", "answers_cut", "rows_that_cannot_fit"), 0
        )
        for first in range(0, len(rows), _ROWS_A_LOOK):
            if self._leg.stop.is_set:
                return None
            batch = rows[first : first + _ROWS_A_LOOK]
            said = [
                self._prompter.messages(row, documents=stage.documents, seed=self._config.data.seed)
                for row in batch
            ]
            encoded = self._prompter.encode(said, max_length=stage.max_length)
            for row, turn in zip(batch, encoded, strict=True):
                if turn is None:
                    counts["rows_that_cannot_fit"] += 1
                    continue
                turns.append(turn.tokens, turn.prompt)
                lists.append([self._number(text) for text in row.documents], 0)
                if queries is not None and isinstance(row, AskRow):
                    [ids] = self._prompter.vocabulary.encoder_ids([row.question])
                    queries.append(ids, len(ids))
                counts["samples"] += 1
                counts["tokens"] += len(turn.tokens)
                counts["labelled_tokens"] += len(turn.tokens) - turn.prompt
                counts["answers_cut"] += turn.is_cut
        for writer in (turns, lists, queries):
            if writer is not None:
                writer.finish()
        return counts

    def documents(self) -> dict[str, int] | None:
        """Write every document that was met, once; None if a handover was asked for half-way."""
        writer = TokenWriter(self._folder, "documents", vocab_size=self._size)
        texts = list(self._numbers)
        vocabulary = self._prompter.vocabulary
        counts = {"documents": len(texts), "tokens": 0, "documents_cut": 0}
        eos = vocabulary.tokenizer.eos_token_id
        for first in range(0, len(texts), _ROWS_A_LOOK):
            if self._leg.stop.is_set:
                return None
            for ids in vocabulary.encoder_ids(texts[first : first + _ROWS_A_LOOK]):
                # All of it is prompt: nothing of a document is predicted.
                writer.append(ids, len(ids))
                counts["tokens"] += len(ids)
                counts["documents_cut"] += ids[-vocabulary.vectors - 1] != eos
        writer.finish()
        return counts

    def _number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))


def _write_test(path: Path, rows: Sequence[TestRow]) -> None:
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
