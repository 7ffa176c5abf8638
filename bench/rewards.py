"""Rewards a second of one core against 1,000 known problems, beside scikit-learn's way, in one run.

    python bench/rewards.py [--rows FILE.jsonl --field problem] [--seconds 5]

Groups of 8 texts: difficulty, novelty, rigour and diversity, as one completion of GRPO is rewarded.
The other way fits `TfidfVectorizer` anew for every text, as the published code does; both give the
same numbers, which is checked. Without a file the texts are drawn from a made-up vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from baton.pipelines.questions_gen.rewards import (
    Reward,
    difficulty_reward,
    keyword_rewards,
    rigor_reward,
)
from baton.pipelines.questions_gen.tfidf import History

HISTORY, GROUP = 1000, 8


def made_up(count: int) -> list[str]:
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(6000)]
    weights = [1 / (i + 3) for i in range(6000)]  # as words of a language are spread
    return [" ".join(rng.choices(vocabulary, weights, k=rng.randint(20, 80))) for _ in range(count)]


def published(group: Sequence[str], history: Sequence[str]) -> list[Reward]:
    """Every vectoriser fitted anew."""
    rewards = []
    for text in group:
        rows = TfidfVectorizer(max_features=100).fit_transform([*history, text])
        novelty = float(1 - cosine_similarity(rows[-1], rows[:-1]).max())
        rows = TfidfVectorizer(max_features=50).fit_transform([*group, text])
        cosines = cosine_similarity(rows)
        count = len(cosines)
        diversity = float(1 - (cosines.sum() - np.trace(cosines)) / (count * (count - 1)))
        rewards.append(Reward(difficulty_reward(text), novelty, rigor_reward(text), diversity))
    return rewards


def rate(
    score: Callable[[Sequence[str]], list[Reward]], groups: list[list[str]], seconds: float
) -> float:
    started = time.process_time()
    count = 0
    while time.process_time() - started < seconds:
        count += len(score(groups[count // GROUP % len(groups)]))
    return count / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--field", default="problem")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    if args.rows is None:
        texts = made_up(3000)
    else:
        lines = args.rows.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)[args.field] for line in lines]
    known, rest = texts[:HISTORY], texts[HISTORY:]
    groups = [rest[i : i + GROUP] for i in range(0, len(rest) - GROUP + 1, GROUP)]
    history = History(HISTORY)
    for text in known:
        history.add(text)
    for mine, theirs in zip(
        keyword_rewards(groups[0], history), published(groups[0], known), strict=True
    ):
        assert abs(mine.total - theirs.total) < 1e-9, (mine, theirs)
    ours = rate(lambda group: keyword_rewards(group, history), groups, args.seconds)
    other = rate(lambda group: published(group, known), groups, args.seconds)
    print(f"{len(known):,} texts known, {len({w for t in known for w in t.split()}):,} words")
    print(f"baton: {ours:,.0f} rewards/s; fitted anew: {other:,.1f} rewards/s; {ours / other:.0f}x")


if __name__ == "__main__":
    main()
