"""What every store promises, asked of every store there is.

A new store is one more line in `STORES` and in `fresh_url`: a place that belongs to one test and
that other processes can open. `BATON_TEST_S3` names an S3 server other than moto.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from s3 import BUCKET

from baton.errors import BatonError, NameMissing, NameTaken, StoreError
from baton.store.base import Batch, Store
from baton.store.open import open_store

STORES = ("local", "s3", "hub", "bucket")
# Stores that are trees: a name is either a file or a folder. In a bucket both may be.
TREES = ("local", "hub")

ODD_NAMES = [
    "plain",
    "a/b/c/d/e",
    "with spaces/and (brackets) [x].json",
    "模型/医疗问答.json",
    "ümläut",
    "e\u0301",  # a combining accent, which some file systems rewrite
    "😀",
    "-starts-with-a-dash",
    "~tilde",
    ".hidden",
    "name.part",
    "%2e%2e",
    "a+b=c&d?e#f",
    "'quotes\"",
    "x" * 200,
    "tasks/lora_20k/train/checkpoints/step-000200/manifest.json",
]
REFUSED_NAMES = ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\\b", "a\0b"]
REFUSED_NAMES += ["a\nb", "a\x7fb", "c:d", "x" * 201]


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    prepare(request.param, request, monkeypatch)
    return str(request.param)


@pytest.fixture
def url(kind: str, tmp_path: Path) -> str:
    return fresh_url(kind, tmp_path)


def prepare(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start what this kind of store needs and tell clients where it is."""
    if kind == "local":
        return
    server = request.getfixturevalue("hub" if kind == "bucket" else kind)
    for name, value in {**server.environment, "BATON_HUB_COMMITS_PER_HOUR": "1000000"}.items():
        monkeypatch.setenv(name, value)


def fresh_url(kind: str, folder: Path) -> str:
    """An empty place of this kind."""
    unique = os.urandom(6).hex()
    return {
        "local": str(folder / "store"),
        "s3": f"s3://{BUCKET}/{unique}",
        "hub": f"hf://models/tester/{unique}",
        "bucket": f"hf://buckets/tester/{unique}",
    }[kind]


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(b"uploaded bytes")
    return path


def test_what_was_written_is_read_in_another_process(store: Store) -> None:
    store.write("a/b.json", b"bytes \x00\xff")
    program = (
        "import sys; from baton.store.open import open_store; "
        "sys.stdout.buffer.write(open_store(sys.argv[1]).read('a/b.json'))"
    )
    read = subprocess.run(
        [sys.executable, "-c", program, store.url], capture_output=True, check=True
    )
    assert read.stdout == b"bytes \x00\xff"


def test_a_new_store_is_empty(store: Store) -> None:
    assert list(store.names()) == []
    assert list(store.names("a")) == []


