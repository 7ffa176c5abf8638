"""What stores are made of: threads, parts of files, budgets, retention."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.errors import ConfigError, DamagedError
from baton.store.checkpoint import Retention
from baton.store.commits import CommitBudget
from baton.store.parallel import all_of, in_parallel
from baton.store.partial import fetch_in_parts


def test_results_come_in_order_and_few_wait() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return number * number

    results = in_parallel(work, range(1000), workers=4)
    assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
    assert len(begun) <= 10 + 8 + 4, "memory must not grow with the number of items"
    assert list(results) == [n * n for n in range(10, 1000)]


def test_the_first_error_is_raised_and_the_rest_left_undone() -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        all_of(work, range(1000), workers=2)
    assert len(begun) < 100


def test_nothing_to_do_is_done_at_once() -> None:
    assert list(in_parallel(str, [])) == []


def test_threads_do_not_keep_a_process_from_ending() -> None:
    seen = list(in_parallel(lambda _: threading.current_thread().daemon, range(3)))
    assert seen == [True, True, True]


DATA = os.urandom(1000)
SHA256 = hashlib.sha256(DATA).hexdigest()


def fetch(target: Path, asked: list[int], data: bytes = DATA, sha256: str = SHA256) -> None:
    def read(start: int, length: int) -> bytes:
        asked.append(start)
        if start == 700 and len(asked) < 100 and data is DATA and target.name == "broken":
            raise OSError("the connection broke")
        return data[start : start + length]

    fetch_in_parts(target, size=1000, sha256=sha256, what="it", read=read, part_bytes=100)


def test_a_file_that_broke_off_is_gone_on_with(tmp_path: Path) -> None:
    broken, asked = tmp_path / "broken", []
    with pytest.raises(OSError, match="broke"):
        fetch(broken, asked)
    assert not broken.exists()
    for path in tmp_path.iterdir():
        path.rename(tmp_path / path.name.replace("broken", "whole"))
    asked.clear()
    fetch(tmp_path / "whole", asked)
    assert (tmp_path / "whole").read_bytes() == DATA
    assert 700 in asked
    assert 0 not in asked, "what was there is not asked for again"
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def await_that(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.001)


def test_what_came_before_an_earlier_part_broke_off_is_kept(tmp_path: Path) -> None:
    target, asked, notes = tmp_path / "f", [], tmp_path / "f.part.done"

    def first_part_breaks(start: int, length: int) -> bytes:
        if start:
            return DATA[start : start + length]
        await_that(lambda: len(notes.read_text().splitlines()) == 1 + 9)
        raise OSError("the connection broke")

    with pytest.raises(OSError, match="broke"):
        fetch_in_parts(
            target, size=1000, sha256=SHA256, what="it", read=first_part_breaks, part_bytes=100
        )
    fetch(target, asked)
    assert asked == [0]
    assert target.read_bytes() == DATA


def test_a_part_that_comes_too_late_goes_nowhere(tmp_path: Path) -> None:
    is_over, slow = threading.Event(), []

    def one_breaks_another_hangs(start: int, length: int) -> bytes:
        if start == 0:
            await_that(lambda: bool(slow))
            raise OSError("the connection broke")
        if start == 100:
            slow.append(threading.current_thread())
            assert is_over.wait(10)
        return DATA[start : start + length]

    with pytest.raises(OSError, match="broke"):
        fetch_in_parts(
            tmp_path / "f",
            size=1000,
            sha256=SHA256,
            what="it",
            read=one_breaks_another_hangs,
            part_bytes=100,
        )
    # The next files get the numbers of those that were closed.
    others = [tmp_path / f"other-{n}" for n in range(8)]
    files = [path.open("w+b") for path in others]
    is_over.set()
    slow[0].join(10)
    for file in files:
        file.close()
    assert [path.stat().st_size for path in others] == [0] * 8
    assert "100" not in (tmp_path / "f.part.done").read_text().splitlines()


def test_parts_of_another_file_are_not_mixed_in(tmp_path: Path) -> None:
    other = os.urandom(1000)
    (tmp_path / "f.part").write_bytes(other)
    (tmp_path / "f.part.done").write_text(f"1000 {hashlib.sha256(other).hexdigest()} 100\n0\n")
    fetch(tmp_path / "f", [])
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_part_that_rotted_is_noticed_and_all_is_brought_again(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(bytes(1000))
    (tmp_path / "f.part.done").write_text(f"1000 {SHA256} 100\n0\n100\n")
    asked: list[int] = []
    fetch(tmp_path / "f", asked)
    assert (tmp_path / "f").read_bytes() == DATA
    assert 0 in asked


def test_bytes_that_are_wrong_twice_are_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="it: the bytes that arrive are not what was saved"):
        fetch(tmp_path / "f", [], data=bytes(1000))
    assert list(tmp_path.iterdir()) == []


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_saves_may_burst_then_are_spaced_then_wait_for_the_hour() -> None:
    clock = Clock()
    budget = CommitBudget(clock=clock)
    made = 0
    while budget.wait_seconds() == 0:
        budget.add()
        made += 1
    assert made == budget.burst == 30
    for _ in range(3600 * 4):
        if budget.wait_seconds() == 0:
            budget.add()
            made += 1
        assert len(budget.times) <= budget.ordinary == 100, "28 are left for handovers"
        clock.now += 1
    assert made > 250, "the budget is to be used"


def test_writers_learn_of_each_other_from_what_commits_carry() -> None:
    clock = Clock()
    mine, theirs = CommitBudget(clock=clock), CommitBudget(clock=clock)
    for _ in range(40):
        theirs.add()
    mine.read(theirs.noted())
    assert mine.wait_seconds() > 0
    mine.read(b"no JSON")
    mine.read(b'{"a": 1}')
    assert mine.wait_seconds() > 0
    clock.now += 3601
    assert mine.wait_seconds() == 0


def test_an_advertised_reset_is_kept_to() -> None:
    clock = Clock()
    budget = CommitBudget(clock=clock)
    budget.full_for(100)
    assert budget.wait_seconds() == 100
    clock.now += 100
    assert budget.wait_seconds() == 0


def test_a_budget_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HUB_COMMITS_PER_HOUR", "many")
    with pytest.raises(ConfigError, match="BATON_HUB_COMMITS_PER_HOUR=many"):
        CommitBudget.from_environment()


@pytest.mark.parametrize(
    ("retention", "dropped"),
    [
        (Retention(keep_last=2), [10, 20, 30]),
        (Retention(keep_last=2, best=20), [10, 30]),
        (Retention(keep_last=2, keep_every_steps=20), [10, 30]),
        (Retention(keep_last=2, keep_every_steps=20, best=10), [30]),
        (Retention(keep_last=9), []),
        (Retention(keep_last=0), [10, 20, 30, 40]),
    ],
)
def test_retention_goes_by_step_and_keeps_the_newest(
    retention: Retention, dropped: list[int]
) -> None:
    assert retention.dropped([40, 10, 50, 30, 20]) == dropped
    assert retention.dropped([]) == []
