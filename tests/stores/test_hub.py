"""The Hub store: one commit for a checkpoint, limits, conflicts, and what people are told."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from far import Far
from minihub import MiniHub

from baton.errors import ConfigError, FencedError, NameTaken, StoreError, StoreRefused
from baton.store.base import Batch
from baton.store.hub import HubStore
from baton.store.open import open_remote


@pytest.fixture
def store(hub: Far) -> HubStore:
    opened = open_remote(hub.url())
    assert isinstance(opened, HubStore)
    return opened


def commits_of(hub: Far, store: HubStore) -> list[str]:
    """Titles, oldest first, without the one that made the repository."""
    assert hub.hub is not None
    repository = hub.hub.repository(store.repository.name)
    return [commit.title for commit in repository.commits.values()][1:]


def test_a_batch_is_one_commit_and_the_repository_is_private(
    hub: Far, store: HubStore, tmp_path: Path
) -> None:
    large = tmp_path / "adapter_model.safetensors"
    large.write_bytes(os.urandom(100_000))
    writes = {"step-2/adapter_model.safetensors": large, "step-2/state.json": b"{}"}
    store.commit(Batch(message="step 2", writes=writes, marker=("step-2/manifest.json", b"{}")))
    assert commits_of(hub, store) == ["step 2"]
    assert hub.hub is not None
    assert hub.hub.repository(store.repository.name).private
    assert set(store.names()) == {*writes, "step-2/manifest.json"}
    sent = len([1 for method, path, _ in hub.hub.log if "/lfs-put/" in path])
    store.commit(Batch(message="step 4", writes={"step-4/adapter_model.safetensors": large}))
    again = len([1 for method, path, _ in hub.hub.log if "/lfs-put/" in path])
    assert again == sent, "a file that is there under another name was sent again"


def test_looking_creates_no_repository(hub: Far, store: HubStore) -> None:
    assert list(store.names()) == []
    assert hub.hub is not None
    assert ("model", store.repository.name) not in hub.hub.repositories


def test_a_public_repository_has_to_be_asked_for(hub: Far) -> None:
    store = open_remote(f"{hub.url()}?visibility=public")
    store.write("a", b"")
    assert isinstance(store, HubStore)
    assert hub.hub is not None
    assert not hub.hub.repository(store.repository.name).private
    assert store.url.endswith("?visibility=public")


def test_a_busy_hub_is_waited_for(hub: Far, store: HubStore) -> None:
    store.write("first", b"")
    for status in (504, 500, 503):
        hub.proxy.rule(action="status", status=status, method="POST", path="/commit/main")
    store.commit(Batch(message="x", writes={"a": b"1"}))
    assert store.read("a") == b"1"


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Far, store: HubStore) -> None:
    store.write("first", b"")
    hub.proxy.rule(action="swallow", method="POST", path="/commit/main")
    store.commit(Batch(message="x", writes={"a": b"1"}, marker=("m", b"{}")))
    assert commits_of(hub, store) == ["first", "x"]


def test_a_limit_that_ends_soon_is_waited_out(hub: Far, store: HubStore) -> None:
    store.write("first", b"")
    hub.proxy.rule(action="status", status=429, method="POST", path="/commit/main", retry_after=1)
    store.commit(Batch(message="x", writes={"a": b"1"}))
    assert store.read("a") == b"1"


def test_a_limit_that_ends_late_is_told_and_kept_to(hub: Far, store: HubStore) -> None:
    store.write("first", b"")
    hub.proxy.rule(
        action="status", status=429, method="POST", path="/commit/main", retry_after=1800
    )
    with pytest.raises(StoreError, match=r"128 an hour\); again in 1800 s"):
        store.commit(Batch(message="x", writes={"a": b"1"}))
    assert 1700 < store.wait_seconds() <= 1800


def test_writers_that_meet_all_get_their_turn(hub: Far, store: HubStore) -> None:
    store.write("first", b"")

    def write(number: int) -> None:
        mine = open_remote(store.url)
        for turn in range(3):
            mine.commit(Batch(message="", writes={f"{number}/{turn}": b"x"}))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(store.names())) == 13


def test_a_lease_that_somebody_else_has_written_is_lost(hub: Far, store: HubStore) -> None:
    store.write("legs/001.json", b"1", exclusive=True)
    store.commit(Batch(message="", lease=("legs/001.json", b"2")))
    open_remote(store.url).write("legs/001.json", b"lost")
    before = commits_of(hub, store)
    with pytest.raises(FencedError):
        store.commit(Batch(message="", writes={"x": b""}, lease=("legs/001.json", b"3")))
    assert commits_of(hub, store) == before


def test_a_marker_is_written_once(hub: Far, store: HubStore) -> None:
    store.commit(Batch(message="", marker=("m", b"1")))
    with pytest.raises(NameTaken):
        store.commit(Batch(message="", writes={"x": b""}, marker=("m", b"2")))
    assert list(store.names()) == ["m"]


def test_the_history_is_squashed_when_asked(hub: Far) -> None:
    for query, expected in (("", 2), ("?squash=yes", 1)):
        store = open_remote(f"{hub.url()}{query}")
        store.write("a", b"1")
        store.task_finished("")
        assert isinstance(store, HubStore)
        assert hub.hub is not None
        assert len(hub.hub.repository(store.repository.name).commits) == expected
        assert store.read("a") == b"1"


def test_a_card_of_ours_is_replaced_and_one_of_a_person_stays(hub: Far, store: HubStore) -> None:
    mine = "---\n---\n<!-- written by baton -->\n# one"
    store.task_finished(mine)
    store.task_finished(mine.replace("one", "two"))
    assert store.read("README.md").endswith(b"# two")
    store.write("README.md", b"# mine")
    store.task_finished(mine)
    assert store.read("README.md") == b"# mine"


# --- what people are told --------------------------------------------------------------------


def test_a_token_that_may_not_write(hub: Far) -> None:
    with pytest.raises(StoreRefused, match="it needs write access to this repository"):
        open_remote("hf://models/forbidden/repository").write("a", b"")


def test_options_and_kinds_that_are_unknown(hub: Far) -> None:
    with pytest.raises(ConfigError, match="unknown option 'private'"):
        open_remote(f"{hub.url()}?private=no")


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MiniHub]:
    with MiniHub(tmp_path, commits_per_hour=12) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("BATON_HUB_COMMITS_PER_HOUR", "12")
        yield hub


def test_saves_keep_to_the_budget_and_a_handover_finds_room(limited: MiniHub) -> None:
    """What an uploader does: ordinary commits when there is no wait, urgent ones at the end."""
    store = open_remote("hf://models/tester/limited")
    other = open_remote("hf://models/tester/limited")
    store.write("legs/001.json", b"", exclusive=True)
    made = 1
    for number in range(20):
        writer = (store, other)[number % 2]
        assert isinstance(writer, HubStore)
        writer.repository.refresh()
        if writer.wait_seconds() == 0:
            writer.commit(Batch(message="save", writes={f"{number}": b""}))
            made += 1
    assert 2 <= made <= 9, "all writers share one budget"
    store.commit(Batch(message="handover", writes={"last": b""}, urgent=True))
    assert limited.log[-1][2] == 200