def test_looking_does_not_make_anything(store: Store, tmp_path: Path) -> None:
    list(store.names("a"))
    store.delete("a/b")
    with pytest.raises(NameMissing):
        store.read("a/b")
    assert list(store.names()) == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_plain_relative_path_is_a_name(
    store: Store, source: Path, tmp_path: Path, name: str
) -> None:
    store.write(name, b"one")
    assert store.read(name) == b"one"
    assert list(store.names()) == [name]
    store.download(name, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"one"
    store.delete(name)
    assert list(store.names()) == []
    store.upload(source, name)
    assert store.read(name) == b"uploaded bytes"


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_other_names_are_refused_by_every_method(
    store: Store, source: Path, tmp_path: Path, name: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError):
        store.read(name)
    with pytest.raises(StoreError):
        store.write(name, b"x")
    with pytest.raises(StoreError):
        store.write(name, b"x", exclusive=True)
    with pytest.raises(StoreError):
        store.upload(source, name)
    with pytest.raises(StoreError):
        store.download(name, tmp_path / "target")
    with pytest.raises(StoreError):
        store.delete(name)
    if name:  # the empty prefix is the whole store
        with pytest.raises(StoreError):
            list(store.names(name))
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_under_a_name_is_an_error_that_says_where(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NameMissing, match="no/such"):
        store.read("no/such")
    with pytest.raises(NameMissing, match="no/such"):
        store.download("no/such", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_folder_is_not_a_name(store: Store, kind: str) -> None:
    store.write("a/b", b"x")
    with pytest.raises(StoreError):
        store.read("a")
    if kind in TREES:
        with pytest.raises(StoreError):
            store.write("a", b"x")
    assert store.read("a/b") == b"x"


def test_a_name_below_a_name_is_refused_by_trees_and_nothing_is_lost(
    store: Store, kind: str
) -> None:
    store.write("a", b"x")
    if kind in TREES:
        with pytest.raises(StoreError):
            store.write("a/b", b"y")
    assert store.read("a") == b"x"


def test_writing_again_replaces(store: Store) -> None:
    store.write("a", b"long first version")
    store.write("a", b"second")
    assert store.read("a") == b"second"


def test_an_exclusive_write_never_replaces(store: Store) -> None:
    store.write("a", b"first", exclusive=True)
    with pytest.raises(NameTaken):
        store.write("a", b"second", exclusive=True)
    assert store.read("a") == b"first"
    store.delete("a")
    store.write("a", b"third", exclusive=True)
    assert store.read("a") == b"third"


def test_an_uploaded_name_is_never_replaced_by_an_upload(store: Store, source: Path) -> None:
    store.upload(source, "a/b")
    other = source.with_name("other.bin")
    other.write_bytes(b"other")
    with pytest.raises(NameTaken):
        store.upload(other, "a/b")
    assert store.read("a/b") == b"uploaded bytes"


def test_the_source_of_an_upload_may_be_removed(store: Store, source: Path) -> None:
    store.upload(source, "a")
    source.unlink()
    assert store.read("a") == b"uploaded bytes"


def test_an_upload_of_nothing_leaves_no_name(store: Store, tmp_path: Path) -> None:
    with pytest.raises((StoreError, OSError)):
        store.upload(tmp_path / "no such file", "a")
    assert list(store.names()) == []


def test_an_empty_file_is_stored_too(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    store.upload(tmp_path / "empty", "a")
    store.write("b", b"")
    assert (store.read("a"), store.read("b")) == (b"", b"")


def test_a_download_replaces_the_target_and_makes_its_folders(store: Store, tmp_path: Path) -> None:
    store.write("a", b"new")
    target = tmp_path / "deep" / "er" / "target"
    store.download("a", target)
    store.write("a", b"newer")
    store.download("a", target)
    assert target.read_bytes() == b"newer"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_download_stays_what_it_was_when_the_store_moves_on(store: Store, tmp_path: Path) -> None:
    store.write("a", b"first")
    store.download("a", tmp_path / "target")
    store.write("a", b"second")
    store.delete("a")
    assert (tmp_path / "target").read_bytes() == b"first"


def test_names_lists_folders_by_their_own_name_only(store: Store) -> None:
    for name in ("a/1", "a/2/3", "ab/4", "b"):
        store.write(name, b"")
    assert sorted(store.names()) == ["a/1", "a/2/3", "ab/4", "b"]
    assert sorted(store.names("a")) == ["a/1", "a/2/3"]
    assert list(store.names("a/2")) == ["a/2/3"]
    assert list(store.names("c")) == []


def test_many_names_are_all_listed(store: Store) -> None:
    expected = {f"many/{number // 100:02d}/{number:04d}" for number in range(1010)}
    if hasattr(store, "commit"):
        store.commit(Batch(message="many", writes=dict.fromkeys(expected, b"")))
    else:
        for name in expected:
            store.write(name, b"")
    assert set(store.names("many")) == expected


def test_deleting_what_is_not_there_is_no_error(store: Store) -> None:
    store.delete("a")
    store.delete("a/b/c")
    store.write("a/b", b"")
    store.delete("a/x")
    assert list(store.names()) == ["a/b"]


def test_a_url_opens_the_same_place_again(store: Store) -> None:
    store.write("a", b"x")
    assert open_store(store.url).read("a") == b"x"


# --- several processes at once --------------------------------------------------------------

WRITER = """
import sys
from baton.store.open import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
for number in range(int(sys.argv[2])):
    store.write("shared/value", bytes([65 + number % 20]) * (1 + number * 7919 % 200_000))
"""


def test_a_reader_never_sees_half_a_write(store: Store, kind: str) -> None:
    store.write("shared/value", b"A")
    times = {"local": "60", "s3": "30", "hub": "8", "bucket": "8"}[kind]
    writers = [start(WRITER, store.url, times) for _ in range(2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        data = store.read("shared/value")
        assert len(set(data)) == 1, "bytes of two writes"
        assert list(store.names()) == ["shared/value"], "an unfinished write has a name"
        reads += 1
    for writer in writers:
        assert writer.wait() == 0
        writer.communicate()
    assert reads > 2
    assert list(store.names()) == ["shared/value"]


KILLED = """
import sys
from pathlib import Path
from baton.store.open import open_store
store = open_store(sys.argv[1])
source = Path(sys.argv[2])
number = int(sys.argv[3])
print("ready", flush=True)
while True:
    store.write(f"w/{number}", b"w" * 50_000)
    store.upload(source, f"u/{number}")
    number += 1
"""


def test_a_killed_writer_leaves_whole_names_only(store: Store, kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"u" * 300_000)
    for kill in range(6 if kind == "local" else 3):
        # A server may go on with what a process asked that is gone: other names each time.
        writer = start(KILLED, store.url, str(source), str(1000 * kill))
        wanted = kill + 1
        while sum(1 for _ in store.names()) < wanted:
            assert writer.poll() is None
        writer.kill()
        writer.communicate()
        for name in list(store.names()):
            data = store.read(name)
            assert data == (b"w" * 50_000 if name[0] == "w" else b"u" * 300_000)
            store.delete(name)


RACER = """
import sys
from baton.errors import NameTaken
from baton.store.open import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    store.write("claim", sys.argv[2].encode(), exclusive=True)
    print("won")
except NameTaken:
    print("lost")
"""


def test_of_sixteen_exclusive_writers_one_wins(store: Store) -> None:
    racers = [start(RACER, store.url, str(number)) for number in range(16)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    outcomes = [racer.communicate()[0].strip() for racer in racers]
    assert sorted(outcomes) == ["lost"] * 15 + ["won"]
    assert int(store.read("claim")) == outcomes.index("won")


CLEANER = """
import sys
from baton.store.open import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    store.write(f"folder/{sys.argv[2]}", b"x")
    store.delete(f"folder/{sys.argv[2]}")
"""


def test_a_neighbour_that_empties_the_folder_disturbs_nobody(store: Store, kind: str) -> None:
    times = {"local": "100", "s3": "20", "hub": "4", "bucket": "4"}[kind]  # each is a commit there
    neighbours = [start(CLEANER, store.url, str(number), times) for number in range(3)]
    for neighbour in neighbours:
        neighbour.communicate()
    assert [neighbour.returncode for neighbour in neighbours] == [0, 0, 0]
    assert list(store.names()) == []


def start(program: str, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


# --- against a model ------------------------------------------------------------------------

PART = st.sampled_from(["a", "b", "c", "模", "x y"])
NAME = st.lists(PART, min_size=1, max_size=3).map("/".join)
DATA = st.binary(max_size=64)


class StoreMachine(RuleBasedStateMachine):
    """Does the same to a store and to a dict; both must always hold the same."""

    kind = "local"

    @initialize()
    def open(self) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        folder = Path(self.scratch.name)
        self.source, self.target = folder / "source", folder / "target"
        self.store = open_store(fresh_url(self.kind, folder))
        self.model: dict[str, bytes] = {}

    def teardown(self) -> None:
        if hasattr(self, "scratch"):
            self.scratch.cleanup()

    def is_possible(self, name: str) -> bool:
        """No name may lie below another: in a folder a name is either a file or a folder."""
        return not any(
            other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in self.model
        )

    @rule(name=NAME, data=DATA)
    def write(self, name: str, data: bytes) -> None:
        if not self.is_possible(name):
            if self.kind in TREES:
                with pytest.raises(StoreError):
                    self.store.write(name, data)
            return
        self.store.write(name, data)
        self.model[name] = data

    @rule(name=NAME, data=DATA)
    def write_exclusively(self, name: str, data: bytes) -> None:
        if name in self.model:
            with pytest.raises(NameTaken):
                self.store.write(name, data, exclusive=True)
        elif self.is_possible(name):
            self.store.write(name, data, exclusive=True)
            self.model[name] = data

    @rule(name=NAME, data=DATA)
    def upload(self, name: str, data: bytes) -> None:
        self.source.unlink(missing_ok=True)  # an uploaded file is never changed again
        self.source.write_bytes(data)
        if name in self.model:
            with pytest.raises(NameTaken):
                self.store.upload(self.source, name)
        elif self.is_possible(name):
            self.store.upload(self.source, name)
            self.model[name] = data

    @rule(name=NAME)
    def delete(self, name: str) -> None:
        if self.is_possible(name):
            self.store.delete(name)
            self.model.pop(name, None)

    @rule(name=NAME)
    def read(self, name: str) -> None:
        if name in self.model:
            assert self.store.read(name) == self.model[name]
        else:
            with pytest.raises(BatonError):
                self.store.read(name)

    @rule(name=NAME)
    def download(self, name: str) -> None:
        if name in self.model:
            self.store.download(name, self.target)
            assert self.target.read_bytes() == self.model[name]
        elif self.is_possible(name):
            with pytest.raises(NameMissing):
                self.store.download(name, self.target)

    @rule(prefix=st.one_of(st.just(""), NAME))
    def names(self, prefix: str) -> None:
        if prefix in self.model:
            return
        expected = {n for n in self.model if not prefix or n.startswith(f"{prefix}/")}
        assert set(self.store.names(prefix)) == expected

    @invariant()
    def everything_is_there(self) -> None:
        if hasattr(self, "store"):
            found = {name: self.store.read(name) for name in self.store.names()}
            assert found == self.model


def test_a_store_is_a_dict_of_bytes(kind: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type(f"{kind}Machine", (StoreMachine,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples={"local": 40, "s3": 12, "hub": 6, "bucket": 4}[kind],
            stateful_step_count=25 if kind == "local" else 15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(range(256)) * 80_000)  # 20 MB: more than one part where there are parts
    yield path
    path.unlink()


def test_a_large_file_comes_back_bit_for_bit(store: Store, large: Path, tmp_path: Path) -> None:
    store.upload(large, "large")
    store.download("large", tmp_path / "back")
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (large, tmp_path / "back")]
    assert digests[0] == digests[1]
