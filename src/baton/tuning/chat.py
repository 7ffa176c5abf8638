"""A task's best checkpoint, ready to answer one prompt after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from baton.eval.answer import Trained
from baton.eval.config import GenerateConfig
from baton.eval.generate import generate
from baton.legs import utc_now
from baton.stage import Alone
from baton.store.checkpoint import Checkpoints
from baton.train.ranks import Ranks
from baton.tuning.best import TRAIN, fetch_best
from baton.tuning.model import TaskModel


@dataclass(frozen=True)
class Chat:
    """Reads the task's folder only; nothing is loaded before it is needed.

    `stage` is the training stage whose weights answer.
    """

    trained: Trained
    stage: str = TRAIN

    @property
    def task_model(self) -> TaskModel:
        trained = self.trained
        return TaskModel(config=trained.config, folder=trained.store.root, pins=trained.plan.pins)

    @cached_property
    def tokenizer(self) -> Any:
        return self.task_model.tokenizer()

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model with the weights of the best checkpoint. Raises `DamagedError`."""
        trained = self.trained
        learner = self.task_model.learner(Ranks.of(Alone()).device, packed=False)
        checkpoints = Checkpoints(
            trained.store, f"{self.stage}/checkpoints", 0, lambda: None, utc_now
        )
        with tempfile.TemporaryDirectory(prefix="baton-best-") as folder:
            name = trained.task.name
            fetch_best(checkpoints, trained.store, Path(folder), task=name, stage=self.stage)
            learner.weights.load(Path(folder))
        return learner.model.eval()

    def reply(
        self,
        prompt: str,
        config: GenerateConfig,
        *,
        ends: Sequence[int],
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer one rendered prompt."""
        answers = generate(self.model, self.tokenizer, [prompt], config, ends=ends, on_text=on_text)
        assert answers is not None, "nobody asked to stop"
        return answers.texts[0]
