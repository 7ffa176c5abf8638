"""How a t5_pretrain task answers on the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from baton.data.pairs import PairEncoder
from baton.data.readers import read_column
from baton.eval.answer import Ask, Trained, refuse_documents
from baton.eval.config import GenerateConfig
from baton.eval.generate import generate_responses
from baton.legs import utc_now
from baton.pipelines.t5_pretrain.config import T5Pretrain
from baton.pipelines.t5_pretrain.model import PairModel
from baton.stage import Alone
from baton.store.checkpoint import Checkpoints
from baton.train.ranks import Ranks
from baton.tuning.best import TRAIN, fetch_best

SAMPLES = ("你好，请介绍一下你自己。", "如何预防感冒？", "What should I read this summer?")


class T5Answerer:
    """Prompts alone; files have the column that the experiment maps."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self._config: T5Pretrain = trained.config
        self._model = PairModel(config=trained.config, folder=trained.store.root)

    @property
    def sampling(self) -> GenerateConfig:
        return self._config.eval.generate

    def samples(self) -> Sequence[Ask]:
        return [Ask(question=question) for question in SAMPLES]

    def read(self, path: Path) -> Sequence[Ask]:
        data = self._config.data
        questions = read_column(path, encoding=data.encoding, columns=data.columns, name="prompt")
        return [Ask(question=question) for question in questions]

    @cached_property
    def _tokenizer(self) -> Any:
        return self._model.tokenizer()

    @cached_property
    def _network(self) -> Any:
        """The model with the weights of the best checkpoint. Raises `DamagedError`."""
        trained = self._trained
        learner = self._model.learner(Ranks.of(Alone()).device, packed=False)
        checkpoints = Checkpoints(trained.store, f"{TRAIN}/checkpoints", 0, lambda: None, utc_now)
        with tempfile.TemporaryDirectory(prefix="baton-best-") as folder:
            fetch_best(checkpoints, trained.store, Path(folder), task=trained.task.name)
            learner.weights.load(Path(folder))
        return learner.network.eval()

    def answer(
        self, ask: Ask, config: GenerateConfig, on_text: Callable[[str], None] | None = None
    ) -> str:
        refuse_documents(ask)
        encoder = PairEncoder(self._tokenizer, max_seq_len=self._config.data.max_seq_len)
        prompts = encoder.encode([ask.question])
        answers = generate_responses(
            self._network, self._tokenizer, prompts, config, on_text=on_text
        )
        assert answers is not None, "nobody asked to stop"
        return answers.texts[0]
