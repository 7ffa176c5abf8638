"""The data stage: rows in, token files, test rows, rejects and a report out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton.data.quality import Cleaner, QualityReport, RejectsWriter
from baton.data.rows import Reject, Row
from baton.data.source import open_source
from baton.data.split import Split, count_leaks, split
from baton.data.tokenise import ChatEncoder, TokenWriter, write_turns
from baton.errors import DataError
from baton.pipelines.medical_qa.config import MedicalQA
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.store.checkpoint import sha256_of
from baton.tuning.model import DATA, TaskModel


@dataclass(frozen=True, slots=True)
class QARow:
    """A kept row; `number` is its place in the source, from 1."""

    number: int
    question: str
    answer: str


def prepare(leg: Leg) -> Outcome:
    """Clean, split and tokenise; for a random model also train its tokenizer and build it."""
    config: MedicalQA = leg.config
    folder = leg.folder / DATA
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(config.data, pinned=leg.plan.pins.get(config.data.pin_key, ""))
    cleaner = Cleaner(min_chars=config.data.min_chars, max_chars=config.data.max_chars)
    with RejectsWriter(folder / "rejects.jsonl") as rejects:
        kept: list[QARow] = []
        for row in _pool(rejects.kept(cleaner.clean(source.rows())), config):
            if leg.stop.is_set:
                return Outcome.HANDED_OVER
            kept.append(row)
        kept.sort(key=lambda row: row.number)
        quality = cleaner.report(encoding=source.encoding, columns=source.columns)
        for line in quality.lines():
            leg.log("data", note=line)
        parts = _split(len(kept), config, quality)
        train, dev, test = ([kept[i] for i in part] for part in _capped(parts, config))
        model = TaskModel.of(leg)
        model.build_if_random(text for row in train for text in (row.question, row.answer))
        tokenizer = model.tokenizer()
        model.require_context(config.data.max_length)
        encoder = ChatEncoder(
            tokenizer, system=config.data.system, max_length=config.data.max_length
        )
        tokens = {
            name: _tokenise(name, rows, encoder, folder, len(tokenizer), rejects)
            for name, rows in (("train", train), ("dev", dev))
        }
    for name, counts in tokens.items():
        if not counts["samples"]:
            raise DataError(
                f"all {counts['prompts_too_long']:,} {name} rows were dropped: the prompt alone"
                f" fills data.max_length ({config.data.max_length}); raise it"
            )
    _write_test(folder / "test.jsonl", test)
    report = {
        "notice": leg.notice,
        "quality": quality.to_json(),
        "rows": {"pool": len(kept), "train": len(train), "dev": len(dev), "test": len(test)},
        "tokens": tokens,
        "questions_also_in_train": {
            name: count_leaks((r.question for r in train), (r.question for r in rows))
            for name, rows in (("dev", dev), ("test", test))
        },
        "sha256": {
            name: sha256_of(folder / name)
            for name in ("train.tokens", "train.index", "dev.tokens", "dev.index", "test.jsonl")
        },
    }
    leg.store.write(f"{DATA}/report.json", dump_json(report))
    leg.log("data", train=len(train), dev=len(dev), test=len(test), rejects=f"{DATA}/rejects.jsonl")
    return Outcome.FINISHED


def read_test(folder: Path) -> list[QARow]:
    """The rows of the test split, in their order."""
    with open(folder / DATA / "test.jsonl", encoding="utf-8") as lines:
        return [QARow(**json.loads(line)) for line in lines]


def _pool(rows: Iterable[Row], config: MedicalQA) -> Iterator[QARow]:
    """All rows, or a seeded sample of `pool_rows` of them (reservoir, Vitter's algorithm R)."""
    limit = config.data.pool_rows
    rng = np.random.Generator(np.random.PCG64([config.data.seed, 1]))
    pool: list[QARow] = []
    for seen, row in enumerate(rows):
        kept = QARow(row.number, row.values["question"], row.values["answer"])
        if limit is None:
            yield kept
        elif seen < limit:
            pool.append(kept)
        elif (place := int(rng.integers(seen + 1))) < limit:
            pool[place] = kept
    yield from pool


def _split(kept: int, config: MedicalQA, quality: QualityReport) -> Split:
    try:
        return split(
            kept,
            seed=config.data.seed,
            shares=config.data.shares,
            train_rows=config.data.rows,
            n_read=quality.read,
        )
    except DataError as error:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in quality.dropped.items())
        why = f" (dropped: {dropped}; see {DATA}/rejects.jsonl)" if dropped else ""
        raise DataError(f"data.rows: {error}{why}") from error


def _capped(parts: Split, config: MedicalQA) -> tuple[Any, Any, Any]:
    return parts.train, parts.dev[: config.data.dev_rows], parts.test


def _tokenise(
    name: str,
    rows: list[QARow],
    encoder: ChatEncoder,
    folder: Path,
    vocab_size: int,
    rejects: RejectsWriter,
) -> dict[str, int]:
    def drop(position: int) -> None:
        row = rows[position]
        detail = "the prompt alone fills data.max_length"
        rejects.write(Reject(row.number, None, "prompt_too_long", detail, row.question))

    writer = TokenWriter(folder, name, vocab_size=vocab_size)
    return write_turns(encoder, ((r.question, r.answer) for r in rows), writer, on_dropped=drop)


def _write_test(path: Path, rows: list[QARow]) -> None:
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "w", encoding="utf-8") as file:
        for row in rows:
            value = {"number": row.number, "question": row.question, "answer": row.answer}
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
