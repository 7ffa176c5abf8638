"""The model of a task: where its base lies, at which revision, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from baton.errors import DataError
from baton.eval.config import EvalConfig
from baton.train.config import AdapterConfig, ModelConfig, RandomModel, TrainConfig, pin_key

if TYPE_CHECKING:
    import torch

    from baton.stage import Leg
    from baton.train.learner import Learner
    from baton.train.ranks import Ranks

DATA = "data"
BASE = "base"


class Tuning(Protocol):
    """What the configuration of a pipeline that fine-tunes a chat model has."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def adapter(self) -> AdapterConfig: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def eval(self) -> EvalConfig: ...


class Model(Protocol):
    """The model of a task, of whatever kind."""

    def tokenizer(self) -> Any: ...

    def description(self) -> dict[str, str]:
        """The model as records name it."""
        ...

    def learner(self, device: torch.device, *, packed: bool) -> Learner:
        """The model with what learns of it: to train (`packed`), or to generate."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """The model of the task in `folder`; `pins` are the commits of its plan."""

    config: Tuning
    folder: Path
    pins: Mapping[str, str]

    @classmethod
    def of(cls, leg: Leg) -> TaskModel:
        return cls(config=leg.config, folder=leg.folder, pins=leg.plan.pins)

    @property
    def revision(self) -> str:
        """The commit that the plan pinned; empty where there is none."""
        return self.pins.get(pin_key(self.config.model), "")

    @property
    def base(self) -> Path:
        """Where a random model is built."""
        return self.folder / BASE

    def build_if_random(self, texts: Iterable[str]) -> None:
        """Build a model of random weights, its tokenizer trained on `texts`."""
        from baton.train.base import build_random

        if isinstance(self.config.model, RandomModel):
            build_random(self.config.model, texts, self.base)

    def tokenizer(self) -> Any:
        """The model's own tokenizer. Raises `ModelError`."""
        from baton.train.base import load_tokenizer

        return load_tokenizer(self.config.model, base_folder=self.base, revision=self.revision)

    def context(self) -> int | None:
        """The most tokens the model has positions for; None where it sets no limit."""
        from baton.train.base import context_length

        return context_length(self.config.model, base_folder=self.base, revision=self.revision)

    def require_context(self, max_length: int) -> None:
        """Raises `DataError` where samples may be longer than the model has positions for."""
        limit = self.context()
        if limit is not None and max_length > limit:
            raise DataError(
                f"data.max_length: {max_length} is more than the model's context of {limit} tokens"
            )

    def description(self) -> dict[str, str]:
        """The model as records name it."""
        from baton.train.base import describe

        return describe(self.config.model, self.revision)

    def learner(self, device: torch.device, *, packed: bool, over: Ranks | None = None) -> Learner:
        """The model with what learns of it: to train (`packed`), or to generate.

        It is sharded over the ranks `over`, if given.
        """
        from baton.train.layers import is_compiled
        from baton.train.learner import build_learner
        from baton.train.precision import Precision

        config = self.config
        return build_learner(
            config.model,
            config.adapter,
            base_folder=self.base,
            revision=self.revision,
            device=device,
            compute_dtype=Precision.choose(config.train.precision, device).dtype,
            packed=packed,
            seed=config.train.seed,
            compiled=packed and is_compiled(config.train, device),
            over=over,
        )
