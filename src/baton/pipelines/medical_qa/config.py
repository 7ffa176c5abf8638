"""One task of the matrix (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.data.config import DataConfig
from baton.eval.config import EvalConfig
from baton.train.config import AdapterConfig, ModelConfig, TrainConfig, require_shardable


@dataclass(frozen=True, kw_only=True)
class MedicalQA:
    """Fine-tune a chat model on question-answer rows and score its answers."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require_shardable(self.train, self.adapter)
