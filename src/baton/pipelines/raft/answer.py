"""How a raft task answers on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from baton.errors import DataError
from baton.eval.answer import Ask, Trained
from baton.eval.config import GenerateConfig, Sampling
from baton.pipelines.raft.config import Raft
from baton.pipelines.raft.format import load_format
from baton.pipelines.raft.prompt import Prompter
from baton.pipelines.raft.rows import Row, read
from baton.pipelines.raft.sample import sample_rows
from baton.tuning.chat import Chat

SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1)
MAX_NEW_TOKENS = 1024


class RaftAnswerer:
    """Questions with their documents; files are RAFT rows."""

    def __init__(self, trained: Trained) -> None:
        self._chat = Chat(trained)
        self._config: Raft = trained.config
        self._format = load_format(self._config.data.format)

    @property
    def sampling(self) -> GenerateConfig:
        context = self._chat.task_model.context()
        # A small model keeps half of its context for the question.
        most = MAX_NEW_TOKENS if context is None else min(MAX_NEW_TOKENS, context // 2)
        return GenerateConfig(max_new_tokens=most, sampling=SAMPLING)

    def samples(self) -> Sequence[Ask]:
        return [_ask(row) for row in sample_rows(self._config.data.format)]

    def read(self, path: Path) -> Sequence[Ask]:
        return [_ask(row) for row in read(path)]

    @cached_property
    def _prompter(self) -> Prompter:
        length = self._config.data.max_length
        return Prompter(self._chat.tokenizer, self._format, max_length=length)

    def answer(
        self, ask: Ask, config: GenerateConfig, on_text: Callable[[str], None] | None = None
    ) -> str:
        limit = self._limit(config)
        documents = self._prompter.fit_prompt(ask.question, ask.documents, limit=limit)
        if documents is None:
            raise DataError(
                f"question and {len(ask.documents)} documents do not fit into {limit:,} tokens,"
                " even shortened; ask about fewer"
            )
        prompt = self._prompter.prompt_text(ask.question, documents)
        ends = (self._prompter.end_of_turn,)
        return self._chat.reply(prompt, config, ends=ends, on_text=on_text)

    def _limit(self, config: GenerateConfig) -> int:
        """The longest prompt: as in training, and no more than leaves room for the answer."""
        context = self._chat.task_model.context()
        length = self._config.data.max_length
        if context is None:
            return length
        if config.max_new_tokens >= context:
            raise DataError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a question in the"
                f" model's context of {context} tokens"
            )
        return min(length, context - config.max_new_tokens)


def _ask(row: Row) -> Ask:
    return Ask(question=row.question, documents=row.documents, reference=row.answer)
