"""Samples as tokens in memory-mapped files, made once and read in O(1)."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from baton.errors import DamagedError, DataError

Array = NDArray[Any]

# Where a sample ends, and how long its prompt is: two int64.
_INDEX_BYTES = 16

# Stands where the answer will stand while a template is rendered.
_PLACE = "<baton:answer>"
# Llama-3.1's template writes today's date otherwise: other tokens tomorrow. This is its default.
_DATE = "26 Jul 2024"


class TokenWriter:
    """Writes `NAME.tokens` (token ids end to end) and `NAME.index` (offset, prompt length).

    Appending streams, so memory does not grow with the rows. The files get their names when
    all is written: a kill leaves none. What was brought to disk by `sync` can be gone on from:
    `samples` and `tokens` say how much of it to keep.

    Raises:
        DamagedError: there is less to keep.
    """

    def __init__(
        self, folder: Path, name: str, *, vocab_size: int, samples: int = 0, tokens: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, name
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._tokens = _opened(folder / f".{name}.tokens", keep=tokens * self._dtype.itemsize)
        self._index = _opened(folder / f".{name}.index", keep=samples * _INDEX_BYTES)
        self._end = tokens

    def append(self, tokens: list[int], prompt: int) -> None:
        """Add a sample whose first `prompt` tokens carry no loss."""
        np.asarray(tokens, dtype=self._dtype).tofile(self._tokens)
        self._end += len(tokens)
        np.asarray((self._end, prompt), dtype=np.int64).tofile(self._index)

    def extend(self, tokens: Array, lengths: Array, prompts: Array) -> None:
        """Add many samples at once: their tokens end to end, and a length and a prompt each."""
        tokens.astype(self._dtype).tofile(self._tokens)
        ends = self._end + np.cumsum(lengths, dtype=np.int64)
        np.stack((ends, prompts.astype(np.int64)), axis=1).tofile(self._index)
        self._end += int(lengths.sum())

    def sync(self) -> None:
        """Bring what is written so far to disk."""
        for file in (self._tokens, self._index):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Leave the files as they are, to be gone on with."""
        self._tokens.close()
        self._index.close()

    def finish(self) -> None:
        """Bring everything to disk under its name."""
        meta = {"dtype": self._dtype.name, "tokens": self._end}
        beside = self._folder / f".{self._name}.json"
        beside.write_text(json.dumps(meta) + "\n")
        self.sync()
        self.close()
        for kind in ("tokens", "index", "json"):
            os.replace(
                self._folder / f".{self._name}.{kind}", self._folder / f"{self._name}.{kind}"
            )


def _opened(path: Path, *, keep: int) -> IO[bytes]:
    """A file to append to, cut to its first `keep` bytes."""
    if not keep:
        return open(path, "wb")
    if path.stat().st_size < keep:
        raise DamagedError(f"{path}: {path.stat().st_size:,} bytes, expected at least {keep:,}")
    file = open(path, "r+b")  # noqa: SIM115  (the writer closes it)
    file.truncate(keep)
    file.seek(keep)
    return file


