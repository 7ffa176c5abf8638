"""The order of the data: each epoch a permutation, found from seed and step alone."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baton.train.cursor import Cursor, permute


def epoch_of(cursor: Cursor, epoch: int) -> np.ndarray:
    """All indices of an epoch, by asking for every step that touches it."""
    first, last = epoch * cursor.samples, (epoch + 1) * cursor.samples
    steps = range(first // cursor.batch, -(-last // cursor.batch))
    indices = np.concatenate([cursor.at(step) for step in steps])
    start = first - steps[0] * cursor.batch
    return indices[start : start + cursor.samples]


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
@example(1, 0, 0)
@example(2, 0, 0)
@example(1024, 7, 1)
@example(1025, 7, 1)
def test_an_epoch_is_a_permutation(size, seed, epoch):
    found = permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(size))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 3))
def test_batches_are_exact_and_run_on_over_the_end_of_an_epoch(samples, batch, epoch):
    cursor = Cursor(samples, batch, seed=3)
    assert sorted(epoch_of(cursor, epoch).tolist()) == list(range(samples))
    assert all(len(cursor.at(step)) == batch for step in range(20))


def test_another_epoch_and_another_seed_are_another_order():
    orders = {
        tuple(epoch_of(Cursor(500, 7, seed), epoch)) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25
    assert tuple(epoch_of(Cursor(500, 7, 0), 0)) in orders


def test_the_batch_size_does_not_change_the_order():
    one = epoch_of(Cursor(500, 1, 9), 1)
    assert all((epoch_of(Cursor(500, batch, 9), 1) == one).all() for batch in (3, 16, 500, 700))


def test_a_run_of_part_of_an_epoch_ends_with_a_smaller_batch():
    cursor = Cursor(10, 4, seed=0)
    assert cursor.total_steps(0.5) == 2
    assert [len(cursor.at(step, end=5)) for step in range(2)] == [4, 1]
    assert cursor.at(0, end=5).tolist() == cursor.at(0).tolist()


@given(st.integers(1, 10_000), st.integers(1, 100), st.floats(0.01, 20))
def test_the_steps_cover_the_epochs_and_no_more(samples, batch, epochs):
    steps = Cursor(samples, batch, 0).total_steps(epochs)
    wanted = round(epochs * samples)
    assert steps * batch >= wanted
    assert steps == max(1, math.ceil(wanted / batch))


def test_nothing_to_order_is_refused():
    with pytest.raises(ValueError) as caught:
        Cursor(0, 4, 0)
    assert str(caught.value) == "no samples to order: samples=0, batch=4"


def test_a_late_position_costs_what_an_early_one_costs():
    cursor = Cursor(10_000_000, 16, seed=1)
    cursor.at(0)

    def seconds(step):
        started = time.perf_counter()
        for _ in range(20):
            cursor.at(step)
        return (time.perf_counter() - started) / 20

    # Making or skipping through a permutation of ten millions takes most of a second.
    assert min(seconds(9_000_000 // 16) for _ in range(3)) < 0.02


def test_every_sample_is_as_likely_at_every_place():
    size, draws = 12, 1200
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), permute(np.arange(size), size=size, seed=seed, epoch=0)] += 1
    expected = draws / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # Doubly stochastic: (size - 1)^2 degrees of freedom; six standard deviations on each side.
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 6 * math.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(100_000), size=100_000, seed=5, epoch=0)
    # Of a random order each of the 99,999 steps is +1 with probability 1e-5.
    assert (np.diff(order) == 1).sum() < 10
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 120), st.integers(1, 30), st.integers(1, 4))
def test_each_epoch_takes_the_next_version_of_every_sample(samples, batch, versions):
    cursor = Cursor(samples, batch, seed=3, versions=versions)
    plain = Cursor(samples, batch, seed=3)
    for epoch in range(2 * versions):
        found = epoch_of(cursor, epoch)
        assert set(found // samples) == {epoch % versions}
        assert (found % samples).tolist() == epoch_of(plain, epoch).tolist()
