"""The store in a bucket of the Hub: one of several writers wins without conditional writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from far import Far
from minibucket import File

from baton.errors import (
    ConfigError,
    DamagedError,
    FencedError,
    NameTaken,
    StoreBusy,
    StoreError,
    StoreRefused,
)
from baton.export import export_to_hub
from baton.store.base import Batch
from baton.store.hub_objects import HubBucketStore
from baton.store.local import LocalStore
from baton.store.open import open_remote
from baton.store.patience import Patience


@pytest.fixture
def store(bucket: Far) -> HubBucketStore:
    opened = open_remote(bucket.url())
    assert isinstance(opened, HubBucketStore)
    return opened


def name_of(store: HubBucketStore) -> str:
    return store.url.removeprefix("hf://buckets/").partition("?")[0]


def files(bucket: Far, store: HubBucketStore) -> dict[str, File]:
    """All that is there, as the Hub sees it."""
    assert bucket.hub is not None
    return bucket.hub.buckets.buckets[name_of(store)]


def asked(bucket: Far, part: str) -> int:
    """How many requests had this in their path."""
    return sum(1 for _, path, _ in bucket.proxy.log if part in path)


def test_looking_creates_no_bucket(bucket: Far, store: HubBucketStore) -> None:
    assert list(store.names()) == []
    store.delete("a")
    assert bucket.hub is not None
    assert name_of(store) not in bucket.hub.buckets.buckets


def test_a_bucket_is_private_unless_asked_for(bucket: Far, store: HubBucketStore) -> None:
    assert bucket.hub is not None
    public = open_remote(f"{bucket.url()}?visibility=public")
    assert isinstance(public, HubBucketStore)
    for opened in (store, public):
        opened.write("a", b"")
    assert bucket.hub.buckets.private[name_of(store)]
    assert not bucket.hub.buckets.private[name_of(public)]
    assert public.url.endswith("?visibility=public")
    assert public.below("x").url.endswith("/x?visibility=public")
    assert open_remote(public.url).read("a") == b""


def test_an_exclusive_write_leaves_nothing_else(
    bucket: Far, store: HubBucketStore, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(500_000))
    store.write("claim", b"1", exclusive=True)
    store.upload(large, "large")
    with pytest.raises(NameTaken):
        store.write("claim", b"2", exclusive=True)
    assert set(files(bucket, store)) == {"claim", "large"}
    assert store.read("large") == large.read_bytes()


def test_an_exclusive_write_whose_answer_was_lost_is_ours(
    bucket: Far, store: HubBucketStore
) -> None:
    store.write("first", b"")
    # The claim's own batch is the first, the write's the second.
    lost = bucket.proxy.rule(action="swallow", method="POST", path="/batch", skip=1)
    store.write("claim", b"mine", exclusive=True)
    assert lost.hits == 1
    assert store.read("claim") == b"mine"


def test_an_unchanged_file_is_never_sent_again(
    bucket: Far, store: HubBucketStore, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(500_000))
    store.commit(Batch(message="", blobs={"blobs/x": large}, marker=("m1", b"1")))
    sent = asked(bucket, "/v1/xorbs/")
    store.commit(Batch(message="", blobs={"blobs/x": large}))
    assert asked(bucket, "/v1/xorbs/") == sent


def test_a_lease_that_somebody_else_has_written_is_lost(bucket: Far, store: HubBucketStore) -> None:
    store.write("legs/001.json", b"1", exclusive=True)
    store.commit(Batch(message="", lease=("legs/001.json", b"2")))
    open_remote(store.url).write("legs/001.json", b"lost")
    with pytest.raises(FencedError, match="taken over by somebody else"):
        store.commit(Batch(message="", writes={"x": b""}, lease=("legs/001.json", b"3")))
    assert set(store.names()) == {"legs/001.json"}
    open_remote(store.url).delete("legs/001.json")
    with pytest.raises(FencedError):
        store.commit(Batch(message="", lease=("legs/001.json", b"4")))


def test_a_renewal_whose_answer_was_lost_is_ours(bucket: Far, store: HubBucketStore) -> None:
    store.write("legs/001.json", b"1", exclusive=True)
    lost = bucket.proxy.rule(action="swallow", method="POST", path="/batch")
    store.commit(Batch(message="", lease=("legs/001.json", b"2")))
    store.commit(Batch(message="", lease=("legs/001.json", b"3")))
    assert lost.hits == 1
    assert store.read("legs/001.json") == b"3"


CLAIM_AND_HANG = """
import sys, time
from baton.store.open import open_remote
store = open_remote(sys.argv[1])
with store._bucket._claim("claim") as is_alone:
    print(is_alone, flush=True)
    time.sleep(600)
