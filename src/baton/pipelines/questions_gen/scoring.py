"""What a batch of completions is worth: keyword rewards, the independent score, their sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baton.pipelines.questions_gen.config import RewardConfig
from baton.pipelines.questions_gen.independent import Independent, Judge
from baton.pipelines.questions_gen.problem import read_problem
from baton.pipelines.questions_gen.rewards import Reward, RewardScale, keyword_rewards
from baton.pipelines.questions_gen.tfidf import History


@dataclass(frozen=True, slots=True)
class Scored:
    """One completion; `reward` is what is trained on, before and after normalising."""

    keyword: Reward
    independent: Independent
    reward: float
    normalised: float

    def to_json(self) -> dict[str, Any]:
        judged = self.independent
        return {
            "reward": self.reward,
            "normalised": self.normalised,
            "keyword": self.keyword.total,
            "independent": judged.total,
            "parts": asdict(self.keyword),
            "judged": {**asdict(judged), "verdict": judged.verdict.value},
        }


class Scorer:
    """Scores group after group; looks back on the last questions and rewards."""

    def __init__(self, config: RewardConfig, judge: Judge) -> None:
        self._config = config
        self._judge = judge
        self._questions = History(config.history)
        self._scale = RewardScale(config.history, floor=config.std_floor)

    def score(self, groups: Iterable[Sequence[str]]) -> list[Scored]:
        """Score the completions of several prompts against what was there before them all."""
        scored: list[Scored] = []
        for group in groups:
            rewards = keyword_rewards([question(text) for text in group], self._questions)
            for text, keyword in zip(group, rewards, strict=True):
                judged = self._judge.score(text)
                reward = self._sum(keyword, judged)
                shown = self._scale.normalised(reward) if self._config.normalise else reward
                scored.append(Scored(keyword, judged, reward, shown))
        return scored

    def remember(self, texts: Sequence[str], rewards: Sequence[float]) -> None:
        """Add a batch to what later ones are compared with."""
        for text, reward in zip(texts, rewards, strict=True):
            self._questions.add(question(text))
            self._scale.add(reward)

    def _sum(self, keyword: Reward, judged: Independent) -> float:
        config = self._config
        return (
            config.keyword * keyword.total
            + config.independent * judged.total
            + config.checked * judged.is_right
            - config.repetition * judged.repetition
        )


def question(text: str) -> str:
    """The problem of a completion, or all of it where none can be read."""
    problem = read_problem(text)
    return text if problem is None else problem.problem
