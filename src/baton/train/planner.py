"""How large a micro-batch is, and how many layers recompute: measured, then chosen by speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Larger micro-batches are not faster, whatever the memory.
_MOST_TOKENS = 32_768
_ROUND_TO = 256
# What a pass costs besides its tokens, and what recomputing all layers adds, as a share of a
# pass: a first guess, after which the most promising settings are timed.
_TOKENS_OF_A_PASS = 600
_COST_OF_RECOMPUTING = 0.4
_TIMED = 3


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Tokens a micro-batch, and of how many layers the activations are made anew."""

    tokens: int
    recompute_layers: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One micro-batch forward and backward: its tokens, the peak of bytes, the seconds."""

    tokens: int
    peak: int
    seconds: float


# Tries a micro-batch of at most so many tokens; None if memory ran out.
Measure = Callable[[MemoryPlan], Trial | None]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Chooses the fastest setting that fits.

    Attributes:
        layers: how many there are.
        limit: bytes that may be in use, with what is kept free of them taken off.
        later: bytes that training will need besides what a trial does (the optimizer's state).
        step_tokens: of the largest optimizer step on one device.
        longest: tokens of the longest sample, which is never cut.
        tokens, recompute_layers: given by the configuration; None to choose.
        timed: time the best few rather than trust a formula; two runs may then choose
            differently.
    """

    measure: Measure
    layers: int
    limit: int
    later: int
    step_tokens: int
    longest: int
    tokens: int | None = None
    recompute_layers: int | None = None
    timed: bool = True

    def choose(self) -> MemoryPlan:
        """The plan; where nothing seems to fit, the smallest there is."""
        smallest = MemoryPlan(
            tokens=self.tokens or _rounded(self.longest),
            recompute_layers=self._or(self.layers),
        )
        if self.tokens is not None:
            return smallest if self.recompute_layers is not None else self._given(self.tokens)
        bytes_of = self._fitted()
        if bytes_of is None:
            return smallest
        plans = []
        for tokens in self._sizes():
            fitting = (
                plan
                for plan in self._plans(tokens)
                if bytes_of(max(tokens, self.longest), plan.recompute_layers) <= self.limit
            )
            plans.extend([next(fitting, None)])
        candidates = sorted((p for p in plans if p is not None), key=self._guessed)
        if not candidates:
            return smallest
        if not self.timed:
            return candidates[0]
        # The fewest passes as well, in case they cost more than the formula believes.
        largest = max(candidates, key=lambda plan: plan.tokens)
        return self._fastest(list(dict.fromkeys([*candidates[:_TIMED], largest])))

    def _given(self, tokens: int) -> MemoryPlan:
        """The fewest recomputing layers, in quarters of all, with which a given size fits.

        That size is tried itself: where micro-batches are cut by samples, what they take does not
        follow from what smaller ones took.
        """
        for quarter in range(4):
            plan = MemoryPlan(tokens=tokens, recompute_layers=quarter * self.layers // 4)
            trial = self._tried(plan)
            if trial is not None and trial.peak + self.later <= self.limit:
                return plan
        return MemoryPlan(tokens=tokens, recompute_layers=self.layers)

    def _fastest(self, candidates: list[MemoryPlan]) -> MemoryPlan:
        trials = [(self._tried(plan), plan) for plan in candidates]
        fitting = [
            (trial.seconds / trial.tokens, number, plan)
            for number, (trial, plan) in enumerate(trials)
            if trial is not None and trial.peak + self.later <= self.limit
        ]
        return min(fitting)[2] if fitting else candidates[-1]

    def _tried(self, plan: MemoryPlan) -> Trial | None:
        # The first of a size may compile, and asks the driver for memory.
        return None if self.measure(plan) is None else self.measure(plan)

    def _fitted(self) -> Callable[[int, int], float] | None:
        """Bytes by tokens and recomputing layers: linear in either, from small trials."""
        small = max(_ROUND_TO, min(_rounded(self.longest), self.step_tokens))
        lines, short = {}, {}
        for count in {self._or(0), self._or(self.layers)}:
            one, two = (
                self._tried(MemoryPlan(tokens=tokens, recompute_layers=count))
                for tokens in (small, 2 * small)
            )
            if one is not None and two is not None and two.tokens > one.tokens:
                slope = max(0.0, (two.peak - one.peak) / (two.tokens - one.tokens))
                lines[count] = (one.peak - slope * one.tokens, slope)
            elif one is not None:
                short[count] = one
        # What no tokens take, weights above all, is the same however many layers recompute.
        base = min((base for base, _ in lines.values()), default=0.0)
        for count, one in short.items():
            lines[count] = (base, (one.peak - base) / one.tokens)
        if not lines:
            return None
        few, many = min(lines), max(lines)

        def bytes_of(tokens: int, count: int) -> float:
            if count < few:
                return math.inf
            at = [base + slope * tokens for base, slope in (lines[few], lines[many])]
            share = 0.0 if many == few else (count - few) / (many - few)
            return self.later + at[0] + (at[1] - at[0]) * share

        return bytes_of

    def _sizes(self) -> list[int]:
        """Sizes that cut the step into 1, 2, 3, … even parts, the largest first."""
        sizes = {
            _rounded(self.step_tokens / parts)
            for parts in (*range(1, 9), 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
        }
        least = _rounded(self.longest)
        # Small samples leave small steps: one part is then the most there is.
        return sorted({min(max(size, least), max(_MOST_TOKENS, least)) for size in sizes})[::-1]

    def _plans(self, tokens: int) -> Iterable[MemoryPlan]:
        counts = [self._or(0)] if self.recompute_layers is not None else range(self.layers + 1)
        return (MemoryPlan(tokens=tokens, recompute_layers=count) for count in counts)

    def _guessed(self, plan: MemoryPlan) -> float:
        """Relative time of a token."""
        share = plan.recompute_layers / max(1, self.layers)
        return (1 + _COST_OF_RECOMPUTING * share) * (1 + _TOKENS_OF_A_PASS / plan.tokens)

    def _or(self, count: int) -> int:
        return count if self.recompute_layers is None else self.recompute_layers


def _rounded(tokens: float) -> int:
    return max(1, math.ceil(tokens / _ROUND_TO)) * _ROUND_TO
