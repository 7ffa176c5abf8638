"""The S3 store against a server that misbehaves, and what it says to people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from far import Far
from s3 import BUCKET

from baton.errors import (
    BatonError,
    DamagedError,
    FencedError,
    NameMissing,
    NameTaken,
    StoreError,
    StoreRefused,
)
from baton.store.base import Batch, Wanted
from baton.store.checkpoint import sha256_of
from baton.store.open import open_remote
from baton.store.partial import PART_BYTES
from baton.store.s3 import S3Store

LARGE_BYTES = 40 * 2**20


@pytest.fixture
def store(s3: Far) -> S3Store:
    opened = open_remote(s3.url())
    assert isinstance(opened, S3Store)
    return opened


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.bin"
    path.write_bytes(os.urandom(LARGE_BYTES))
    return path


@pytest.mark.parametrize(
    "fault",
    [
        {"action": "status", "status": 503, "method": "PUT"},
        {"action": "status", "status": 500, "code": "InternalError", "method": "PUT"},
        {"action": "reset_request", "method": "PUT", "after": 100_000},
        {"action": "swallow", "method": "PUT"},
        {"action": "swallow", "method": "POST"},
    ],
    ids=lambda fault: f"{fault['action']}-{fault['method']}",
)
def test_an_upload_survives_trouble_on_the_way(
    s3: Far, store: S3Store, large: Path, tmp_path: Path, fault: dict[str, Any]
) -> None:
    rule = s3.proxy.rule(times=2, **fault)
    store.upload(large, "large")
    assert rule.hits == 2
    s3.proxy.clear()
    store.download("large", tmp_path / "back")
    assert sha256_of(tmp_path / "back") == sha256_of(large)


@pytest.mark.parametrize(
    "fault",
    [
        {"action": "status", "status": 503},
        {"action": "reset", "after": 1_000_000},
        {"action": "truncate", "after": 1_000_000},
        {"action": "corrupt", "at": 1_000_000},
    ],
    ids=lambda fault: fault["action"],
)
def test_a_download_survives_trouble_and_sees_a_changed_byte(
    s3: Far, store: S3Store, large: Path, tmp_path: Path, fault: dict[str, Any]
) -> None:
    store.upload(large, "large")
    rule = s3.proxy.rule(method="GET", path="large", times=2, skip=1, **fault)
    store.download("large", tmp_path / "back")
    assert rule.hits == 2
    assert sha256_of(tmp_path / "back") == sha256_of(large)
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def test_a_download_goes_on_where_another_process_stopped(
    s3: Far, store: S3Store, large: Path, tmp_path: Path
) -> None:
    store.upload(large, "large")
    last = f"bytes={LARGE_BYTES - PART_BYTES}-"
    s3.proxy.rule(
        action="status", status=403, code="AccessDenied", method="GET", path="/large", range=last
    )
    with pytest.raises(StoreRefused):
        store.download("large", tmp_path / "back")
    assert (tmp_path / "back.part.done").exists()
    s3.proxy.clear()
    s3.proxy.log.clear()
    store.download("large", tmp_path / "back")
    asked = [1 for method, path, _ in s3.proxy.log if method == "GET" and "/large" in path]
    assert len(asked) == 1, "parts that were there are not asked for again"
    assert sha256_of(tmp_path / "back") == sha256_of(large)


def test_bytes_that_changed_at_rest_are_refused(s3: Far, store: S3Store, tmp_path: Path) -> None:
    store.write("a", b"what was saved")
    client: Any = s3.s3.client() if s3.s3 else None
    key = f"{store.url.removeprefix(f's3://{BUCKET}/')}/a"
    noted = client.head_object(Bucket=BUCKET, Key=key)["Metadata"]
    client.put_object(Bucket=BUCKET, Key=key, Body=b"what was saveD", Metadata=noted)
    with pytest.raises(DamagedError, match="not what was saved"):
        store.read("a")
    with pytest.raises(DamagedError):
        store.download("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    wanted = Wanted(name="a", size=3, sha256="0" * 64, target=tmp_path / "b")
    with pytest.raises(DamagedError, match="14 bytes, manifest says 3"):
        store.fetch([wanted])


def test_an_exclusive_write_whose_answer_was_lost_is_ours(s3: Far, store: S3Store) -> None:
    rule = s3.proxy.rule(action="swallow", method="PUT", path="claim")
    store.write("claim", b"mine", exclusive=True)
    assert rule.hits == 1
    with pytest.raises(NameTaken):
        store.write("claim", b"mine", exclusive=True)


def test_a_lease_that_somebody_else_has_written_is_lost(s3: Far, store: S3Store) -> None:
    store.write("legs/001.json", b"1", exclusive=True)
    store.commit(Batch(message="", lease=("legs/001.json", b"2")))
    other = open_remote(store.url)
    other.write("legs/001.json", b"lost")
    if s3.s3 is not None and not store._bucket.can.match:
        pytest.fail("this server was to have If-Match")
    with pytest.raises(FencedError):
        store.commit(
            Batch(message="", writes={"x": b""}, lease=("legs/001.json", b"3"), marker=("m", b""))
        )
    assert sorted(store.names()) == ["legs/001.json"], "a zombie has written"
    assert store.read("legs/001.json") == b"lost"


def test_a_renewal_whose_answer_was_lost_is_ours(s3: Far, store: S3Store) -> None:
    store.write("legs/001.json", b"1", exclusive=True)
    s3.proxy.rule(action="swallow", method="PUT", path="legs/001")
    store.commit(Batch(message="", lease=("legs/001.json", b"2")))
    store.commit(Batch(message="", lease=("legs/001.json", b"3")))
    assert store.read("legs/001.json") == b"3"


def test_a_server_without_conditional_writes_is_found_out_and_named(
    s3: Far, caplog: pytest.LogCaptureFixture
) -> None:
    if s3.s3 is not None and not s3.s3.is_moto:
        pytest.skip("the headers are taken out on the way, which a server that signs notices")
    s3.proxy.rule(action="ignore", times=10**9)
    store = open_remote(s3.url())
    store.write("claim", b"1", exclusive=True)
    with pytest.raises(NameTaken):
        store.write("claim", b"2", exclusive=True)
    assert store.read("claim") == b"1"
    assert sum("ignores If-None-Match" in record.message for record in caplog.records) == 1
    store.commit(Batch(message="", lease=("claim", b"3"), marker=("m", b"")))
    assert store.read("claim") == b"3"


def test_an_unchanged_file_is_never_sent_again(s3: Far, store: S3Store, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(os.urandom(100_000))
    blob = f"blobs/{sha256_of(file)}"
    store.commit(Batch(message="", blobs={blob: file}))
    s3.proxy.log.clear()
    store.commit(Batch(message="", blobs={blob: file}, marker=("step-2/manifest.json", b"{}")))
    puts = [
        path for method, path, _ in s3.proxy.log if method == "PUT" and "conditional" not in path
    ]
    assert len(puts) == 1
    assert puts[0].endswith("manifest.json")


def test_a_marker_is_never_there_before_what_it_promises(s3: Far, store: S3Store) -> None:
    refused = s3.proxy.rule(
        action="status", status=403, code="AccessDenied", method="PUT", path="one"
    )
    batch = Batch(
        message="",
        writes={"one": b"1", "two": b"2"},
        marker=("manifest.json", b"{}"),
        last={"done.json": b"{}"},
    )
    with pytest.raises(StoreRefused):
        store.commit(batch)
    assert refused.hits == 1
    assert set(store.names()) <= {"two"}
    store.commit(batch)
    assert set(store.names()) == {"one", "two", "manifest.json", "done.json"}


def test_uploads_that_nobody_finished_can_be_ended(
    s3: Far, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Any = s3.s3.client() if s3.s3 else None
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/left-over")
    if s3.s3 is not None and not s3.s3.is_moto:  # moto's all began in 2010
        assert store.sweep_uploads() == [], "it may still be going on"
    monkeypatch.setattr("baton.store.s3._STALE_SECONDS", 0.0)
    assert store.sweep_uploads() == ["left-over"]
    assert store.sweep_uploads() == []


# --- what people are told --------------------------------------------------------------------


def test_a_bucket_that_is_not_there(s3: Far) -> None:
    said = refused("s3://no-such-bucket/x")
    assert "s3://no-such-bucket at http://127.0.0.1:" in said
    assert "there is no such bucket there; create it" in said


def test_no_credentials(s3: Far, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "there are no credentials; set AWS_ACCESS_KEY_ID" in refused(f"s3://{BUCKET}/x")


def test_a_profile_that_is_not_there(s3: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "no such profile in ~/.aws; check AWS_PROFILE" in refused(f"s3://{BUCKET}/x")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (400, "ExpiredToken", "the credentials have expired; renew them"),
        (403, "InvalidAccessKeyId", "does not know this access key"),
        (403, "SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY"),
        (403, "AccessDenied", "a store needs s3:ListBucket, GetObject"),
        (403, "RequestTimeTooSkewed", "this machine's clock is wrong"),
        (400, "AuthorizationHeaderMalformed", "in another region; set AWS_REGION"),
    ],
)
def test_what_the_server_refuses_is_said_with_what_to_do(
    s3: Far, status: int, code: str, said: str
) -> None:
    s3.proxy.rule(action="status", status=status, code=code, times=10**6)
    message = refused(f"s3://{BUCKET}/x")
    assert said in message
    assert f"({code})" in message


def test_a_server_that_does_not_answer_may_answer_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"does not answer .*; check AWS_ENDPOINT_URL") as raised:
        open_remote(f"s3://{BUCKET}/x")
    assert not isinstance(raised.value, StoreRefused)
    assert raised.value.exit_status == 1


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "hf://", "hf://user", "gs://b/x", "s3://B_/x"])
def test_a_url_that_names_no_place(s3: Far, url: str) -> None:
    with pytest.raises(BatonError) as raised:
        open_remote(url)
    assert raised.value.exit_status == 78


def refused(url: str) -> str:
    with pytest.raises(StoreRefused) as raised:
        open_remote(url)
    assert raised.value.exit_status == 78
    return str(raised.value)


def test_what_is_not_there_is_missing(store: S3Store) -> None:
    with pytest.raises(NameMissing, match="nope"):
        store.read("nope")
