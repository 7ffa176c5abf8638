"""The S3 store against boto3's own transfers, and what background upload costs training.

    python bench/store.py [--megabytes 256] [--rounds 5] [--only transfer,dedup,many,stall]

Everything runs against one server in one process: moto, or the one that BATON_TEST_S3 names.
Prints a line for each question; exits with 1 if an answer is not good enough.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "services"))

from faultproxy import FaultProxy
from s3 import BUCKET, S3Server, s3_server

from baton.identity import this_runner
from baton.legs import utc_now
from baton.record import LegRecord
from baton.store.base import Batch, Listed
from baton.store.checkpoint import Checkpoints, Retention
from baton.store.local import LocalStore
from baton.store.mirror import Mirror
from baton.store.open import open_remote
from baton.store.parallel import in_parallel
from baton.store.upload import Uploader

LEAST_RATIO = 0.9
MOST_STALL = 0.01
MOST_GROWTH_BYTES = 64 * 2**20
OBJECTS = 10_000
STAGES = ("data", "train", "eval")


def transfer(server: S3Server, folder: Path, megabytes: int, rounds: int) -> bool:
    """Upload and download one file, by turns with boto3; medians over the rounds.

    Uploads are compared twice: with boto3 as it is, which adds a CRC32 to each part, and with
    boto3 told to add none over plain HTTP, as baton adds none, because the signature covers
    the bytes. A server may do more where no checksum is named: moto then makes a CRC-64 of the
    whole file, which takes it longer than all parts. So the second is what must be good.
    """
    source = folder / "large"
    with open(source, "wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(2**20))
    store = open_remote(f"s3://{BUCKET}/transfer")
    clients = {"boto3": _client("when_supported"), "boto3, no CRC32": _client("when_required")}
    mine, theirs = folder / "mine", folder / "theirs"
    seconds: dict[str, list[float]] = {}
    sha256 = _digest(source)

    def timed(what: str, work: Callable[[], object]) -> None:
        started = time.monotonic()
        work()
        seconds.setdefault(what, []).append(time.monotonic() - started)

    # The round before the first is not counted: connections are made in it.
    for number in range(rounds + 1):
        # As checkpoints are sent: their SHA-256 is known from the save.
        name = f"blobs-{number}/{sha256}"
        batch = Batch(message="", blobs={name: source})
        timed("upload", functools.partial(store.commit, batch))
        key = f"transfer/boto3-{number}"
        for who, client in clients.items():
            timed(f"upload {who}", functools.partial(client.upload_file, source, BUCKET, key))
        timed("download", functools.partial(store.download, name, mine))
        timed("download boto3", functools.partial(client.download_file, BUCKET, key, theirs))
        assert _digest(mine) == _digest(theirs) == sha256
        store.delete(name)
        client.delete_object(Bucket=BUCKET, Key=key)
        mine.unlink()
        theirs.unlink()
    ratios = {}
    for other in ("upload boto3", "upload boto3, no CRC32", "download boto3"):
        way, _, who = other.partition(" ")
        # Of each round its own: a machine that others use as well is not equally fast in all.
        pairs = zip(seconds[way][1:], seconds[other][1:], strict=True)
        ratios[other] = statistics.median(plain / own for own, plain in pairs)
        ours, boto = (statistics.median(seconds[what][1:]) for what in (way, other))
        print(
            f"{way} {megabytes} MiB: {megabytes / ours:.0f} MiB/s, {who}"
            f" {megabytes / boto:.0f} MiB/s, ratio {ratios[other]:.2f}"
        )
    del ratios["upload boto3"]
    return min(ratios.values()) >= LEAST_RATIO


def dedup(_: S3Server, folder: Path) -> bool:
    """Save a LoRA task twice: the second save sends what changed, and nothing else."""
    store = open_remote(f"s3://{BUCKET}/dedup-{os.urandom(3).hex()}")
    mirror, record, checkpoints = _task(store, folder / "dedup")
    sent: list[int] = []
    events = store._bucket.client.meta.events
    events.register(
        "before-send.s3",
        lambda request, **_: sent.append(int(request.headers.get("Content-Length", 0))),
    )
    local = mirror.local
    local.write("data/train.tokens", os.urandom(64 * 2**20))
    frozen = os.urandom(8 * 2**20)
    totals, changed = [], 0
    for step in (1, 2):
        staging = folder / "staging"
        staging.mkdir()
        (staging / "adapter.safetensors").write_bytes(os.urandom(4 * 2**20))
        (staging / "optimizer.safetensors").write_bytes(os.urandom(8 * 2**20))
        (staging / "frozen.safetensors").write_bytes(frozen)
        checkpoints.save(step, staging)
        for path in staging.iterdir():
            path.unlink()
        staging.rmdir()
        changed = 12 * 2**20
        sent.clear()
        uploader = Uploader(mirror=mirror, stages=STAGES, record=lambda: record)
        uploader.start()
        assert uploader.finish(deadline=lambda: None) == []
        uploader.close()
        totals.append(sum(sent))
    print(
        f"second save of a LoRA task: {totals[1] / 2**20:.2f} MiB sent, {changed / 2**20:.0f} MiB"
        f" changed; first save {totals[0] / 2**20:.0f} MiB"
    )
    return totals[1] < changed + 2**16


def many(_: S3Server, folder: Path) -> bool:
    """List and verify many small objects; memory must not grow with their number."""
    del folder
    store = open_remote(f"s3://{BUCKET}/many-{os.urandom(3).hex()}")
    names = [f"objects/{number // 100:03d}/{number:05d}" for number in range(OBJECTS)]
    wrote = _timed(
        lambda: store.commit(Batch(message="many", writes={n: n.encode() for n in names}))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def look() -> None:
        def is_whole(listed: Listed) -> bool:
            return store.read(listed.name) == listed.name.encode()

        found = list(in_parallel(is_whole, store.listing("objects")))
        assert len(found) == OBJECTS
        assert all(found)

    seconds = _timed(look)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(
        f"{OBJECTS:,} objects: written in {wrote:.0f} s, listed and verified in {seconds:.0f} s,"
        f" memory grew by {growth / 2**20:.0f} MiB"
    )
    return growth < MOST_GROWTH_BYTES


def stall(server: S3Server, folder: Path, rounds: int) -> bool:
    """The same steps and saves, with and without a slow store behind them; by turns.

    The stall is what a step's save and the call that tells the uploader take longer with the
    store than without, as a share of the step. Steps themselves are shown too: a sender that
    shares two cores with training and with the server slows both, which is no waiting.
    """
    import torch

    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    steps: dict[bool, list[float]] = {True: [], False: []}
    saves: dict[bool, list[float]] = {True: [], False: []}
    stored = 0
    with FaultProxy("127.0.0.1", server.port) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        proxy.rule(action="rate", method="PUT", bytes_per_second=4 * 2**20, times=10**9)
        for number in range(2 * rounds):
            is_sent = number % 2 == 0
            place = folder / f"stall-{number}"
            store = open_remote(f"s3://{BUCKET}/stall-{os.urandom(3).hex()}")
            mirror, record, checkpoints = _task(store, place)
            uploader = Uploader(mirror=mirror, stages=STAGES, record=lambda record=record: record)
            if is_sent:
                uploader.start()
            for step in range(1, 9):
                started = time.monotonic()
                for _ in range(60):
                    matrix = torch.tanh(matrix @ matrix)
                steps[is_sent].append(time.monotonic() - started)
                staging = place / "staging"
                staging.mkdir(parents=True)
                (staging / "optimizer.safetensors").write_bytes(os.urandom(2 * 2**20))
                started = time.monotonic()
                checkpoints.save(step, staging)
                if is_sent:
                    uploader.saved("train/checkpoints", Retention(keep_last=2))
                checkpoints.prune(Retention(keep_last=2))
                saves[is_sent].append(time.monotonic() - started)
                (staging / "optimizer.safetensors").unlink()
                staging.rmdir()
            if is_sent:
                uploader.finish(deadline=lambda: None)
                uploader.close()
                stored = mirror.index.durable["train/checkpoints"]
    step, slower = (statistics.median(steps[which]) for which in (False, True))
    save, longer = (statistics.median(saves[which]) for which in (False, True))
    share = max(0.0, longer - save) / (step + save)
    print(
        f"a store of 4 MiB/s behind training: a save takes {1000 * longer:.1f} ms instead of"
        f" {1000 * save:.1f} ms after steps of {1000 * slower:.0f} ms instead of"
        f" {1000 * step:.0f} ms: stall {100 * share:.2f} %; step {stored} stored in the end"
    )
    return share < MOST_STALL


def _task(store: Any, folder: Path) -> tuple[Mirror, LegRecord, Checkpoints]:
    """A task with a leg at work, on this machine and in the store."""
    mirror = Mirror(LocalStore(folder), store, "task")
    record = LegRecord(
        task="task",
        number=1,
        state="active",
        runner=this_runner(),
        started=utc_now(),
        position=[0, 0, 0],
    )
    mirror.remote.write("legs/001.json", record.to_json(), exclusive=True)
    checkpoints = Checkpoints(mirror.local, "train/checkpoints", 1, lambda: None, utc_now)
    return mirror, record, checkpoints


def _client(checksums: str) -> Any:
    """boto3 with its own parts and threads, and a rule on when it adds checksums of its own."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation=checksums),
    )


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="transfer,dedup,many,stall")
    options = parser.parse_args()
    good = []
    with s3_server() as server, tempfile.TemporaryDirectory(prefix="bench-store-") as name:
        os.environ.update(server.environment)
        print(f"server: {'moto' if server.is_moto else server.endpoint}")
        wanted, folder = options.only.split(","), Path(name)
        if "transfer" in wanted:
            good.append(transfer(server, folder, options.megabytes, options.rounds))
        if "dedup" in wanted:
            good.append(dedup(server, folder))
        if "many" in wanted:
            good.append(many(server, folder))
        if "stall" in wanted:
            good.append(stall(server, folder, options.rounds))
    print("store bench:", "good" if all(good) else "NOT good enough")
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
