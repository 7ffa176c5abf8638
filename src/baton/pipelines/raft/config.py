"""One task of the matrix (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from baton.config.decode import Count, at_least, between
from baton.eval.config import EvalConfig, GenerateConfig
from baton.train.config import AdapterConfig, ModelConfig, TrainConfig, require_shardable

AbsentTarget = Literal["shown", "oracle"]


@dataclass(frozen=True, kw_only=True)
class RaftData:
    """Where rows come from, and what of them a student sees.

    Attributes:
        format: `medical`, `berkeley`, or the path of a format file of your own (`*.yaml`).
        p: share of rows that show their oracle.
        distractors: documents beside the oracle; a row without its oracle shows one more.
        absent_target: what a row without its oracle is to be answered with: `shown`, an answer
            from the documents that are shown (the row's `absent_answer`), or `oracle`, the answer
            from the oracle that nobody sees, as in the reference implementation.
        orders: a row's documents stand in another order in every epoch, up to so many orders.
    """

    path: str
    format: str = "medical"
    p: Annotated[float, between(0, 1)] = 0.8
    distractors: Annotated[int, at_least(0)] = 4
    absent_target: AbsentTarget = "shown"
    orders: Annotated[int, at_least(1)] = 8
    rows: Annotated[Count, at_least(1)] | None = None
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 42
    max_length: Annotated[int, at_least(8)] = 4096

    def __post_init__(self) -> None:
        if abs(sum(self.shares) - 1) > 1e-9 or min(self.shares) <= 0:
            raise ValueError(
                f"shares must be three positive parts of 1 (train, dev, test), got"
                f" {list(self.shares)}"
            )


@dataclass(frozen=True, kw_only=True)
class Raft:
    """Fine-tune a chat model on grounded answers and score what it does with documents."""

    model: ModelConfig
    data: RaftData
    adapter: AdapterConfig = field(
        default_factory=lambda: AdapterConfig(r=64, alpha=128, dropout=0.05, targets="all-linear")
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(
        default_factory=lambda: EvalConfig(generate=GenerateConfig(max_new_tokens=1024))
    )

    def __post_init__(self) -> None:
        require_shardable(self.train, self.adapter)
