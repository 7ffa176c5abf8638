"""How a questions_gen task answers on the command line: it writes problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from baton.data.readers import read_column
from baton.data.tokenise import ChatEncoder
from baton.eval.answer import Ask, Trained, refuse_documents
from baton.eval.config import GenerateConfig
from baton.pipelines.questions_gen.config import QuestionsGen
from baton.pipelines.questions_gen.prompts import Request
from baton.pipelines.questions_gen.training import DISTILL
from baton.tuning.chat import Chat

SAMPLES = (
    Request("Number_Theory:Divisibility", "intermediate"),
    Request("Algebra:Inequalities", "olympiad"),
)


class QuestionsGenAnswerer:
    """What is asked is the whole prompt, as `baton.pipelines.questions_gen.prompts` writes it."""

    def __init__(self, trained: Trained) -> None:
        self._config: QuestionsGen = trained.config
        view = self._config.view(self._config.distill)
        self._chat = Chat(replace(trained, config=view), stage=DISTILL)

    @property
    def sampling(self) -> GenerateConfig:
        return self._config.eval.generate

    def samples(self) -> Sequence[Ask]:
        return [Ask(question=request.text()) for request in SAMPLES]

    def read(self, path: Path) -> Sequence[Ask]:
        asked = read_column(path, encoding=None, columns={"question": "prompt"}, name="question")
        return [Ask(question=question) for question in asked]

    @cached_property
    def _encoder(self) -> ChatEncoder:
        length = self._config.data.max_length
        return ChatEncoder(self._chat.tokenizer, system=None, max_length=length)

    def answer(
        self, ask: Ask, config: GenerateConfig, on_text: Callable[[str], None] | None = None
    ) -> str:
        refuse_documents(ask)
        prompt = self._encoder.prompt_text(ask.question)
        return self._chat.reply(prompt, config, ends=(self._encoder.end_of_turn,), on_text=on_text)
