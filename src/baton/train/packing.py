"""How the samples of one optimizer step are cut into micro-batches, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], *, ranks: int, budget: int) -> list[list[list[int]]]:
    """Share out samples over ranks and bins of at most `budget` tokens.

    A pure function of its arguments, so that every rank computes all shares without asking
    the others. Samples go longest first to the rank with the fewest tokens (LPT); each rank
    fills as few bins as it can, and evenly: two half-full bins, not a full and an almost empty
    one. A sample longer than the budget gets a bin of its own.

    Args:
        lengths: tokens of each sample of the step.
        ranks: number of processes.
        budget: tokens per micro-batch.

    Returns:
        For each rank its micro-batches, each a list of positions in `lengths`. Every position
        occurs exactly once; a rank may have none when there are fewer samples than ranks.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares = _spread(longest_first, lengths, ranks)
    return [_bins(share, lengths, budget) for share in shares]


def _bins(share: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The fewest even bins within `budget`; `share` is longest first."""
    large = [[i] for i in share if lengths[i] > budget]
    rest = share[len(large) :]
    count = max(1, -(-sum(lengths[i] for i in rest) // budget))
    while True:
        bins = _spread(rest, lengths, count)
        if all(sum(lengths[i] for i in bin) <= budget for bin in bins):
            return large + [bin for bin in bins if bin]
        count += 1


def _spread(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Give each sample to the one of `count` lists that has the fewest tokens."""
    lists: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for i in longest_first:
        load, number = heapq.heappop(loads)
        lists[number].append(i)
        heapq.heappush(loads, (load + lengths[i], number))
    return lists
