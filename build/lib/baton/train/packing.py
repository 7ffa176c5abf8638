"""How the samples of one optimizer step are cut into micro-batches, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], *, ranks: int, budget: int) -> list[list[list[int]]]:
    """Share out samples over ranks and bins of at most `budget` tokens.

    A pure function of its arguments, so that every rank computes all shares without asking
    the others. Samples go longest first to the rank with the fewest tokens (LPT), then first
    fit into that rank's bins. A sample longer than the budget gets a bin of its own.

    Args:
        lengths: tokens of each sample of the step.
        ranks: number of processes.
        budget: tokens per micro-batch.

    Returns:
        For each rank its micro-batches, each a list of positions in `lengths`. Every position
        occurs exactly once; a rank may have none when there are fewer samples than ranks.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    load = [0] * ranks
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    room: list[list[int]] = [[] for _ in range(ranks)]
    for i in longest_first:
        rank = min(range(ranks), key=lambda r: (load[r], r))
        load[rank] += lengths[i]
        bins, free = shares[rank], room[rank]
        for b, left in enumerate(free):
            if lengths[i] <= left:
                bins[b].append(i)
                free[b] -= lengths[i]
                break
        else:
            bins.append([i])
            free.append(budget - lengths[i])
    return shares
