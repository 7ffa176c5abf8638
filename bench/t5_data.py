"""Millions of pairs, from Parquet to a resumed batch: memory, rows a second, random access.

    python bench/t5_data.py --rows 10m [--scratch /tmp/t5_data]

Writes a Parquet file of random Chinese pairs, lets `baton run` tokenise it once in a process of
its own (whose peak memory is printed), asks for the same again, and then compares, in one run:
opening the tokens, the first batch of a resume at row 0 and near the end, and single rows read
from the tokens and from the Parquet file's row groups. Everything is deleted at the end unless
--keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from baton.config.fields import parse_count
from baton.data.tokenise import TokenFile
from baton.train.cursor import Cursor

EXPERIMENT = """\
pipeline: t5_pretrain
data: {{path: {path}, valid_rows: 1k}}
tokenizer: {{source: train, vocab: {vocab}, rows: 20k}}
"""
# A process started from a large one counts that one's memory in its `ru_maxrss`, so it says itself.
SAYING_ITS_PEAK = """\
import atexit, sys
from pathlib import Path
said = Path(sys.argv.pop(1))
atexit.register(lambda: said.write_text(Path("/proc/self/status").read_text()))
from baton.cli import main
main()
"""
BATCH = 192
GROUP_ROWS = 16_384
_CHARACTERS = [chr(0x4E00 + number) for number in range(3000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="10m", help="such as 200k or 10m")
    parser.add_argument("--vocab", type=int, default=29_298)
    parser.add_argument("--scratch", type=Path, default=Path("runs/bench_t5_data"))
    parser.add_argument("--keep", action="store_true", help="leave the files")
    args = parser.parse_args()
    rows = parse_count(args.rows) or int(args.rows)
    args.scratch.mkdir(parents=True, exist_ok=True)
    try:
        measure(rows, args.vocab, args.scratch)
    finally:
        if not args.keep:
            shutil.rmtree(args.scratch)


@dataclass(frozen=True)
class Figures:
    """What was measured, in one run on one machine."""

    rows_per_s: float
    peak_rss_gib: float
    opening_ms: float
    first_batch_ms: float
    late_batch_ms: float
    row_us: float
    row_group_us: float


def measure(rows: int, vocab: int, scratch: Path) -> Figures:
    path = scratch / "pairs.parquet"
    if not path.exists():
        seconds = timed(lambda: generate(path, rows))
        print(f"generated {rows:,} rows, {gib(path):.2f} GiB of Parquet, in {seconds:.0f} s")
    folder, rows_per_s, peak = tokenise(path, vocab, scratch)
    report = json.loads((folder / "report.json").read_bytes())["tokens"]["train"]
    count, samples = report["tokens"], report["samples"]
    size = gib(folder / "train.tokens")
    print(f"{count:,} tokens in {samples:,} rows ({count / samples:.0f} a row), {size:.2f} GiB")
    opening = 1000 * median(lambda: TokenFile(folder, "train"))
    print(f"opening: {opening:.1f} ms")
    tokens = TokenFile(folder, "train")
    early, late = first_batches(folder, len(tokens))
    print(
        f"first batch of {BATCH} after a resume: {early:.1f} ms at row 0,"
        f" {late:.1f} ms at row {int(0.9 * rows):,}"
    )
    row, group = access(path, tokens)
    print(
        f"one random row: {row:.1f} us from the tokens, {group / 1000:.2f} ms by reading"
        f" its Parquet row group of {GROUP_ROWS:,}: {group / row:,.0f} times as long"
    )
    return Figures(rows_per_s, peak, opening, early, late, row, group)


def generate(path: Path, rows: int) -> None:
    """Pairs of about 18 and 22 characters, put together from 100,000 random phrases."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 16, 100_000)
    # Some characters and words are much more frequent than others, as in any language.
    drawn = (rng.random(int(lengths.sum())) ** 3 * len(_CHARACTERS)).astype(int)
    text, ends = "".join(_CHARACTERS[i] for i in drawn), np.cumsum(lengths)
    phrases = pa.array(text[end - length : end] for end, length in zip(ends, lengths, strict=True))
    with pq.ParquetWriter(
        path, pa.schema([("prompt", pa.string()), ("response", pa.string())])
    ) as out:
        for start in range(0, rows, GROUP_ROWS):
            count = min(GROUP_ROWS, rows - start)
            prompt, *response = (
                phrases.take(pa.array(rng.integers(0, len(phrases), count))) for _ in range(3)
            )
            numbers = pc.cast(pa.array(np.arange(start, start + count)), pa.string())
            asked = pc.binary_join_element_wise(prompt, numbers, "？")
            answered = pc.binary_join_element_wise(*response, "，")
            out.write_table(pa.table({"prompt": asked, "response": answered}))


