"""The tokens that clara adds to a vocabulary, and what stands where a document would."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from baton.errors import ModelError

ENCODE, SEPARATOR, AUTOENCODE = "<ENC>", "<SEP>", "<AE>"
_RESERVED = re.compile(r"<MEM\d+>|<ENC>|<SEP>|<AE>")


def is_reserved_in(text: str) -> str | None:
    """A token of ours that `text` holds literally, or None: it would be read as that token."""
    found = _RESERVED.search(text)
    return found[0] if found else None


@dataclass(frozen=True)
class Vocabulary:
    """A base tokenizer with `vectors` memory tokens and three markers added, in this order.

    bos and eos are the base's own; one without bos (Qwen2.5) gets none.
    """

    tokenizer: Any
    vectors: int
    first: int
    encoder_tokens: int

    @classmethod
    def extend(cls, tokenizer: Any, *, vectors: int, encoder_tokens: int) -> Vocabulary:
        """Add the tokens, to `tokenizer` itself.

        Raises:
            ModelError: the tokenizer has one of them already, or its ids have gaps.
        """
        added = [*(f"<MEM{i}>" for i in range(vectors)), ENCODE, SEPARATOR, AUTOENCODE]
        known = tokenizer.get_vocab()
        taken = [token for token in added if token in known]
        if taken:
            raise ModelError(
                f"the tokenizer has a token {taken[0]} already; clara needs it for itself, so"
                " choose another base model"
            )
        first = len(tokenizer)
        tokenizer.add_tokens(added, special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(added)
        if ids != list(range(first, first + len(added))):
            raise ModelError("the tokenizer does not number new tokens from its own length on")
        return cls(tokenizer, vectors, first, encoder_tokens)

    @property
    def added(self) -> int:
        """How many tokens were added."""
        return self.vectors + 3

    @property
    def memory_ids(self) -> list[int]:
        """`<MEM0>` to the last."""
        return list(range(self.first, self.first + self.vectors))

    @property
    def slot(self) -> str:
        """What stands for a document in a prompt."""
        return "".join(f"<MEM{i}>" for i in range(self.vectors)) + SEPARATOR

    def encoder_ids(self, texts: list[str]) -> list[list[int]]:
        """`<ENC> bos text eos`, cut on the right as one string of tokens, then the memory tokens.

        A long text loses its end and its eos, as in the reference implementation.
        """
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        if not texts:
            return []
        found = self.tokenizer(
            [f"{ENCODE}{bos}{text}{eos}" for text in texts], add_special_tokens=False
        )["input_ids"]
        return [[*ids[: self.encoder_tokens], *self.memory_ids] for ids in found]
