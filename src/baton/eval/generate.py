"""Answers of a model to prompts, a batch at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from baton.eval.config import GenerateConfig


@dataclass(frozen=True)
class Answers:
    """What a batch of prompts was answered with; `seconds` is generation alone.

    `notes`, one an answer if any, stand beside the answers in records.
    """

    texts: list[str]
    new_tokens: list[int]
    seconds: float
    notes: Sequence[Mapping[str, Any]] = ()


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    config: GenerateConfig,
    *,
    ends: Sequence[int] = (),
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    on_text: Callable[[str], None] | None = None,
) -> Answers | None:
    """Answer `prompts` as one batch, padded on the left.

    The model's own generation defaults (sampling, penalties) are not used: what decides the
    result is in `config`. `ends` are ids that end an answer besides the model's and the
    tokenizer's own. `seed` varies the draws between batches and is added to the one in
    `config.sampling`. `on_text` hears the answer to a single prompt piece by piece.

    Returns:
        The answers without special tokens, or None when `should_stop` said so half-way.
    """
    encoded = tokenizer(
        list(prompts),
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    return _run(
        model,
        tokenizer,
        encoded,
        config,
        skip=encoded["input_ids"].shape[1],
        ends=ends,
        seed=seed,
        should_stop=should_stop,
        on_text=on_text,
    )


def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    on_text: Callable[[str], None] | None = None,
) -> Answers | None:
    """`generate` for an encoder-decoder model; `prompts` are tokens as its encoder takes them."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return _run(
        model,
        tokenizer,
        {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)},
        config,
        skip=1,
        start=int(model.config.decoder_start_token_id),
        seed=seed,
        should_stop=should_stop,
        on_text=on_text,
    )


def generate_embedded(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[torch.Tensor],
    config: GenerateConfig,
    *,
    ends: Sequence[int] = (),
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    on_text: Callable[[str], None] | None = None,
) -> Answers | None:
    """`generate` for prompts that are embeddings already, each `(tokens, width)`."""
    width = max(map(len, prompts))
    rows = prompts[0].new_zeros((len(prompts), width, prompts[0].shape[1]))
    mask = torch.zeros((len(prompts), width), dtype=torch.long, device=rows.device)
    for row, prompt in enumerate(prompts):
        rows[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return _run(
        model,
        tokenizer,
        {"inputs_embeds": rows, "attention_mask": mask},
        config,
        skip=0,
        ends=ends,
        seed=seed,
        should_stop=should_stop,
        on_text=on_text,
    )


def _run(
    model: Any,
    tokenizer: Any,
    encoded: Mapping[str, torch.Tensor],
    config: GenerateConfig,
    *,
    skip: int,
    seed: int,
    should_stop: Callable[[], bool],
    on_text: Callable[[str], None] | None,
    start: int | None = None,
    ends: Sequence[int] = (),
) -> Answers | None:
    """Generate and decode; the first `skip` tokens of each row are not part of the answer."""
    stop = _Stop(should_stop)
    if config.sampling is not None:
        torch.manual_seed(config.sampling.seed * 1_000_003 + seed)
    ends = sorted({*end_tokens(model, tokenizer), *ends})
    decoding = _decoding(config, ends, tokenizer)
    decoding.decoder_start_token_id = start
    started = time.monotonic()
    with torch.inference_mode(), _own_defaults_hidden(model):
        output = model.generate(
            **encoded,
            generation_config=decoding,
            stopping_criteria=StoppingCriteriaList([stop]),
            streamer=None if on_text is None else _Teller(tokenizer, on_text),
        )
    answers = output[:, skip:].tolist()  # waits for the device
    seconds = time.monotonic() - started
    if stop.stopped:
        return None
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Answers([t.strip() for t in texts], [_count(row, ends) for row in answers], seconds)


@contextlib.contextmanager
def _own_defaults_hidden(model: Any) -> Iterator[None]:
    """Hide the model's generation config: transformers takes from it whatever ours leaves open.

    Qwen2.5-Instruct, for one, would bring a repetition penalty into greedy decoding.
    """
    hidden, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = hidden


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({int(i) for i in (*own, tokenizer.eos_token_id) if i is not None})


def _count(row: list[int], ends: list[int]) -> int:
    """New tokens up to and including the end token; what follows it is padding."""
    return next((i + 1 for i, token in enumerate(row) if token in ends), len(row))


def _decoding(config: GenerateConfig, ends: list[int], tokenizer: Any) -> GenerationConfig:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    common = {
        "max_new_tokens": config.max_new_tokens,
        "eos_token_id": ends,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if config.sampling is None:
        return GenerationConfig(do_sample=False, **common)
    s = config.sampling
    return GenerationConfig(
        do_sample=True,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        repetition_penalty=s.repetition_penalty,
        **common,
    )


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends generation at the next token when asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.stopped = self.stopped or self._should_stop()
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)


class _Teller(TextStreamer):  # type: ignore[misc]
    """Passes on text as soon as it is sure what it will be."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
