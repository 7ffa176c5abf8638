"""Completions drawn from a model while it is trained, each by a seed of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from baton.eval.config import Sampling
from baton.eval.generate import Stop, own_defaults_hidden
from baton.generation.draw import choose
from baton.generation.engine import Engine, Request
from baton.train.layers import plain_layers
from baton.train.stacked import adapters_held


@dataclass(kw_only=True)
class Sampler:
    """Draws completions; what is drawn for a sequence follows from prompt, seed and weights.

    Which others stand in its batch changes nothing but the last bits of its logits.

    Attributes:
        model: the model or PEFT model, as it is loaded to train or to generate.
        most_tokens: of prompt and completion together.
        ends: tokens that end a completion, which are part of it.
        pad: fills up shorter prompts where they are padded; never seen by the model.
        rows: sequences at a time.
        exact: a completion must not depend by a rounding error on the others of its batch's size.
        keeps: hold on to a GPU's pages and graphs between two calls.
    """

    model: Any
    sampling: Sampling
    most_tokens: int
    max_new_tokens: int
    ends: Sequence[int]
    pad: int
    rows: int
    exact: bool = False
    keeps: bool = False
    _engine: Engine | None = field(default=None, init=False)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        seeds: Sequence[int],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[int]] | None:
        """`count` completions of each prompt, those of a prompt side by side; the model is in
        eval mode afterwards.

        `seeds` has one for each completion, below 2**63; the one in `sampling` is not used.
        None when `should_stop` said so half-way.
        """
        rows = [prompt for prompt in prompts for _ in range(count)]
        if len(seeds) != len(rows):
            raise ValueError(f"{len(rows)} completions need as many seeds, got {len(seeds)}")
        if not rows:
            return []
        self.model.eval()
        if next(self.model.parameters()).device.type == "cuda" and not self.exact:
            return self._paged(rows, seeds, should_stop)
        return self._padded(rows, seeds, should_stop)

    def close(self) -> None:
        """Give pages and graphs back."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _paged(
        self, rows: list[Sequence[int]], seeds: Sequence[int], should_stop: Callable[[], bool]
    ) -> list[list[int]] | None:
        if self._engine is None:
            self._engine = Engine(
                self.model,
                most_tokens=self.most_tokens,
                max_new_tokens=self.max_new_tokens,
                ends=self.ends,
                sampling=self.sampling,
                rows=self.rows,
            )
        requests = [Request(prompt=p, seed=seed) for p, seed in zip(rows, seeds, strict=True)]
        found = dict(self._engine.run(requests, should_stop))
        if not self.keeps:
            self.close()
        return [found[i] for i in range(len(rows))] if len(found) == len(rows) else None

    def _padded(
        self, rows: list[Sequence[int]], seeds: Sequence[int], should_stop: Callable[[], bool]
    ) -> list[list[int]] | None:
        done: list[list[int]] = []
        for start in range(0, len(rows), self.rows):
            span = slice(start, start + self.rows)
            drawn = self._batch(rows[span], seeds[span], should_stop)
            if drawn is None:
                return None
            done += drawn
        return done

    def _batch(
        self, rows: list[Sequence[int]], seeds: Sequence[int], should_stop: Callable[[], bool]
    ) -> list[list[int]] | None:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(rows):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = next(self.model.parameters()).device
        stop = Stop(should_stop)
        draw = _Draw(torch.tensor(seeds, device=device), start=width, sampling=self.sampling)
        decoding = GenerationConfig(
            do_sample=False,  # of what `draw` leaves, one token each
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.ends),
            pad_token_id=self.pad,
            use_cache=True,
        )
        with torch.inference_mode(), own_defaults_hidden(self.model), _generating(self.model):
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=decoding,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        if stop.stopped:
            return None
        ends = set(self.ends)
        return [_up_to_end(row, ends) for row in output[:, width:].tolist()]


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Have a model that is loaded to train on packs attend to padded prompts and a cache."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = network.config
    before, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        with adapters_held(model), plain_layers(network):
            yield
    finally:
        config._attn_implementation = before


def _up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token of each row: the one that its seed draws at this place."""

    def __init__(self, seeds: torch.Tensor, *, start: int, sampling: Sampling) -> None:
        self._seeds = seeds
        self._start = start
        self._sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = torch.full_like(self._seeds, input_ids.shape[1] - self._start)
        tokens = choose(scores, self._sampling, self._seeds, place)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
