"""Completions drawn from a causal model, each by a seed of its own: tokens in, tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from baton.eval.config import Sampling
from baton.eval.generate import Stop, own_defaults_hidden


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    seeds: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[int]] | None:
    """Draw `count` completions of each prompt.

    What is drawn for a sequence follows from its prompt, its seed and the weights; which others
    stand in its batch changes nothing but the last bits of its logits. Each token takes one
    uniform number of the sequence's own stream (Philox, keyed by the seed).

    Args:
        prompts: tokens of each prompt.
        seeds: one for each completion, those of a prompt side by side.
        sampling: temperature, top-k and top-p, in this order; the `seed` in it is not used.
        ends: tokens that end a completion.
        pad: fills up shorter prompts; never seen by the model.

    Returns:
        `len(prompts) * count` completions, those of a prompt side by side, each with its end
        token if it came to one; None when `should_stop` said so half-way.
    """
    rows = [prompt for prompt in prompts for _ in range(count)]
    if len(seeds) != len(rows):
        raise ValueError(f"{len(rows)} completions need as many seeds, got {len(seeds)}")
    done: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        span = slice(start, start + batch_size)
        drawn = _batch(
            model, rows[span], seeds[span], sampling, max_new_tokens, ends, pad, should_stop
        )
        if drawn is None:
            return None
        done += drawn
    return done


def _batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    should_stop: Callable[[], bool],
) -> list[list[int]] | None:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    streams = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    uniform = torch.from_numpy(np.stack([rng.random(max_new_tokens) for rng in streams]))
    stop = Stop(should_stop)
    draw = _Draw(uniform.to(model.device), start=width, sampling=sampling)
    decoding = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
        use_cache=True,
    )
    with torch.inference_mode(), own_defaults_hidden(model):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=decoding,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=[stop],
        )
    if stop.stopped:
        return None
    found = set(ends)
    return [_up_to_end(row, found) for row in output[:, width:].tolist()]


def _up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token of each row: the one at which the running sum passes the row's number."""

    def __init__(self, uniform: torch.Tensor, *, start: int, sampling: Sampling) -> None:
        self._uniform = uniform
        self._start = start
        self._sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        number = self._uniform[:, input_ids.shape[1] - self._start, None]
        tokens = draw_tokens(scores, number, self._sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def draw_tokens(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token a row by inverting the distribution function.

    Args:
        logits: `(rows, vocabulary)`.
        uniform: `(rows, 1)` float64 in [0, 1).

    Returns:
        `(rows, 1)` int64.
    """
    size = logits.shape[1]
    top = min(sampling.top_k or size, size)
    values, ids = logits.float().topk(top, dim=1)
    chances = (values / sampling.temperature).double().softmax(1)
    before = chances.cumsum(1) - chances
    # The likeliest tokens up to and including the one that reaches top-p (Holtzman et al., 2020).
    chances = chances.masked_fill(before >= max(sampling.top_p, 1e-9), 0.0)
    sums = chances.cumsum(1)
    place = (sums <= uniform * sums[:, -1:]).sum(1, keepdim=True)
    kept = (chances > 0).sum(1, keepdim=True)
    return ids.gather(1, torch.minimum(place, kept - 1))