def tokenise(path: Path, vocab: int, scratch: Path) -> tuple[Path, float, float]:
    """Run the data stage in a process of its own: its folder, rows a second and peak GiB.

    Then once more, to see that what is tokenised is left alone.
    """
    experiment = scratch / "bench.yaml"
    experiment.write_text(EXPERIMENT.format(path=path.resolve(), vocab=vocab), encoding="utf-8")
    said = scratch / "status"
    command = [sys.executable, "-c", SAYING_ITS_PEAK, str(said), "run", str(experiment)]
    command += ["--task", "bench", "--stage", "data", "--store", str(scratch / "runs")]
    started = time.monotonic()
    process = subprocess.Popen(command, env=process_environment())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        sys.exit(f"baton run ended with {os.waitstatus_to_exitcode(status)}")
    rate = pq.ParquetFile(path).metadata.num_rows / seconds
    [peak_kib] = re.findall(r"^VmHWM:\s+(\d+) kB$", said.read_text(), re.MULTILINE)
    peak = int(peak_kib) / 2**20
    print(
        f"tokenised in {seconds:.0f} s: {rate:,.0f} rows/s, peak RSS {peak:.2f} GiB"
        f" (training the tokenizer included; {usage.ru_utime:.0f} s of CPU)"
    )
    [folder] = (scratch / "runs").glob("**/tasks/bench/data")
    written = (folder / "train.tokens").stat().st_mtime_ns
    seconds = timed(lambda: subprocess.run(command, check=True, env=process_environment()))
    assert written == (folder / "train.tokens").stat().st_mtime_ns, "tokenised a second time"
    print(f"asked for again: {seconds:.1f} s, and nothing is tokenised")
    return folder, rate, peak


def process_environment() -> dict[str, str]:
    return os.environ | {"BATON_DEVICE": "cpu"}


def first_batches(folder: Path, samples: int) -> tuple[float, float]:
    """Median milliseconds from opening the tokens to the first batch, at two positions."""
    cursor = Cursor(samples, BATCH, seed=42)

    def resume(step: int) -> None:
        tokens = TokenFile(folder, "train")
        indices = cursor.at(step)
        tokens.lengths(indices)
        for index in indices.tolist():
            tokens.sample(index)

    late = int(0.9 * samples) // BATCH
    return 1000 * median(lambda: resume(0)), 1000 * median(lambda: resume(late))


def access(path: Path, tokens: TokenFile) -> tuple[float, float]:
    """Microseconds of one random row: from the tokens, and by reading its Parquet row group."""
    rng = np.random.default_rng(1)
    file = pq.ParquetFile(path)
    picks = iter(rng.integers(0, file.num_row_groups, 1000).tolist())

    def read_group() -> None:
        file.read_row_group(next(picks)).slice(7, 1).to_pylist()

    group = median(read_group)
    indices = rng.integers(0, len(tokens), 20_000).tolist()
    seconds = timed(lambda: [tokens.sample(index) for index in indices]) / len(indices)
    return 1e6 * seconds, 1e6 * group


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(work: Callable[[], object], times: int = 15) -> float:
    return statistics.median(timed(work) for _ in range(times))


def gib(path: Path) -> float:
    return path.stat().st_size / 2**30


if __name__ == "__main__":
    main()
