"""Micro-batches made ahead of time come in order, and their errors where they are taken."""

from __future__ import annotations

import threading

import pytest

from baton.train.ahead import Ahead


def numbered(step, budget):
    for number in range(step % 3):
        yield (step, budget, number)


def test_steps_come_in_turn_with_what_making_them_directly_gives():
    ahead = Ahead(numbered)
    for step in range(5, 25):
        assert list(ahead.take(step, 7)) == list(numbered(step, 7))
    ahead.close()


def test_another_budget_or_step_drops_what_was_made():
    ahead = Ahead(numbered)
    assert list(ahead.take(2, 8)) == [(2, 8, 0), (2, 8, 1)]
    assert list(ahead.take(2, 4)) == [(2, 4, 0), (2, 4, 1)]
    # Half of a step, then the same again with less, as after running out of memory.
    assert next(iter(ahead.take(5, 4))) == (5, 4, 0)
    assert list(ahead.take(5, 2)) == [(5, 2, 0), (5, 2, 1)]
    ahead.close()


def test_an_error_is_raised_where_the_micro_batch_is_taken():
    def make(step, budget):
        yield step
        raise OSError("the file is gone")

    ahead = Ahead(make)
    taken = ahead.take(0, 1)
    assert next(taken) == 0
    with pytest.raises(OSError, match="the file is gone"):
        next(taken)
    ahead.close()


def test_no_more_than_a_few_wait_and_closing_ends_the_thread():
    made = []

    def make(step, budget):
        made.append(step)
        yield step

    before = threading.active_count()
    ahead = Ahead(make)
    list(ahead.take(0, 1))
    ahead.close()
    assert threading.active_count() == before
    assert len(made) < 10
