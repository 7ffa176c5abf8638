"""Continuous batching: sequences enter as others end, and a decoding step is one CUDA graph."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from baton.errors import ModelError
from baton.eval.config import Sampling
from baton.generation import paged_attention
from baton.generation.draw import choose
from baton.generation.paged_attention import Step
from baton.generation.pages import PAGE, Pages, pages_for
from baton.generation.rows import Rows
from baton.train.attention import can_use_varlen
from baton.train.layers import plain_layers
from baton.train.stacked import adapters_held

log = logging.getLogger(__name__)

_MOST_ROWS = 256
_PROMPT_TOKENS = 16_384  # of one pass over new prompts
_STEPS = 8  # between two looks at which sequences have ended
_MEMORY = 0.8  # of what is free may become pages
# Graphs are made for these numbers of rows.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to write: its prompt's tokens, and the seed of its draws."""

    prompt: Sequence[int]
    seed: int = 0


@dataclass
class _Running:
    """A sequence in a row: which request it is, and its pages."""

    number: int
    pages: list[int]
    said: int = 1


class Engine:
    """Writes answers with a Hugging Face causal model, adapters attached or not.

    What it captured stays valid while the weights change in place. `close` gives its memory
    back.

    Args:
        model: the model or PEFT model, on one device.
        most_tokens: of prompt and answer together.
        max_new_tokens: of an answer.
        ends: tokens that end an answer; they are part of it.
        rows: the most sequences at a time; as many as memory allows if there are fewer pages.

    Raises:
        ModelError: the model does not use transformers' attention interface, or not even one
            sequence fits into memory.
    """

    def __init__(
        self,
        model: Any,
        *,
        most_tokens: int,
        max_new_tokens: int,
        ends: Sequence[int],
        sampling: Sampling | None = None,
        rows: int = _MOST_ROWS,
    ) -> None:
        paged_attention.register()
        self.model = model
        self.network = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device: torch.device = next(model.parameters()).device
        self.sampling = sampling
        self.most_tokens = most_tokens
        self._needs_seen = sampling is not None and sampling.repetition_penalty != 1
        each = pages_for(most_tokens)
        count = self._page_count(rows, each)
        self.pages = Pages(count + 1)
        self.capacity = min(rows, count // each, _MOST_ROWS)
        with torch.inference_mode():
            self.rows = Rows.empty(
                self.capacity,
                pages=each,
                most=max_new_tokens,
                vocabulary=self.network.config.get_text_config().vocab_size
                if self._needs_seen
                else 0,
                device=self.device,
            )
            self.ends = torch.tensor(sorted(ends), dtype=torch.int64, device=self.device)
        self._varlen = can_use_varlen(self.device) and self.network.dtype != torch.float32
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._memory: Any = None

    def run(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, list[int]]]:
        """Answer every request, several at a time, in about their order.

        Yields:
            The number of a request and its new tokens, as soon as it has ended.
        """
        if not requests:
            return
        longest = max(len(request.prompt) for request in requests)
        if longest + self.rows.answer.shape[1] > self.most_tokens:
            raise ValueError(f"a prompt of {longest} tokens: made for {self.most_tokens} in all")
        running: list[_Running] = []
        waiting = 0
        was_training = self.model.training
        self.model.eval()
        try:
            with adapters_held(self.model), plain_layers(self.network):
                while waiting < len(requests) or running:
                    if should_stop():
                        return
                    with torch.inference_mode(), self._paged():
                        while taken := self._admit(requests, waiting, running):
                            waiting += taken
                        self._decode(running)
                        ended = self._ended(running)
                    yield from ended
        finally:
            self.model.train(was_training)
            for sequence in running:
                self.pages.give_back(sequence.pages)
            with torch.inference_mode():
                self.rows.done.fill_(True)

    def close(self) -> None:
        """Free the pages and the graphs."""
        self._graphs.clear()
        self._memory = None
        self.pages.layers.clear()

    # --- prompts ------------------------------------------------------------------------

    def _admit(self, requests: Sequence[Request], waiting: int, running: list[_Running]) -> int:
        """Read as many prompts as there is room for, in one pass; returns how many."""
        most = self.rows.answer.shape[1]
        taken: list[Request] = []
        tokens = 0
        first_row = len(running)
        for number in range(waiting, len(requests)):
            length = len(requests[number].prompt)
            fits = len(running) < self.capacity and pages_for(length + most) <= self.pages.free
            if not fits or (taken and tokens + length > _PROMPT_TOKENS):
                break
            pages = self.pages.take(length + most)
            running.append(_Running(number, pages))
            taken.append(requests[number])
            tokens += length
        if taken:
            self._read(taken, running[first_row:], first_row)
        return len(taken)

    def _read(self, taken: Sequence[Request], running: Sequence[_Running], first: int) -> None:
        """Pass the prompts through the model, end to end, and draw the first tokens."""
        lengths = [len(request.prompt) for request in taken]
        width = self.rows.table.shape[1]
        table = torch.tensor([s.pages + [0] * (width - len(s.pages)) for s in running])
        position = torch.cat([torch.arange(n) for n in lengths])
        owner = torch.repeat_interleave(torch.arange(len(taken)), torch.tensor(lengths))
        slots = table[owner, position // PAGE] * PAGE + position % PAGE
        ids = torch.tensor([token for request in taken for token in request.prompt])
        edges = torch.tensor([0, *lengths]).cumsum(0)
        prompts: dict[str, Any] = {"packed_lengths": tuple(lengths)}
        if self._varlen:
            prompts = {"cu_seq_lens_q": self._moved(edges.int()), "max_length_q": max(lengths)}
        step = Step(pages=self.pages, slots=self._moved(slots), prompts=prompts)
        logits = self._forward(ids[None], position[None], step, keep=self._moved(edges[1:] - 1))
        rows = self.rows.between(first, first + len(taken))
        rows.table.copy_(table)
        rows.position.copy_(torch.tensor(lengths) - 1)
        rows.said.zero_()
        rows.done.fill_(False)
        rows.seed.copy_(torch.tensor([request.seed for request in taken]))
        if self._needs_seen:
            rows.seen.zero_()
            rows.seen[self._moved(owner), self._moved(ids)] = True
        self._choose(rows, logits)

    # --- new tokens ---------------------------------------------------------------------

    def _decode(self, running: Sequence[_Running]) -> None:
        """Some steps for all rows; those that end on the way wait for the others."""
        size = next(s for s in (*_SIZES, self.capacity) if s >= min(len(running), self.capacity))
        size = min(size, self.capacity)
        left = self.rows.answer.shape[1] - min(sequence.said for sequence in running)
        for _ in range(min(_STEPS, left)):
            self._one(size)

    def _one(self, size: int) -> None:
        if self.device.type != "cuda" or self._moves_its_frequencies():
            self._step(size)
        elif size not in self._graphs:
            # Loads and compiles whatever a capture must not.
            self._step(size)
            self._graphs[size] = None
        else:
            graph = self._graphs[size]
            if graph is None:
                self._graphs[size] = graph = self._captured(size)
            graph.replay()

    def _captured(self, size: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._step(size)
        self._memory = graph.pool()
        return graph

    def _step(self, size: int) -> None:
        rows = self.rows.between(0, size)
        step = Step(pages=self.pages, slots=rows.slots(), table=rows.table, context=rows.context())
        self._choose(rows, self._forward(rows.token[None], rows.position[None], step))

    def _choose(self, rows: Rows, logits: torch.Tensor) -> None:
        seen = rows.seen if self._needs_seen else None
        rows.advance(choose(logits, self.sampling, rows.seed, rows.said, seen), self.ends)

    def _forward(
        self,
        ids: torch.Tensor,
        position: torch.Tensor,
        step: Step,
        keep: torch.Tensor | int = 0,
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=self._moved(ids),
            position_ids=self._moved(position),
            use_cache=False,
            logits_to_keep=keep,
            paged=step,
        ).logits
        return logits[0]

    # --- between steps ------------------------------------------------------------------

    def _ended(self, running: list[_Running]) -> list[tuple[int, list[int]]]:
        """Take away the sequences that have ended, and give back their pages."""
        count = len(running)
        done, said = self.rows.done[:count].tolist(), self.rows.said[:count].tolist()
        ended = [row for row in range(count) if done[row]]
        answers = self.rows.answer[ended].tolist() if ended else []
        found = []
        for row, answer in zip(ended, answers, strict=True):
            found.append((running[row].number, answer[: said[row]]))
            self.pages.give_back(running[row].pages)
        kept = [row for row in range(count) if not done[row]]
        for row in kept:
            running[row].said = said[row]
        if ended:
            self.rows.keep(kept)
            running[:] = [running[row] for row in kept]
        return found

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return tensor
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def _paged(self) -> Iterator[None]:
        """The model's attention is ours for the time of a pass."""
        config = self.network.config
        before = config._attn_implementation
        config._attn_implementation = paged_attention.NAME
        try:
            yield
        finally:
            config._attn_implementation = before

    def _moves_its_frequencies(self) -> bool:
        """Does the model look at the longest position, which a graph cannot?"""
        config = self.network.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        return "dynamic" in str(rope.get("rope_type")) or rope.get("rope_type") == "longrope"

    def _page_count(self, rows: int, each: int) -> int:
        """Pages for `rows` sequences, or as many as fit into memory."""
        wanted = rows * each
        if self.device.type != "cuda":
            return wanted
        config = self.network.config.get_text_config()
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width: int = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        size: int = (
            2 * config.num_hidden_layers * heads * width * PAGE * self.network.dtype.itemsize
        )
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        possible = int(free * _MEMORY) // size
        if possible < each:
            raise ModelError(
                f"no memory to generate: a sequence of {self.most_tokens} tokens needs"
                f" {each * size / 2**30:.1f} GiB of keys and values, {free / 2**30:.1f} GiB are"
                " free; lower max_new_tokens or shorten the prompts"
            )
        if possible < wanted:
            log.info("memory for %d sequences at a time instead of %d", possible // each, rows)
        return min(wanted, possible)