class TokenFile:
    """Reads what `TokenWriter` wrote; nothing is held in memory but what is asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        meta = json.loads((folder / f"{name}.json").read_text())
        path = folder / f"{name}.tokens"
        expected = meta["tokens"] * np.dtype(meta["dtype"]).itemsize
        if path.stat().st_size != expected:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes, expected {expected:,}; remove the"
                " task's data folder to have it made again"
            )
        self._maps: list[mmap.mmap] = []
        self._tokens = self._mapped(path, meta["dtype"])
        index = self._mapped(folder / f"{name}.index", "int64")
        if len(index) % 2 or (index[-2] if len(index) else 0) != meta["tokens"]:
            raise DataError(
                f"{folder / f'{name}.index'}: does not end where the tokens do; remove the task's"
                " data folder to have it made again"
            )
        self._index = index.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._index)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        starts, ends = self._spans(indices)
        return ends - starts

    def labelled(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that are predicted: all after the prompt (the first token never is)."""
        prompts: NDArray[np.int64] = np.maximum(self._index[indices, 1], 1)
        return self.lengths(indices) - prompts

    def sample(self, index: int) -> tuple[NDArray[np.int64], int]:
        start = int(self._index[index - 1, 0]) if index else 0
        end, prompt = (int(value) for value in self._index[index])
        return self._tokens[start:end].astype(np.int64), prompt

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Have the disk start reading samples, without waiting for it."""
        if not self._maps:
            return
        width, page = self._tokens.itemsize, mmap.PAGESIZE
        for start, end in zip(*self._spans(indices), strict=True):
            first = int(start) * width // page * page
            self._maps[0].madvise(mmap.MADV_WILLNEED, first, int(end) * width - first)

    def release(self) -> None:
        """Give back the memory of all that was read; what is asked for again is read again."""
        for mapping in self._maps:
            mapping.madvise(mmap.MADV_DONTNEED)

    def _spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ends = np.asarray(self._index[indices, 0])
        starts = np.where(indices > 0, self._index[indices - 1, 0], 0)
        return starts, ends

    def _mapped(self, path: Path, dtype: str) -> Array:
        # An empty file cannot be mapped.
        if path.stat().st_size == 0:
            return np.empty(0, dtype=dtype)
        with open(path, "rb") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype=dtype)


@dataclass(frozen=True)
class Turn:
    """One question and its answer as the model will see them.

    `tokens` ends with the end-of-turn token unless the answer was cut; the first `prompt`
    tokens are the template and the question.
    """

    tokens: list[int]
    prompt: int
    is_cut: bool


class ChatEncoder:
    """Turns question and answer into tokens by the tokenizer's own chat template.

    Where the answer lies is taken from character offsets of the rendered text, never from
    searching for its tokens. The end-of-turn token is the first special token after the
    answer, or the tokenizer's eos where the template writes none; what a template puts after
    it (a newline) is left out.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, *, system: str | None, max_length: int) -> None:
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; use an instruction-tuned model")
        self._tokenizer = tokenizer
        self._system = system
        self._max_length = max_length
        self._special = set(tokenizer.all_special_ids)
        self._special |= {
            int(i) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special
        }

    def prompt_text(self, question: str) -> str:
        """The rendered prompt, up to where the answer begins."""
        return self._around(question)[0]

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer, in training and so in generation."""
        turn = self.encode([("?", "!")])[0]
        if turn is None:
            raise DataError(f"an empty chat already fills data.max_length ({self._max_length})")
        return turn.tokens[-1]

    def encode(self, pairs: Iterable[tuple[str, str]]) -> list[Turn | None]:
        """Encode (question, answer) pairs; None where the prompt alone fills the context."""
        rows = []
        for question, answer in pairs:
            before, after = self._around(question)
            rows.append((before, answer, after))
        if not rows:
            return []
        prompts = self._tokenizer([row[0] for row in rows], add_special_tokens=False)["input_ids"]
        if not self._tokenizer.is_fast:
            return [self._by_parts(*row) for row in zip(prompts, rows, strict=True)]
        whole = self._tokenizer(
            ["".join(row) for row in rows], add_special_tokens=False, return_offsets_mapping=True
        )
        return [
            self._turn(*row)
            for row in zip(prompts, rows, whole["input_ids"], whole["offset_mapping"], strict=True)
        ]

    def _messages(self, question: str, answer: str) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
        return messages

    def _around(self, question: str) -> tuple[str, str]:
        """What the template writes before and after the answer of a finished turn.

        Taken with a placeholder: no template can trim or rewrite the answer itself, and the
        prompt is the same in training and generation even where a template opens a new turn
        otherwise than it writes a finished one (Qwen3's empty thought, GLM-4's newline).
        """
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    self._messages(question, _PLACE), tokenize=False, date_string=_DATE
                )
            )
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses this conversation ({error}); without"
                " data.system it may take it"
            ) from error
        before, place, after = text.rpartition(_PLACE)
        if not place:
            raise DataError("the chat template leaves the answer out; choose another model")
        return before, after

    def _turn(
        self,
        prompt: list[int],
        row: tuple[str, str, str],
        ids: list[int],
        offsets: list[tuple[int, int]],
    ) -> Turn | None:
        end = len(row[0]) + len(row[1])
        if ids[: len(prompt)] != prompt or any(first < end < stop for first, stop in offsets):
            # A token lies across an edge: generation will start from the prompt's own tokens.
            return self._by_parts(prompt, row)
        after = next((i for i, (first, _) in enumerate(offsets) if first >= end), len(ids))
        return self._finish(prompt, ids[len(prompt) : after], ids[after:])

    def _by_parts(self, prompt: list[int], row: tuple[str, str, str]) -> Turn | None:
        """Answer and end encoded by themselves, as for tokenizers without offsets."""
        parts = (self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in row[1:])
        return self._finish(prompt, *parts)

    def _finish(self, prompt: list[int], answer: list[int], rest: list[int]) -> Turn | None:
        end_of_turn = next((i for i in rest if i in self._special), self._tokenizer.eos_token_id)
        tokens = [*prompt, *answer, end_of_turn]
        if len(prompt) >= self._max_length:
            return None
        return Turn(tokens[: self._max_length], len(prompt), len(tokens) > self._max_length)


def write_turns(
    encoder: ChatEncoder,
    pairs: Iterable[tuple[str, str]],
    writer: TokenWriter,
    *,
    on_dropped: Callable[[int], None],
    batch: int = 512,
) -> dict[str, int]:
    """Encode and append pairs; `on_dropped` hears the position of each that cannot fit.

    Returns counts: `samples`, `tokens`, `labelled_tokens`, `answers_cut`, `prompts_too_long`.
    """
    counts = dict.fromkeys(
        ("samples", "tokens", "labelled_tokens", "answers_cut", "prompts_too_long"), 0
    )
    held: list[tuple[str, str]] = []
    position = 0

    def flush() -> None:
        nonlocal position
        for turn in encoder.encode(held):
            if turn is None:
                counts["prompts_too_long"] += 1
                on_dropped(position)
            else:
                writer.append(turn.tokens, turn.prompt)
                counts["samples"] += 1
                counts["tokens"] += len(turn.tokens)
                counts["labelled_tokens"] += len(turn.tokens) - max(turn.prompt, 1)
                counts["answers_cut"] += turn.is_cut
            position += 1
        held.clear()

    for pair in pairs:
        held.append(pair)
        if len(held) == batch:
            flush()
    flush()
    writer.finish()
    return counts
