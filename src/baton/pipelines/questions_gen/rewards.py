"""The keyword reward R = 0.4 D + 0.3 N + 0.2 G + 0.1 V, and rewards against recent ones.

All of it can be won by the right words ("olympiad prove therefore"): see `independent` for the
scores that cannot.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton.pipelines.questions_gen.tfidf import History, diversity

_LEVELS = {
    1: ("basic", "simple", "elementary"),
    2: ("intermediate", "moderate"),
    3: ("advanced", "complex"),
    4: ("challenging", "difficult"),
    5: ("expert", "olympiad", "extremely"),
}
_SYMBOLS = re.compile(r"[∑∏∫∂∇≤≥≠±∞]")
RIGOR = (
    "theorem",
    "lemma",
    "proof",
    "corollary",
    "proposition",
    "axiom",
    "definition",
    "hypothesis",
    "conclusion",
)
_TASKS = re.compile(r"prove|show|demonstrate|verify")
_LINKS = re.compile(r"therefore|thus|hence|because|since")

# Fewer rewards than this say nothing about how they spread.
LEAST_KNOWN = 8


def difficulty_reward(text: str) -> float:
    """D: the highest level that a keyword names, length, and mathematical symbols."""
    lowered = text.lower()
    level = max((n for n, names in _LEVELS.items() if any(w in lowered for w in names)), default=0)
    symbols = len(_SYMBOLS.findall(text))
    return min((level / 5 + min(len(text) / 500, 1) + symbols / 10) / 3, 1.0)


def rigor_reward(text: str) -> float:
    """G: words of rigour, each once; what is to be done, and links, each time."""
    lowered = text.lower()
    named = sum(word in lowered for word in RIGOR)
    return min((named + len(_TASKS.findall(lowered)) + len(_LINKS.findall(lowered))) / 10, 1.0)


@dataclass(frozen=True, slots=True)
class Reward:
    """The four parts, each 0 to 1."""

    difficulty: float
    novelty: float
    rigor: float
    diversity: float

    @property
    def total(self) -> float:
        """R."""
        return 0.4 * self.difficulty + 0.3 * self.novelty + 0.2 * self.rigor + 0.1 * self.diversity


def keyword_rewards(group: Sequence[str], history: History) -> list[Reward]:
    """The rewards of a group of completions of one prompt, against what was there before it."""
    return [
        Reward(difficulty_reward(text), history.novelty(text), rigor_reward(text), varied)
        for text, varied in zip(group, diversity(group), strict=True)
    ]


class RewardScale:
    """Rewards in standard deviations from the mean of the last ones.

    Divided by at least `floor`: the published version divides the second reward it sees by 1e-8
    and makes two millions of it. Raw while fewer than eight are known.
    """

    def __init__(self, capacity: int = 1000, *, floor: float = 0.05) -> None:
        self._floor = floor
        self._known: deque[float] = deque(maxlen=capacity)

    def add(self, reward: float) -> None:
        self._known.append(reward)

    def normalised(self, reward: float) -> float:
        """`(reward - mean) / max(std, floor)` over the known ones, to which it is not added."""
        if len(self._known) < LEAST_KNOWN:
            return reward
        known = np.array(self._known)
        return float((reward - known.mean()) / max(float(known.std()), self._floor))
