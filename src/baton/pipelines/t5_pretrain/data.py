"""The data stage: pairs in, token files, validation texts, rejects and a report out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.config.decode import decode
from baton.data.config import PairConfig
from baton.data.pair_files import REJECTS, PairReader, texts_of
from baton.data.pairs import PairCounts, PairEncoder, write_pairs
from baton.data.quality import RejectsWriter
from baton.data.rows import Row
from baton.data.source import RowSource, open_source
from baton.data.tokenise import TokenWriter
from baton.data.vocabulary import train_vocabulary
from baton.errors import DataError
from baton.pipelines.t5_pretrain.config import OwnTokenizer, T5Pretrain
from baton.pipelines.t5_pretrain.model import PairModel
from baton.record import dump_json
from baton.stage import Leg, Outcome
from baton.store.checkpoint import sha256_of
from baton.tuning.model import BASE, DATA

SHARDS = f"{DATA}/shards"
# Reading rows again costs a leg a twentieth of encoding them; so long a stretch is encoded twice.
_KEEP_EVERY_SAMPLES = 200_000


@dataclass(frozen=True, slots=True)
class Pair:
    """A validation pair; `number` is its place in the source, from 1."""

    number: int
    prompt: str
    response: str


def prepare(leg: Leg) -> Outcome:
    """Read all rows as a stream, hold some out, and turn the others into tokens once.

    Encoding goes on from where an earlier leg was stopped or killed.
    """
    config: T5Pretrain = leg.config
    folder = leg.folder / DATA
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(config.data, pinned=leg.plan.pins.get(config.data.pin_key, ""))
    if isinstance(config.tokenizer, OwnTokenizer) and not (leg.folder / BASE).exists():
        _train_tokenizer(leg, source, config.tokenizer)
    tokenizer = PairModel.of(leg).tokenizer()
    encoder = PairEncoder(tokenizer, max_seq_len=config.data.max_seq_len)
    reader = PairReader(source, config.data)
    with RejectsWriter(folder / REJECTS) as rejects, _ValidFile(folder, config.data) as valid:
        # Rejects and validation rows are written anew by every leg; only tokens are gone on with.
        rows = valid.divert(reader.split(rejects.kept(reader.rows())))
        train = _encode_train(leg, encoder, itertools.islice(rows, config.data.rows), tokenizer)
        if train is None:
            return Outcome.HANDED_OVER
    if not train.samples or not valid.rows:
        raise DataError(
            f"{reader.report().quality.read:,} rows leave {train.samples:,} to train on and"
            f" {valid.rows:,} to validate with; bring more rows, raise data.valid_share, or name"
            f" a data.valid file (rows that were left out: {DATA}/{REJECTS})"
        )
    held_out = PairCounts()
    writer = TokenWriter(folder, "valid", vocab_size=len(tokenizer))
    write_pairs(encoder, (_row(pair) for pair in read_valid(leg.folder)), writer, held_out)
    quality = reader.report()
    for line in quality.lines():
        leg.log("data", note=line)
    report = {
        "notice": leg.notice,
        **quality.to_json(),
        "rows": {"train": train.samples, "valid": held_out.samples},
        "tokens": {"train": dataclasses.asdict(train), "valid": dataclasses.asdict(held_out)},
        "sha256": {
            name: sha256_of(folder / name)
            for name in ("train.tokens", "train.index", "valid.tokens", "valid.index")
        },
    }
    leg.store.write(f"{DATA}/report.json", dump_json(report))
    for name in leg.store.names(SHARDS):
        leg.store.delete(name)
    leg.log("data", train=train.samples, valid=held_out.samples, rejects=f"{DATA}/{REJECTS}")
    return Outcome.FINISHED


def read_report(leg: Leg) -> dict[str, Any]:
    """What `prepare` counted."""
    report: dict[str, Any] = json.loads(leg.store.read(f"{DATA}/report.json"))
    return report


def read_valid(folder: Path) -> Iterator[Pair]:
    """The validation pairs of a task, in their order."""
    with open(folder / DATA / "valid.jsonl", encoding="utf-8") as lines:
        for line in lines:
            yield Pair(**json.loads(line))


def _train_tokenizer(leg: Leg, source: RowSource, config: OwnTokenizer) -> None:
    reader = PairReader(source, leg.config.data)
    kept = (row for row in reader.rows() if isinstance(row, Row))
    rows = (row for row, is_held_out in reader.split(kept) if not is_held_out)
    tokenizer = train_vocabulary(texts_of(itertools.islice(rows, config.rows)), vocab=config.vocab)
    beside = leg.folder / f".{BASE}-{leg.record.number:03d}"
    tokenizer.save_pretrained(beside)
    os.replace(beside, leg.folder / BASE)
    leg.log("tokenizer", tokens=len(tokenizer))


def _encode_train(
    leg: Leg, encoder: PairEncoder, rows: Iterator[Row], tokenizer: Any
) -> PairCounts | None:
    """Append the training rows to what earlier legs encoded; None when asked to stop."""
    shards = sorted(leg.store.names(SHARDS))
    counts = PairCounts()
    if shards:
        counts = decode(PairCounts, json.loads(leg.store.read(shards[-1])), where=shards[-1])
        leg.log("data", note=f"going on after {counts.samples:,} encoded rows")
    writer = TokenWriter(
        leg.folder / DATA,
        "train",
        vocab_size=len(tokenizer),
        samples=counts.samples,
        tokens=counts.tokens,
    )
    kept = counts.samples

    def goes_on(counts: PairCounts) -> bool:
        nonlocal kept
        stop = leg.stop.is_set
        leg.report(step=counts.samples, unit="rows")
        if stop or counts.samples - kept >= _KEEP_EVERY_SAMPLES:
            writer.sync()
            leg.check_fence()
            name = f"{SHARDS}/{counts.samples:012d}.json"
            leg.store.write(name, dump_json(dataclasses.asdict(counts)))
            kept = counts.samples
        return not stop

    rest = itertools.islice(rows, counts.samples, None)
    if write_pairs(encoder, rest, writer, counts, goes_on=goes_on):
        return counts
    writer.close()
    return None


class _ValidFile:
    """Writes the validation pairs to `valid.jsonl` while the training rows pass by."""

    def __init__(self, folder: Path, config: PairConfig) -> None:
        self._path, self._part = folder / "valid.jsonl", folder / ".valid.jsonl"
        self._config = config
        self.rows = 0

    def __enter__(self) -> _ValidFile:
        self._file = open(self._part, "w", encoding="utf-8")
        if self._config.valid is not None:
            given = dataclasses.replace(self._config, path=self._config.valid, hub=None)
            with RejectsWriter(self._path.with_name("rejects_valid.jsonl")) as rejects:
                for row in rejects.kept(PairReader(open_source(given), given).rows()):
                    self._write(row)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._part, self._path)

    def divert(self, rows: Iterator[tuple[Row, bool]]) -> Iterator[Row]:
        """Pass training rows on and keep the held-out ones."""
        for row, is_held_out in rows:
            if is_held_out:
                self._write(row)
            else:
                yield row

    def _write(self, row: Row) -> None:
        if self._config.valid_rows is not None and self.rows >= self._config.valid_rows:
            return
        pair = Pair(row.number, row.values["prompt"], row.values["response"])
        self._file.write(json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n")
        self.rows += 1


def _row(pair: Pair) -> Row:
    return Row(pair.number, None, {"prompt": pair.prompt, "response": pair.response})
