"""How a clara task answers on the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from baton.eval.answer import Ask, Trained
from baton.eval.config import GenerateConfig
from baton.legs import utc_now
from baton.pipelines.clara.config import Clara
from baton.pipelines.clara.data import read_test
from baton.pipelines.clara.responder import Asked, Responder
from baton.pipelines.clara.rows import read_ask
from baton.pipelines.clara.training import StageModel
from baton.stage import Alone
from baton.store.checkpoint import Checkpoints
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.tuning.best import fetch_best
from baton.tuning.model import TaskModel

_SAMPLES = 4


class ClaraAnswerer:
    """Questions with documents of any length: long ones are cut and chosen from."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self._config: Clara = trained.config

    @property
    def sampling(self) -> GenerateConfig:
        return self._config.eval.generate

    def samples(self) -> Sequence[Ask]:
        """The first test rows of the task."""
        rows = read_test(self._trained.store.root)[:_SAMPLES]
        return [
            Ask(question=row.question, documents=tuple(row.documents), reference=row.golds[0])
            for row in rows
        ]

    def read(self, path: Path) -> Sequence[Ask]:
        return [
            Ask(question=row.question, documents=row.documents, reference=row.golds[0])
            for row in read_ask(path, least=1)
        ]

    def answer(
        self, ask: Ask, config: GenerateConfig, on_text: Callable[[str], None] | None = None
    ) -> str:
        pieces = [piece for text in ask.documents for piece in self._responder.chunks(text)]
        asked = Asked(ask.question, tuple(dict.fromkeys(pieces)))
        answers, _ = self._responder.answer([asked], config, on_text=on_text)
        assert answers is not None, "nobody asked to stop"
        return answers.texts[0]

    @cached_property
    def _responder(self) -> Responder:
        """The model with the weights of the best checkpoint of the last stage that trained."""
        trained, stage = self._trained, self._config.until
        task = TaskModel(config=trained.config, folder=trained.store.root, pins=trained.plan.pins)
        device = Ranks.of(Alone()).device
        learner = StageModel(config=self._config, task=task, stage=stage).learner(
            device, packed=False
        )
        checkpoints = Checkpoints(trained.store, f"{stage}/checkpoints", 0, lambda: None, utc_now)
        with tempfile.TemporaryDirectory(prefix="baton-best-") as folder:
            fetch_best(
                checkpoints, trained.store, Path(folder), task=trained.task.name, stage=stage
            )
            learner.weights.load(Path(folder))
        return Responder(
            learner,
            top_k=self._config.stage(stage).documents,
            retrieves=stage == "stage3",
            precision=Precision.choose(self._config.stage(stage).train.precision, device),
        )
