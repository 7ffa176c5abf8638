"""Which rows train, which choose the best checkpoint (dev), which are scored (test).

One seeded shuffle of all kept rows; test is its head, dev comes next, and every training subset
is a prefix of the rest. So 20k ⊂ 50k ⊂ 100k, none of them touches dev or test, and dev and test
are the same rows whatever the subset.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from baton.errors import DataError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Indices of kept rows, from 0, in the order of the shuffle; the three never overlap."""

    train: Indices
    dev: Indices
    test: Indices


def split(
    n_rows: int,
    *,
    seed: int,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    train_rows: int | None = None,
    n_read: int | None = None,
) -> Split:
    """Split `n_rows` kept rows into train, dev and test (`shares`, in this order).

    `train_rows=None` takes all that dev and test leave. `n_read`, the rows read before cleaning,
    only makes the message better. Raises DataError if there are too few rows for the subset, or
    none for dev or test; ValueError for shares that are no shares.
    """
    if min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
        raise ValueError(f"shares must be positive and add up to 1, got {shares}")
    if train_rows is not None and train_rows < 1:
        raise ValueError(f"train_rows must be at least 1, got {train_rows}")
    dev, test = _held_out(n_rows, shares)
    left = n_rows - dev - test
    read = "" if n_read is None else f" of {n_read:,} read"
    if not (dev and test and left):
        raise DataError(
            f"{n_rows:,} usable rows{read} split into {left:,} train, {dev:,} dev and {test:,} "
            f"test; none may be empty: bring at least {_needed(1, shares):,} usable rows"
        )
    if train_rows is not None and train_rows > left:
        raise DataError(
            f"the training subset asks for {train_rows:,} rows, but there are {left:,}: "
            f"{n_rows:,} usable rows{read}, less {dev:,} for dev and {test:,} for test; "
            f"ask for at most {left:,}, or bring at least "
            f"{_needed(train_rows, shares):,} usable rows"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n_rows)
    stop = n_rows if train_rows is None else dev + test + train_rows
    return Split(train=order[dev + test : stop], dev=order[test : test + dev], test=order[:test])


def count_leaks(train: Iterable[str], held_out: Iterable[str]) -> int:
    """How many held-out rows have a question that training rows have too (but for whitespace).

    Exact duplicates are dropped before the split; the same question with another answer is not.
    Memory goes by the held-out side.
    """
    waiting = Counter(_digest(question) for question in held_out)
    leaked = 0
    for question in train:
        leaked += waiting.pop(_digest(question), 0)
    return leaked


def _held_out(n_rows: int, shares: tuple[float, float, float]) -> tuple[int, int]:
    return round(n_rows * shares[1]), round(n_rows * shares[2])


def _needed(train_rows: int, shares: tuple[float, float, float]) -> int:
    """The fewest rows that leave `train_rows` for training and at least one for dev and test."""
    n_rows = max(3, int(train_rows / shares[0]) - 3)
    while True:
        dev, test = _held_out(n_rows, shares)
        if dev and test and n_rows - dev - test >= train_rows:
            return n_rows
        n_rows += 1


def _digest(question: str) -> bytes:
    text = " ".join(question.split())
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
