"""Which samples a step trains on: a pure function of seed and step, so resuming is seeking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ROUNDS = 6


@dataclass(frozen=True)
class Cursor:
    """The order of `samples` samples over epochs, in batches of exactly `batch`.

    Each epoch is a permutation of all samples of its own. Batches run across epoch ends, so
    every step has the same number of samples and the last one of a run may have fewer. The
    permutation is computed, not stored: position 9,000,000 costs what position 0 costs, and
    50 million samples take no memory.

    With several `versions` of the samples (the same ones written otherwise), version v of
    sample i has the index `v * samples + i`; each epoch takes the next version, then the first
    again.
    """

    samples: int
    batch: int
    seed: int
    versions: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1:
            raise ValueError(f"no samples to order: samples={self.samples}, batch={self.batch}")

    def total_steps(self, epochs: float) -> int:
        """Steps that cover `epochs` passes, the last one perhaps in part."""
        return max(1, -(-round(epochs * self.samples) // self.batch))

    def at(self, step: int, *, end: int | None = None) -> Indices:
        """Sample indices of `step` (0-based), at most up to sample position `end`. int64."""
        first = step * self.batch
        last = first + self.batch if end is None else min(first + self.batch, end)
        positions = np.arange(first, last, dtype=np.int64)
        epochs = positions // self.samples
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            within = positions[mask] % self.samples
            chosen = permute(within, size=self.samples, seed=self.seed, epoch=int(epoch))
            out[mask] = chosen + int(epoch) % self.versions * self.samples
        return out


def permute(positions: Indices, *, size: int, seed: int, epoch: int) -> Indices:
    """Map positions of an epoch to sample indices, one to one on `range(size)`.

    A Feistel network over the smallest even number of bits that holds `size`, walked along
    its cycle until the value is in range (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002): each value needs fewer than four walks on average.
    """
    half = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = np.random.Generator(np.random.PCG64([seed & 0xFFFFFFFF, epoch])).integers(
        0, 2**63, size=_ROUNDS, dtype=np.uint64
    )
    values = positions.astype(np.uint64)
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> shift, values[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        values[todo] = (left << shift) | right
        todo = todo[values[todo] >= np.uint64(size)]
    return values.astype(np.int64)


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), keyed."""
    with np.errstate(over="ignore"):
        z = values + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
