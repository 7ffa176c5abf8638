"""Completions drawn from a model that is being trained, each by a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.eval.config import Sampling
from baton.generation.engine import Engine, Request

_ROOM = 256


@dataclass(kw_only=True)
class Sampler:
    """Draws with `model` as it is at each call; the memory for it is kept in between.

    Attributes:
        sampling: temperature, top-k and top-p; the `seed` in it is not used.
        ends: tokens that end a completion.
        rows: the most completions that are written at a time.
    """

    model: Any
    sampling: Sampling
    max_new_tokens: int
    ends: Sequence[int]
    rows: int
    _engine: Engine | None = field(default=None, init=False)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        count: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[int]] | None:
        """Draw `count` completions of each prompt.

        What is drawn for a sequence follows from its prompt, its seed and the weights; which
        others are written beside it changes nothing but the last bits of its logits.

        Args:
            prompts: tokens of each prompt.
            seeds: one for each completion, those of a prompt side by side.

        Returns:
            `len(prompts) * count` completions, those of a prompt side by side, each with its end
            token if it came to one; None when `should_stop` said so half-way.
        """
        rows = [prompt for prompt in prompts for _ in range(count)]
        if len(seeds) != len(rows):
            raise ValueError(f"{len(rows)} completions need as many seeds, got {len(seeds)}")
        if not rows:
            return []
        requests = [Request(prompt=row, seed=s) for row, s in zip(rows, seeds, strict=True)]
        engine = self._engine_for(max(map(len, rows)) + self.max_new_tokens)
        found = dict(engine.run(requests, should_stop))
        if len(found) < len(requests):
            return None
        return [found[number] for number in range(len(requests))]

    def _engine_for(self, tokens: int) -> Engine:
        if self._engine is not None and self._engine.most_tokens < tokens:
            self._engine.close()
            self._engine = None
        if self._engine is None:
            # With some room, so that a slightly longer prompt does not capture everything anew.
            room = -(-tokens // _ROOM) * _ROOM
            self._engine = Engine(
                self.model,
                most_tokens=room,
                max_new_tokens=self.max_new_tokens,
                ends=self.ends,
                sampling=self.sampling,
                rows=self.rows,
            )
        return self._engine
