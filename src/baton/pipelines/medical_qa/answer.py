"""How a medical_qa task answers on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from baton.data.readers import read_column
from baton.data.tokenise import ChatEncoder
from baton.eval.answer import Ask, Trained, refuse_documents
from baton.eval.config import GenerateConfig
from baton.pipelines.medical_qa.config import MedicalQA
from baton.tuning.chat import Chat

SAMPLES = (
    "高血压患者日常饮食需要注意什么?",
    "What helps against a light headache?",
)


class MedicalQAAnswerer:
    """Questions alone; files have the columns that the experiment maps."""

    def __init__(self, trained: Trained) -> None:
        self._chat = Chat(trained)
        self._config: MedicalQA = trained.config

    @property
    def sampling(self) -> GenerateConfig:
        return self._config.eval.generate

    def samples(self) -> Sequence[Ask]:
        return [Ask(question=question) for question in SAMPLES]

    def read(self, path: Path) -> Sequence[Ask]:
        data = self._config.data
        questions = read_column(path, encoding=data.encoding, columns=data.columns, name="question")
        return [Ask(question=question) for question in questions]

    @cached_property
    def _encoder(self) -> ChatEncoder:
        data = self._config.data
        return ChatEncoder(self._chat.tokenizer, system=data.system, max_length=data.max_length)

    def answer(
        self, ask: Ask, config: GenerateConfig, on_text: Callable[[str], None] | None = None
    ) -> str:
        refuse_documents(ask)
        prompt = self._encoder.prompt_text(ask.question)
        return self._chat.reply(prompt, config, ends=(self._encoder.end_of_turn,), on_text=on_text)
