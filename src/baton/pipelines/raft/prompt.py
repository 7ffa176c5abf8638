"""Rows as tokens: documents are shortened until the whole answer fits, never the answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from baton.data.tokenise import ChatEncoder, Turn
from baton.errors import DataError
from baton.pipelines.raft.draw import Shown
from baton.pipelines.raft.format import Format

# A document shorter than that says nothing; the row cannot fit, then.
_LEAST_TOKENS = 8
# Shortening by characters overshoots or undershoots by a few tokens, so it is done in rounds.
_ROUNDS = 12
_BATCH = 64


@dataclass(frozen=True)
class Fitted:
    """A row that fits: its tokens, and the documents as they stand in them."""

    turn: Turn
    documents: tuple[str, ...]
    is_shortened: bool


class Prompter:
    """Writes prompts of a format for one tokenizer, at most `max_length` tokens with the answer.

    A template that takes no system prompt (Mistral's, Gemma's) gets it at the head of the
    user's words.
    """

    def __init__(self, tokenizer: Any, format: Format, *, max_length: int) -> None:
        self._format = format
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._head = ""
        self._encoder = ChatEncoder(tokenizer, system=format.system, max_length=sys.maxsize)
        if format.system is not None and not _says(self._encoder, format.system):
            self._head = f"{format.system}\n\n"
            self._encoder = ChatEncoder(tokenizer, system=None, max_length=sys.maxsize)

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer."""
        return self._encoder.end_of_turn

    def prompt_text(self, question: str, documents: Sequence[str]) -> str:
        """The rendered prompt, up to where the answer begins."""
        return self._encoder.prompt_text(self._user(question, documents))

    def fit(self, rows: Sequence[tuple[str, Shown]]) -> Iterator[Fitted | None]:
        """Each (question, shown) as tokens; None where no document is left to shorten.

        What the target quotes from a document stays in it.
        """
        for first in range(0, len(rows), _BATCH):
            batch = rows[first : first + _BATCH]
            turns = self._encoder.encode(
                (self._user(question, shown.documents), shown.target) for question, shown in batch
            )
            for (question, shown), turn in zip(batch, turns, strict=True):
                assert turn is not None, "no prompt fills an endless context"
                if len(turn.tokens) <= self._max_length:
                    yield Fitted(turn, shown.documents, is_shortened=False)
                else:
                    yield self._shorten(question, shown, len(turn.tokens) - self._max_length)

    def fit_prompt(
        self, question: str, documents: Sequence[str], *, limit: int
    ) -> tuple[str, ...] | None:
        """The documents, shortened until the prompt is at most `limit` tokens."""
        texts = [_Text(document, ()) for document in documents]
        for _ in range(_ROUNDS):
            shown = tuple(text.shortened for text in texts)
            over = self._count(self.prompt_text(question, shown)) - limit
            if over <= 0:
                return shown
            if not self._take(texts, over):
                return None
        return None

    def _shorten(self, question: str, shown: Shown, over: int) -> Fitted | None:
        quotes = self._format.quotes_of(shown.target)
        texts = [_Text(document, _spans(document, quotes)) for document in shown.documents]
        for _ in range(_ROUNDS):
            if not self._take(texts, over):
                return None
            documents = tuple(text.shortened for text in texts)
            [turn] = self._encoder.encode([(self._user(question, documents), shown.target)])
            assert turn is not None, "no prompt fills an endless context"
            over = len(turn.tokens) - self._max_length
            if over <= 0:
                return Fitted(turn, documents, is_shortened=True)
        return None

    def _take(self, texts: Sequence[_Text], over: int) -> bool:
        """Take `over` tokens from the longest texts, all down to one level; False if it cannot be.

        Equally long documents tell nothing about which of them is the oracle.
        """
        tokens = [self._count(text.shortened) for text in texts]
        least = [
            max(_LEAST_TOKENS, text.needed_tokens(n)) for text, n in zip(texts, tokens, strict=True)
        ]
        goal = sum(tokens) - over

        def kept(level: int) -> list[int]:
            return [min(n, max(level, low)) for n, low in zip(tokens, least, strict=True)]

        if sum(kept(0)) > goal:
            return False
        low, high = 0, max(tokens)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sum(kept(middle)) <= goal else (low, middle - 1)
        for text, n, keep in zip(texts, tokens, kept(low), strict=True):
            if keep < n:
                text.cut(keep / n)
        return True

    def _user(self, question: str, documents: Sequence[str]) -> str:
        return self._head + self._format.prompt(question, documents)

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _says(encoder: ChatEncoder, system: str) -> bool:
    """Does the template write a system prompt? Some refuse one, some leave it out in silence."""
    try:
        return system.strip() in encoder.prompt_text("?")
    except DataError:
        return False


class _Text:
    """A document that is shortened to a window around what is quoted from it."""

    def __init__(self, text: str, spans: Sequence[tuple[int, int]]) -> None:
        self._text = text
        self._room = len(text)
        self._first = min((start for start, _ in spans), default=0)
        self._last = max((end for _, end in spans), default=0)

    @property
    def shortened(self) -> str:
        """The beginning; or, where quotes lie behind it, the part that ends with the last."""
        start = max(0, self._last - self._room)
        return self._text[start : start + self._room].strip()

    def needed_tokens(self, tokens: int) -> int:
        """About how many of the text's present `tokens` its quotes are."""
        return -(-tokens * (self._last - self._first) // max(1, self._room))

    def cut(self, share: float) -> None:
        """Keep about this share of what is left, and all quotes."""
        self._room = max(int(self._room * share), self._last - self._first)


def _spans(text: str, quotes: Sequence[str]) -> list[tuple[int, int]]:
    """Where the first occurrence of each quote lies in a text, white space aside."""
    spans = []
    for quote in filter(None, quotes):
        found = re.search(r"\s+".join(map(re.escape, quote.split())), text)
        if found:
            spans.append(found.span())
    return spans
