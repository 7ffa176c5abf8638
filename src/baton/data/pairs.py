"""Pairs of prompt and response as tokens, each ended by the tokenizer's own eos."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.data.rows import Row
from baton.data.tokenise import TokenWriter
from baton.errors import DataError

# Some milliseconds of encoding. A row takes three times as long to encode as to read, which one
# thread does: more threads would wait. All their rows stay under 100 MB, whatever their length.
_BATCH_ROWS = 512
_THREADS = 4


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs end to end: prompt, eos, response, eos, prompt, …

    Attributes:
        tokens: `(all tokens,)` int64.
        lengths: `(pairs,)` tokens of each pair.
        prompts: `(pairs,)` tokens of each prompt, its eos included.
        prompts_cut, responses_cut: how many were longer than allowed.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    prompts: NDArray[np.int64]
    prompts_cut: int
    responses_cut: int


class PairEncoder:
    """Encodes texts, each cut to `max_seq_len` tokens of which the last is eos.

    Raises:
        DataError: the tokenizer has no eos or no pad token.
    """

    def __init__(self, tokenizer: Any, *, max_seq_len: int) -> None:
        for name in ("eos", "pad"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise DataError(
                    f"the tokenizer names no {name} token; set {name}_token in its"
                    " tokenizer_config.json, or train one with `baton data t5 tokenizer`"
                )
        self.eos = int(tokenizer.eos_token_id)
        self._tokenizer = tokenizer
        self._room = max_seq_len - 1
        if tokenizer.is_fast:
            # A row that says "</s>" means these four characters.
            tokenizer.backend_tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut and with eos at the end."""
        return [[*ids[: self._room], self.eos] for ids in self._ids(texts)]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> EncodedPairs:
        """Both sides of every pair in one call, so that all cores have work."""
        ids = self._ids([text for pair in pairs for text in pair])
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        cut = sizes > self._room
        kept = np.minimum(sizes, self._room) + 1
        parts = ((*each[: self._room], self.eos) for each in ids)
        tokens = np.fromiter(itertools.chain.from_iterable(parts), np.int64, int(kept.sum()))
        return EncodedPairs(
            tokens, kept[::2] + kept[1::2], kept[::2], int(cut[::2].sum()), int(cut[1::2].sum())
        )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            encoded = self._tokenizer(
                list(texts), add_special_tokens=False, split_special_tokens=True
            )
            ids: list[list[int]] = encoded.input_ids
            return ids
        # Past transformers' wrapper, which takes longer than encoding a short text.
        backend = self._tokenizer.backend_tokenizer
        fast = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in fast]


@dataclass(kw_only=True)
class PairCounts:
    """What has been written: samples and tokens, and how many texts were cut."""

    samples: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0

    def add(self, encoded: EncodedPairs) -> None:
        tokens = int(encoded.lengths.sum())
        self.samples += len(encoded.lengths)
        self.tokens += tokens
        self.labelled_tokens += tokens - int(encoded.prompts.sum())
        self.prompts_cut += encoded.prompts_cut
        self.responses_cut += encoded.responses_cut


def write_pairs(
    encoder: PairEncoder,
    rows: Iterable[Row],
    writer: TokenWriter,
    counts: PairCounts,
    *,
    goes_on: Callable[[PairCounts], bool] = lambda counts: True,
) -> bool:
    """Encode and append rows with `prompt` and `response`, in constant memory.

    `counts` goes on from where it is. `goes_on` is asked after each batch; when it says no,
    the writer is left open and False is returned.
    """
    for encoded in _encoded(encoder, rows):
        writer.extend(encoded.tokens, encoded.lengths, encoded.prompts)
        counts.add(encoded)
        if not goes_on(counts):
            return False
    writer.finish()
    return True


def _encoded(encoder: PairEncoder, rows: Iterable[Row]) -> Iterator[EncodedPairs]:
    """Batches of rows in their order, encoded by other threads while the next ones are read.

    Threads of our own, because launchers set TOKENIZERS_PARALLELISM to false: it would also take
    the cores of training.
    """
    pairs = ((row.values["prompt"], row.values["response"]) for row in rows)
    threads = min(_THREADS, os.cpu_count() or 1)
    waiting: deque[Future[EncodedPairs]] = deque()
    with ThreadPoolExecutor(threads) as encoding:
        while batch := list(itertools.islice(pairs, _BATCH_ROWS)):
            waiting.append(encoding.submit(encoder.encode_pairs, batch))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class HeldOut:
    """Which pairs validate: a share of the prompts, drawn by a hash keyed with the seed.

    A pure function of the prompt: nothing to remember at 50 million rows, and two rows with
    the same prompt never stand on both sides.
    """

    share: float
    seed: int

    def __call__(self, prompt: str) -> bool:
        key = self.seed.to_bytes(8, "little", signed=True)
        text = prompt.strip().encode("utf-8", "surrogatepass")
        digest = blake2b(text, digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") < self.share * 2**64
