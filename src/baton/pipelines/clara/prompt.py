"""The prompts of the three stages, and which of their tokens are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from baton.errors import DataError
from baton.pipelines.clara.memory import Vocabulary
from baton.pipelines.clara.rows import AskRow, Row, SayRow

SAY_SYSTEM = (
    "You are a helpful assistant. Given a document, your task is to generate some single questions"
    " to cover all key information of the document and answer them sequentially."
)
PARAPHRASE_SYSTEM = (
    "You are a helpful assistant. Your task is follow the instructions to paraphrase the background"
    " information."
)
ASK_SYSTEM = (
    "You are a helpful assistant. Your task is to extract relevant information from provided"
    " documents and to answer to questions as briefly as possible."
)
# One of these by seed and row; the model must not learn to answer one wording alone.
PARAPHRASES = (
    "Background: {docs} means the same as",
    "Background: {docs} Say this again in words of your own.",
    "Background: {docs} Write down what was said above without using its wording.",
    "Here is a text: {docs} Restate all of it.",
    "Background: {docs} How else could one put this?",
    "Read the following and express it differently: {docs}",
    "Background: {docs} In different words:",
    "What does this passage say? {docs} Tell it anew.",
    "Background: {docs} Give an equivalent version of this text.",
    "The same content as in {docs} can be written as",
    "Background: {docs} Rewrite this so that nothing is lost.",
    "Put the information of {docs} into new sentences.",
)
# Stands where the answer will stand while a template is rendered.
_PLACE = "<baton:answer>"
# Llama-3.1's template writes today's date otherwise: other tokens tomorrow. This is its default.
_DATE = "26 Jul 2024"

Message = dict[str, str]


@dataclass(frozen=True)
class Encoded:
    """Tokens of prompt and answer; those from `prompt` on are learnt. `is_cut` at the end."""

    tokens: list[int]
    prompt: int
    is_cut: bool


@dataclass(frozen=True)
class Prompter:
    """Renders rows with the tokenizer's chat template. Raises `DataError` without one."""

    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; use an instruction-tuned model")

    @property
    def tokenizer(self) -> Any:
        return self.vocabulary.tokenizer

    def messages(self, row: Row, *, documents: int, seed: int) -> tuple[str, str, str]:
        """System text, user text and answer of a row with so many slots for documents."""
        if isinstance(row, AskRow):
            return (*self.question(row.question, documents), row.golds[0])
        slots = self.vocabulary.slot * documents
        if row.kind == "qa":
            return SAY_SYSTEM, f"Background:\n{slots}", _pairs(row)
        rng = np.random.Generator(np.random.PCG64([seed & 0xFFFFFFFF, row.number]))
        template = PARAPHRASES[int(rng.integers(len(PARAPHRASES)))]
        return PARAPHRASE_SYSTEM, template.replace("{docs}", slots), row.answers[0]

    def question(self, question: str, documents: int) -> tuple[str, str]:
        """System and user text of a question about so many documents."""
        return self.question_about(question, self.vocabulary.slot * documents)

    def question_about(self, question: str, background: str) -> tuple[str, str]:
        """System and user text of a question about `background`, whatever stands there."""
        return ASK_SYSTEM, f"Background:\n{background}\n\nQuestion:{question}"

    def prompt_text(self, system: str, user: str) -> str:
        """The rendered prompt, up to where the answer begins."""
        return self._around(system, user)[0]

    def encode(
        self, conversations: Sequence[tuple[str, str, str]], *, max_length: int
    ) -> list[Encoded | None]:
        """Tokens of (system, user, answer), cut on the right; None where the prompt fills all.

        Everything after the generation prompt is learnt: the answer, its end-of-turn token, and
        what the template puts after it.
        """
        if not conversations:
            return []
        found: list[Encoded | None] = []
        around = [self._around(system, user) for system, user, _ in conversations]
        prompts = self._ids([before for before, _ in around])
        wholes = self._ids(
            [
                self._whole(conversation, *parts)
                for conversation, parts in zip(conversations, around, strict=True)
            ]
        )
        for prompt, whole, (before, _), conversation in zip(
            prompts, wholes, around, conversations, strict=True
        ):
            tokens = whole
            if whole[: len(prompt)] != prompt:
                # A token lies across the edge: generation will start from the prompt's own.
                rest = self._whole(conversation, *self._around(*conversation[:2]))[len(before) :]
                tokens = prompt + self._ids([rest])[0]
            if len(prompt) >= max_length or len(tokens) == len(prompt):
                found.append(None)
            else:
                found.append(
                    Encoded(tokens[:max_length], len(prompt), is_cut=len(tokens) > max_length)
                )
        return found

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer."""
        _, after = self._around("?", "?")
        special = set(self.tokenizer.all_special_ids) | {
            int(i) for i, t in self.tokenizer.added_tokens_decoder.items() if t.special
        }
        ids = (i for i in self._ids([after])[0] if i in special)
        return int(next(ids, self.tokenizer.eos_token_id))

    def _whole(self, conversation: tuple[str, str, str], before: str, after: str) -> str:
        """The finished conversation, as the template writes it."""
        system, user, answer = conversation
        whole = self._render([*self._messages(system, user), _said("assistant", answer)])
        if whole.startswith(before):
            return whole
        return before + answer + after

    def _around(self, system: str, user: str) -> tuple[str, str]:
        """The generation prompt, and what the template writes after an answer.

        Where a template opens a turn to be answered otherwise than it writes a finished one, the
        finished one decides, in training and in generation.
        """
        messages = self._messages(system, user)
        prompt = self._render(messages, add_generation_prompt=True)
        finished = self._render([*messages, _said("assistant", _PLACE)])
        before, place, after = finished.rpartition(_PLACE)
        if not place:
            raise DataError("the chat template leaves the answer out; choose another model")
        return (prompt if finished.startswith(prompt) else before), after

    def _messages(self, system: str, user: str) -> list[Message]:
        """As two turns, or as one where the template refuses a system role."""
        if self._takes_system:
            return [_said("system", system), _said("user", user)]
        return [_said("user", f"{system}\n{user}")]

    @cached_property
    def _takes_system(self) -> bool:
        try:
            rendered = self._render([_said("system", _PLACE), _said("user", "?")])
        except TemplateError:
            return False
        # Some templates drop a system turn without a word.
        return _PLACE in rendered

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                date_string=_DATE,
            )
        )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return found


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pairs(row: SayRow) -> str:
    return "\n".join(
        f"Question: {question}\nAnswer: {answer}"
        for question, answer in zip(row.questions, row.answers, strict=True)
    )
