"""How long a busy store is waited for, and what ends the wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from baton.errors import NameMissing, StoreBusy, StoreRefused
from baton.store.patience import IMPATIENT, Patience


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def busy_until(clock: Clock, moment: float, asked: list[float]) -> Callable[[], str]:
    def request() -> str:
        asked.append(clock.now)
        if clock.now < moment:
            raise StoreBusy("SlowDown")
        return "answer"

    return request


def patient(clock: Clock, **options: object) -> Patience:
    return Patience(seconds=300, clock=clock, sleep=clock.sleep, **options)  # type: ignore[arg-type]


def test_a_store_that_is_busy_for_two_minutes_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, asked = Clock(), list[float]()
    assert patient(clock).insist(busy_until(clock, 120, asked)) == "answer"
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert waits[:4] == pytest.approx([1, 2, 4, 8], abs=0.2)
    assert max(waits) < 10.2
    assert "SlowDown; waiting for the store, for 300 s at most" in caplog.text


def test_a_store_that_stays_busy_is_given_up() -> None:
    clock, asked = Clock(), list[float]()
    with pytest.raises(StoreBusy, match="SlowDown"):
        patient(clock).insist(busy_until(clock, 1e9, asked))
    assert 299 < asked[-1] < 311


def test_whoever_is_asked_to_stop_does_not_wait() -> None:
    clock, asked = Clock(), list[float]()
    with pytest.raises(StoreBusy):
        patient(clock, should_stop=lambda: clock.now > 5).insist(busy_until(clock, 1e9, asked))
    assert clock.now < 6


def test_people_are_told_at_once() -> None:
    clock, asked = Clock(), list[float]()
    with pytest.raises(StoreBusy):
        IMPATIENT.insist(busy_until(clock, 1e9, asked))
    assert len(asked) == 1


@pytest.mark.parametrize("error", [StoreRefused, NameMissing])
def test_what_waiting_does_not_mend_is_not_repeated(error: type[Exception]) -> None:
    asked = []

    def request() -> None:
        asked.append(1)
        raise error("no")

    with pytest.raises(error):
        patient(Clock()).insist(request)
    assert asked == [1]
