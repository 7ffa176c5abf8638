"""The data stage: rows in, token files in as many orders as epochs, test rows, a report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.config.home import find_file
from baton.data.split import count_leaks, split
from baton.data.tokenise import TokenWriter
from baton.errors import DataError
from baton.pipelines.raft.config import Raft
from baton.pipelines.raft.draw import Draw
from baton.pipelines.raft.format import Format, load_format
from baton.pipelines.raft.prompt import Fitted, Prompter
from baton.pipelines.raft.rows import Row, read
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.store.checkpoint import sha256_of
from baton.tuning.model import DATA, TaskModel

_FILES = ("train.tokens", "train.index", "dev.tokens", "dev.index", "test.jsonl")
# How often a handover is asked for while rows become tokens.
_ROWS_A_LOOK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRow:
    """A row to be answered, with its oracle or without; `oracle` is an index or None.

    Every row of the split is there twice, unless the file gives it no oracle, so that tasks
    trained with another `p` are compared on the same questions.
    """

    number: int
    question: str
    documents: list[str]
    oracle: int | None
    reference: str


def prepare(leg: Leg) -> Outcome:
    """Validate, split, draw and tokenise; for a random model also build it."""
    config: Raft = leg.config
    format = load_format(config.data.format)
    rows = read(find_file(config.data.path))
    _require_targets(config, rows)
    train, dev, test = _split(rows, config)
    draw = Draw(config.data, format, rows)
    model = TaskModel.of(leg)
    model.build_if_random(_texts(train, draw, format))
    model.require_context(config.data.max_length)
    tokenizer = model.tokenizer()
    prompter = Prompter(tokenizer, format, max_length=config.data.max_length)
    folder = leg.folder / DATA
    versions = _versions(config, len(train))
    counts: dict[str, dict[str, int]] = {}
    for name, part, orders in (("train", train, versions), ("dev", dev, 1)):
        writer = TokenWriter(folder, name, vocab_size=len(tokenizer))
        found = _write(leg, writer, part, draw, prompter, orders)
        if found is None:
            return Outcome.HANDED_OVER
        counts[name] = found
        _require_some(name, found, config.data.max_length)
    asked = list(_test_rows(test, draw, prompter, limit=_prompt_limit(model, config)))
    _write_test(folder / "test.jsonl", asked)
    both_ways = sum(1 if row.oracle is None else 2 for row in test)
    report = {
        "notice": leg.notice,
        "rows": {
            "pool": len(rows),
            "train": len(train),
            "dev": len(dev),
            "test": len(test),
            "test_prompts": len(asked),
            "test_prompts_that_cannot_fit": both_ways - len(asked),
        },
        "versions": versions,
        "oracle_shown": sum(draw.is_present(row) for row in train),
        "oracle_always_shown": sum(_is_always_present(row, config) for row in train),
        "tokens": counts,
        "questions_also_in_train": {
            name: count_leaks((r.question for r in train), (r.question for r in part))
            for name, part in (("dev", dev), ("test", test))
        },
        "format": asdict(format),
        "sha256": {name: sha256_of(folder / name) for name in _FILES},
    }
    leg.store.write(f"{DATA}/report.json", dump_json(report))
    if report["oracle_always_shown"]:
        leg.log(
            "data",
            note=f"{report['oracle_always_shown']} training rows have no absent_answer, so they"
            " always show their oracle",
        )
    leg.log(
        "data",
        train=counts["train"]["samples"] // versions,
        orders=versions,
        dev=counts["dev"]["samples"],
        test=len(asked),
        oracle_shown=f"{report['oracle_shown']}/{len(train)}",
        shortened=counts["train"]["documents_shortened"],
        cannot_fit=counts["train"]["rows_that_cannot_fit"],
    )
    return Outcome.FINISHED


def read_test(folder: Path) -> list[AskedRow]:
    """The rows to be answered, in their order."""
    with open(folder / DATA / "test.jsonl", encoding="utf-8") as lines:
        return [AskedRow(**json.loads(line)) for line in lines]


def _require_targets(config: Raft, rows: Sequence[Row]) -> None:
    """Rows without their oracle need an answer to learn; without any, `p` would mean nothing."""
    with_oracle = [row for row in rows if row.oracle is not None]
    if config.data.p == 1 or config.data.absent_target == "oracle" or not with_oracle:
        return
    if all(row.absent_answer is None for row in with_oracle):
        raise DataError(
            f"data.p: {config.data.p:g} asks for rows without their oracle, but no row of"
            f" {config.data.path} has an absent_answer to learn then. Have them written (baton data"
            " raft build), or set data.absent_target: oracle to train on teacher_answer all the"
            " same, or data.p: 1"
        )


def _is_always_present(row: Row, config: Raft) -> bool:
    return (
        row.oracle is not None
        and row.absent_answer is None
        and config.data.absent_target == "shown"
    )


def _split(rows: list[Row], config: Raft) -> tuple[list[Row], list[Row], list[Row]]:
    try:
        parts = split(
            len(rows),
            seed=config.data.seed,
            shares=config.data.shares,
            train_rows=config.data.rows,
        )
    except DataError as error:
        raise DataError(f"data.rows: {error}") from error
    train, dev, test = ([rows[i] for i in part] for part in (parts.train, parts.dev, parts.test))
    return train, dev, test


def _versions(config: Raft, samples: int) -> int:
    """In how many orders every row is written: one an epoch, as far as `orders` allows."""
    epochs = config.train.epochs
    if config.train.max_steps is not None:
        epochs = config.train.max_steps * config.train.batch_samples / samples
    return max(1, min(config.data.orders, math.ceil(epochs)))


def _texts(rows: Sequence[Row], draw: Draw, format: Format) -> Iterator[str]:
    for row in rows:
        shown = draw.shown(row)
        yield format.prompt(row.question, shown.documents)
        yield shown.target


def _write(
    leg: Leg, writer: TokenWriter, rows: Sequence[Row], draw: Draw, prompter: Prompter, orders: int
) -> dict[str, int] | None:
    """Append rows in order after order; None if a handover was asked for half-way."""
    counts = {
        "samples": 0,
        "tokens": 0,
        "labelled_tokens": 0,
        "documents_shortened": 0,
        "rows_that_cannot_fit": 0,
    }
    fitting = list(rows)
    for epoch in range(orders):
        kept: list[Row] = []
        for first in range(0, len(fitting), _ROWS_A_LOOK):
            if leg.stop.is_set:
                return None
            batch = fitting[first : first + _ROWS_A_LOOK]
            for row, fitted in zip(batch, _fitted(batch, draw, prompter, epoch), strict=True):
                if fitted is None:
                    counts["rows_that_cannot_fit"] += 1
                    continue
                kept.append(row)
                turn = fitted.turn
                writer.append(turn.tokens, turn.prompt)
                counts["samples"] += 1
                counts["tokens"] += len(turn.tokens)
                counts["labelled_tokens"] += len(turn.tokens) - max(turn.prompt, 1)
                counts["documents_shortened"] += fitted.is_shortened
        fitting = kept
    writer.finish()
    return counts


def _fitted(
    rows: Sequence[Row], draw: Draw, prompter: Prompter, epoch: int
) -> Iterator[Fitted | None]:
    shown = [(row.question, draw.shown(row, epoch=epoch)) for row in rows]
    for row, fitted in zip(rows, prompter.fit(shown), strict=True):
        if fitted is None and epoch > 0:
            # Another order has a few tokens more; the first order is known to fit.
            [fitted] = prompter.fit([(row.question, draw.shown(row))])
        yield fitted


def _require_some(name: str, counts: dict[str, int], max_length: int) -> None:
    if not counts["samples"]:
        raise DataError(
            f"all {counts['rows_that_cannot_fit']:,} {name} rows were dropped: question, answer and"
            f" the evidence it quotes are more than data.max_length ({max_length}); raise it"
        )


def _prompt_limit(model: TaskModel, config: Raft) -> int:
    context = model.context()
    if context is None:
        return config.data.max_length
    answer = config.eval.generate.max_new_tokens
    room = context - answer
    if room < 1:
        raise DataError(
            f"eval.generate.max_new_tokens: {answer} leaves no room for a prompt in the model's"
            f" context of {context} tokens"
        )
    return min(config.data.max_length, room)


def _test_rows(
    rows: Sequence[Row], draw: Draw, prompter: Prompter, *, limit: int
) -> Iterator[AskedRow]:
    for row in rows:
        for present in (True, False) if row.oracle is not None else (False,):
            shown = draw.shown(row, present=present)
            documents = prompter.fit_prompt(row.question, shown.documents, limit=limit)
            if documents is None:
                continue
            yield AskedRow(
                number=2 * row.number + (not present),
                question=row.question,
                documents=list(documents),
                oracle=shown.oracle,
                reference=shown.target,
            )


def _write_test(path: Path, rows: Iterable[AskedRow]) -> None:
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "w", encoding="utf-8") as file:
        for row in rows:
            values: dict[str, Any] = asdict(row)
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
