"""Splits: seeded, nested, disjoint, and never smaller than asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.data.split import count_leaks, split
from baton.errors import DataError


def test_the_split_of_a_seed_is_the_same_for_ever() -> None:
    # If numpy ever changes permutation(), published results stop being reproducible: keep these.
    found = split(20, seed=42)
    assert found.test.tolist() == [15, 9]
    assert found.dev.tolist() == [14, 7]
    assert found.train.tolist() == [12, 10, 6, 19, 3, 0, 16, 5, 11, 18, 2, 4, 17, 1, 13, 8]
    large = split(125_000, seed=2024, train_rows=100_000)
    assert large.test[:4].tolist() == [95938, 98799, 93493, 33147]
    assert large.dev[:4].tolist() == [9759, 104847, 2881, 46505]
    assert large.train[-4:].tolist() == [123556, 119001, 84054, 51944]


def test_subsets_are_nested_and_dev_and_test_stay_the_same() -> None:
    small, medium, large = (
        split(125_000, seed=7, train_rows=rows) for rows in (20_000, 50_000, 100_000)
    )
    assert (len(small.train), len(medium.train), len(large.train)) == (20_000, 50_000, 100_000)
    assert np.array_equal(small.train, large.train[:20_000])
    assert np.array_equal(medium.train, large.train[:50_000])
    for one in (medium, large):
        assert np.array_equal(small.dev, one.dev)
        assert np.array_equal(small.test, one.test)


@given(st.integers(10, 3000), st.integers(0, 2**63), st.data())
def test_no_row_is_on_two_sides_and_without_a_subset_every_row_is_used(
    n_rows: int, seed: int, data: st.DataObject
) -> None:
    whole = split(n_rows, seed=seed)
    sides = np.concatenate([whole.train, whole.dev, whole.test])
    assert np.array_equal(np.sort(sides), np.arange(n_rows))
    assert len(whole.dev) == len(whole.test) == round(n_rows * 0.1)
    train_rows = data.draw(st.integers(1, len(whole.train)))
    part = split(n_rows, seed=seed, train_rows=train_rows)
    assert np.array_equal(part.train, whole.train[:train_rows])


def test_another_seed_is_another_split() -> None:
    assert not np.array_equal(split(1000, seed=1).test, split(1000, seed=2).test)


def test_other_shares_are_kept_to() -> None:
    found = split(1000, seed=0, shares=(0.9, 0.06, 0.04))
    assert (len(found.train), len(found.dev), len(found.test)) == (900, 60, 40)


def test_too_few_rows_for_a_subset_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(DataError) as caught:
        split(5704, seed=0, train_rows=100_000, n_read=6000)
    assert str(caught.value) == (
        "the training subset asks for 100,000 rows, but there are 4,564: 5,704 usable rows of "
        "6,000 read, less 570 for dev and 570 for test; ask for at most 4,564, or bring "
        "at least 125,000 usable rows"
    )
    with pytest.raises(DataError) as caught:
        split(1000, seed=0, train_rows=801)
    assert str(caught.value) == (
        "the training subset asks for 801 rows, but there are 800: 1,000 usable rows, less 100 "
        "for dev and 100 for test; ask for at most 800, or bring at least 1,001 usable "
        "rows"
    )


@given(st.integers(1, 5000))
def test_the_number_of_rows_asked_for_is_enough_and_not_one_too_many(train_rows: int) -> None:
    with pytest.raises(DataError) as caught:
        split(10, seed=0, train_rows=train_rows + 8)
    needed = int(str(caught.value).rsplit("at least ", 1)[1].split()[0].replace(",", ""))
    assert len(split(needed, seed=0, train_rows=train_rows + 8).train) == train_rows + 8
    with pytest.raises(DataError):
        split(needed - 1, seed=0, train_rows=train_rows + 8)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 5])
def test_an_empty_side_is_an_error(n_rows: int) -> None:
    with pytest.raises(DataError) as caught:
        split(n_rows, seed=0, n_read=7)
    assert str(caught.value) == (
        f"{n_rows} usable rows of 7 read split into {n_rows} train, 0 dev and 0 test; "
        "none may be empty: bring at least 6 usable rows"
    )


def test_shares_that_are_none_are_refused() -> None:
    for shares in ((0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)):
        with pytest.raises(ValueError) as caught:
            split(100, seed=0, shares=shares)
        assert str(caught.value) == f"shares must be positive and add up to 1, got {shares}"
    with pytest.raises(ValueError) as caught:
        split(100, seed=0, train_rows=0)
    assert str(caught.value) == "train_rows must be at least 1, got 0"


def test_held_out_questions_that_training_knows_are_counted() -> None:
    held_out = ["头疼 怎么办", "头疼\n怎么办 ", "牙疼", "耳鸣", "\ud83d"]
    assert count_leaks(["失眠"], held_out) == 0
    assert count_leaks(["头疼 怎么办", "头疼  怎么办", "耳鸣", "失眠"], held_out) == 3
    assert count_leaks(iter([]), held_out) == 0
    assert count_leaks(["牙疼"], iter([])) == 0
