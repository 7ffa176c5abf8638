"""Bootstrap intervals: known distributions, edges, determinism, memory."""

import tracemalloc

import numpy as np
import pytest

from baton.errors import DataError
from baton.eval.bootstrap import Interval, bootstrap_mean, paired_difference, resampled_sums


def test_the_interval_of_two_values_is_their_range():
    # A draw of two gives 0, 1/2 or 1 with odds 1:2:1, so each end is well inside the outer 25 %.
    assert bootstrap_mean([0.0, 1.0], seed=0) == Interval(mean=0.5, low=0.0, high=1.0)


def test_ninety_five_of_a_hundred_intervals_hold_the_true_mean():
    rng = np.random.default_rng(11)
    held = 0
    for experiment in range(400):
        interval = bootstrap_mean(rng.normal(3.0, 2.0, size=60), seed=experiment, resamples=300)
        held += interval.low <= 3.0 <= interval.high
    # Percentile intervals are a little short on 60 rows; 0.95 +- 3 standard errors is 0.03.
    assert 0.91 <= held / 400 <= 0.98


def test_the_width_is_that_of_the_normal_approximation_on_many_rows():
    values = np.random.default_rng(0).normal(size=4000)
    interval = bootstrap_mean(values, seed=1)
    expected = 2 * 1.96 * values.std() / len(values) ** 0.5
    assert interval.high - interval.low == pytest.approx(expected, rel=0.08)
    assert interval.mean == values.mean()


def test_a_higher_level_gives_a_wider_interval():
    values = np.random.default_rng(0).normal(size=200)
    narrow, wide = (bootstrap_mean(values, seed=1, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).random(100)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(list(values), seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_one_value_is_its_own_interval():
    assert bootstrap_mean([0.3], seed=0) == Interval(mean=0.3, low=0.3, high=0.3)


def test_equal_values_have_an_interval_without_width():
    assert bootstrap_mean([1.0] * 7, seed=0) == Interval(mean=1.0, low=1.0, high=1.0)


def test_no_values_are_a_data_error_that_says_so():
    with pytest.raises(DataError, match="no scored samples"):
        bootstrap_mean([], seed=0)


def test_a_value_that_is_not_finite_is_a_data_error_that_says_which():
    with pytest.raises(DataError, match="sample 1 has the value nan"):
        bootstrap_mean([0.5, float("nan")], seed=0)


@pytest.mark.parametrize("wrong", [{"resamples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        bootstrap_mean([0.1, 0.2], seed=0, **wrong)


def test_pairing_decides_a_small_difference_that_separate_intervals_do_not():
    rng = np.random.default_rng(2)
    questions = rng.random(300)
    lora = questions + 0.02 + rng.normal(0, 0.02, size=300)
    qlora = questions + rng.normal(0, 0.02, size=300)
    apart, together = (bootstrap_mean(values, seed=0) for values in (lora, qlora))
    assert apart.low < together.high

    difference = paired_difference(lora, qlora, seed=0)
    assert difference.mean == pytest.approx(lora.mean() - qlora.mean())
    assert difference.excludes_zero
    assert paired_difference(qlora, lora, seed=0).excludes_zero
    assert not paired_difference(lora, lora, seed=0).excludes_zero


def test_a_pair_of_different_lengths_is_a_data_error():
    with pytest.raises(DataError, match="2 and 1"):
        paired_difference([0.1, 0.2], [0.1], seed=0)
    with pytest.raises(DataError):
        paired_difference([], [], seed=0)


def test_the_draws_depend_on_the_seed_and_the_number_of_rows_but_not_on_the_columns():
    rows = np.arange(20.0).reshape(10, 2)
    both = resampled_sums(rows, seed=3, resamples=50)
    assert both.shape == (50, 2)
    assert (resampled_sums(rows[:, :1], seed=3, resamples=50)[:, 0] == both[:, 0]).all()
    # Each draw has ten rows: the second column is the first plus one, ten times.
    assert (both[:, 1] - both[:, 0] == 10).all()


def test_a_hundred_thousand_rows_need_no_more_than_a_few_copies_of_themselves():
    values = np.random.default_rng(0).random(100_000)
    tracemalloc.start()
    bootstrap_mean(values, seed=0, resamples=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All draws at once would be 50 x 800 kB = 40 MB.
    assert peak < 8_000_000
