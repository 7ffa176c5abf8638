"""What a field may hold beyond its Python type: a number within bounds, a count such as `20k`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Bound:
    """Bounds of a number, as in `Annotated[int, at_least(1)]`; `text` completes "must be …".

    null and text pass, so that `Annotated[int | None, at_least(1)]` works. Only decoding checks.
    """

    text: str
    low: float = -math.inf
    high: float = math.inf
    low_excluded: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_excluded else value >= self.low
        return above and value <= self.high


def above(low: float) -> Bound:
    return Bound(f"above {low}", low=low, low_excluded=True)


def at_least(low: float) -> Bound:
    return Bound(f"at least {low}", low=low)


def at_most(high: float) -> Bound:
    return Bound(f"at most {high}", high=high)


def between(low: float, high: float) -> Bound:
    """Both ends are allowed."""
    return Bound(f"between {low} and {high}", low=low, high=high)


Positive = above(0)
NonNegative = at_least(0)
Fraction = between(0, 1)


@dataclass(frozen=True)
class CountText:
    """Marks an int that may also be written as text: `20k`, `1.5M`, `50_000`."""


Count = Annotated[int, CountText()]

_COUNT = re.compile(r"([0-9]+(?:_[0-9]+)*)(?:\.([0-9]+))?([kmbt]?)", re.IGNORECASE)
_ZEROS = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}


def parse_count(text: str) -> int | None:
    """Number that a count such as `1.5M` stands for; None if it is no whole number."""
    match = _COUNT.fullmatch(text)
    if match is None:
        return None
    whole, decimals, suffix = match[1], match[2] or "", match[3].lower()
    # In integers, because 1.1 * 1_000_000 is not 1_100_000 in floats.
    count, rest = divmod(int(whole + decimals) * 10 ** _ZEROS[suffix], 10 ** len(decimals))
    return None if rest else count