"""


def test_a_claim_is_respected_while_its_process_lives_and_no_longer(
    bucket: Far, store: HubBucketStore
) -> None:
    store.write("first", b"")
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_HANG, store.url], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    impatient = open_remote(store.url, Patience(should_stop=lambda: True))
    with pytest.raises(StoreBusy, match="others are at it, too"):
        impatient.write("claim", b"second", exclusive=True)
    impatient.write("another", b"", exclusive=True)
    other.kill()
    other.communicate()
    assert any("/claims/" in path for path in files(bucket, store)), "it died in the middle"
    store.write("claim", b"second", exclusive=True)
    assert set(store.names()) == {"first", "another", "claim"}
    assert not any("/claims/" in path for path in files(bucket, store)), "it was tidied up"


def test_a_claim_of_another_machine_is_waited_for_until_it_is_old(
    bucket: Far, store: HubBucketStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("first", b"")
    monkeypatch.setattr("baton.store.hub_bucket._machine", lambda _: "elsewhere")
    with store._bucket._claim("claim") as is_alone:
        assert is_alone
        (claim,) = (path for path in files(bucket, store) if "/claims/" in path)
        left = files(bucket, store)[claim]
    monkeypatch.undo()
    files(bucket, store)[claim] = left
    monkeypatch.setattr("baton.store.hub_bucket._STALE_SECONDS", 1.0)
    store.write("claim", b"mine", exclusive=True)
    found = files(bucket, store)
    assert set(found) == {"first", "claim"}
    assert found["claim"].uploaded - left.uploaded > 1.0


def test_a_claim_with_a_name_of_nobodys_is_waited_for_until_it_is_old(
    bucket: Far, store: HubBucketStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("first", b"")
    with store._bucket._claim("claim"):
        (claim,) = (path for path in files(bucket, store) if "/claims/" in path)
    folder = claim.rpartition("/")[0]
    files(bucket, store)[f"{folder}/of.somebody"] = File("0" * 64, 0, time.time())
    monkeypatch.setattr("baton.store.hub_bucket._STALE_SECONDS", 1.0)
    store.write("claim", b"mine", exclusive=True)
    assert set(files(bucket, store)) == {"first", "claim"}


def test_what_nobody_finished_is_swept_after_a_day(bucket: Far, store: HubBucketStore) -> None:
    store.write("first", b"")
    now = time.time()
    for name, age in (("claims/x/y", 90_000), ("staged/z", 90_000), ("staged/new", 80_000)):
        files(bucket, store)[f".baton/{name}"] = File("0" * 64, 0, now - age)
    assert store.sweep_uploads() == [".baton/claims/x/y", ".baton/staged/z"]
    assert store.sweep_uploads() == []
    assert set(files(bucket, store)) == {"first", ".baton/staged/new"}


def test_bytes_that_changed_at_rest_are_refused(
    bucket: Far, store: HubBucketStore, tmp_path: Path
) -> None:
    assert bucket.hub is not None
    store.write("a", b"what was saved")
    content = bucket.hub.buckets.folder / f"xet-{files(bucket, store)['a'].hash}"
    content.write_bytes(b"what Was saved")
    with pytest.raises(DamagedError, match="not what was saved"):
        store.read("a")
    with pytest.raises(DamagedError, match="not what was saved"):
        store.download("a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_many_names_come_in_pages(bucket: Far, store: HubBucketStore) -> None:
    expected = {f"n/{number:04d}" for number in range(2100)}
    store.commit(Batch(message="", writes=dict.fromkeys(expected, b"x")))
    assert {listed.name for listed in store.listing()} == expected
    assert asked(bucket, "cursor=2000") == 1


# --- what people are told --------------------------------------------------------------------


def test_a_token_that_may_not_write(
    bucket: Far, store: HubBucketStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreRefused, match="it needs write access to this bucket"):
        open_remote("hf://buckets/forbidden/bucket").write("a", b"")
    store.write("a", b"")
    bucket.proxy.rule(action="status", status=403, method="GET", path="/xet-write-token")
    with pytest.raises(StoreRefused, match="the token may not write to this bucket"):
        store.write("b", b"new")
    assert list(store.names()) == ["a"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://buckets/tester", "name a bucket: hf://buckets/user/bucket"),
        ("hf://buckets/tester/b?squash=yes", "unknown option 'squash'"),
        ("hf://buckets/tester/b/../c", "is not a name inside a store"),
    ],
)
def test_urls_that_name_no_bucket(bucket: Far, url: str, said: str) -> None:
    with pytest.raises((ConfigError, StoreError), match=said):
        open_remote(url)


def test_a_model_is_not_exported_to_where_nobody_loads_it_from(
    bucket: Far, store: HubBucketStore, tmp_path: Path
) -> None:
    local = LocalStore(tmp_path)
    local.write("train/final/task.json", b"{}")
    with pytest.raises(ConfigError, match="nobody loads models from a bucket"):
        export_to_hub(local, store.url, task="t", stages=["train"])
    assert list(store.names()) == []


def test_a_library_without_buckets(bucket: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("huggingface_hub.HfApi.batch_bucket_files")
    with pytest.raises(ConfigError, match="knows no buckets; pip install -U"):
        open_remote(bucket.url())
