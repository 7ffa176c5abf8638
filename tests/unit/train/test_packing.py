"""How a step's samples are shared over ranks and cut into micro-batches."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from baton.train.packing import pack

lengths = st.lists(st.integers(1, 600), max_size=60)
ranks = st.integers(1, 9)
budgets = st.integers(1, 1000)


@given(lengths, ranks, budgets)
@example([], 3, 10)
@example([5], 3, 1)
def test_every_sample_is_in_exactly_one_micro_batch(sizes, count, budget):
    shares = pack(sizes, ranks=count, budget=budget)
    assert len(shares) == count
    assert sorted(i for share in shares for bin_ in share for i in bin_) == list(range(len(sizes)))
    assert all(bin_ for share in shares for bin_ in share)


@given(lengths, ranks, budgets)
def test_only_a_single_long_sample_exceeds_the_budget(sizes, count, budget):
    for share in pack(sizes, ranks=count, budget=budget):
        for bin_ in share:
            assert len(bin_) == 1 or sum(sizes[i] for i in bin_) <= budget


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), ranks, budgets)
def test_ranks_differ_by_no_more_than_the_longest_sample(sizes, count, budget):
    shares = pack(sizes, ranks=count, budget=budget)
    loads = [sum(sizes[i] for bin_ in share for i in bin_) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


@given(lengths, ranks, budgets, budgets)
def test_the_share_of_a_rank_does_not_depend_on_the_budget(sizes, count, one, other):
    # After running out of memory only the cut may change, or gradients would move between ranks.
    def members(budget):
        shares = pack(sizes, ranks=count, budget=budget)
        return [sorted(i for bin_ in share for i in bin_) for share in shares]

    assert members(one) == members(other)


@given(lengths, ranks, budgets)
def test_equal_arguments_give_equal_shares(sizes, count, budget):
    first = pack(sizes, ranks=count, budget=budget)
    assert first == pack(tuple(sizes), ranks=count, budget=budget)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 500))
def test_bins_are_no_more_than_twice_the_least_possible(sizes, budget):
    # First fit leaves at most one bin of a rank half empty.
    (share,) = pack(sizes, ranks=1, budget=budget)
    assert len(share) <= 2 * -(-sum(sizes) // budget)
