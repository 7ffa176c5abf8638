"""Batches of prompts answered by whichever way of generating fits the machine and the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.eval.config import GenerateConfig
from baton.eval.generate import Answers, end_tokens, generate
from baton.generation.engine import Engine, Request
from baton.generation.vllm import Vllm, require_vllm

# Seeds of one batch's prompts lie side by side.
_PROMPTS_OF_A_BATCH = 1 << 20


def answer_batches(
    model: Any,
    tokenizer: Any,
    batches: Mapping[int, Sequence[str]],
    config: GenerateConfig,
    *,
    scratch: Path,
    ends: Sequence[int] = (),
    exact: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    answer: Callable[..., Answers | None] | None = None,
) -> Iterator[tuple[int, Answers]]:
    """Answer all prompts of all batches; a batch is yielded as soon as its last answer ends.

    `ends` are ids that end an answer besides the model's and the tokenizer's own. With `exact`,
    an answer must not depend by a rounding error on which others are written beside it.
    `answer` is another way to answer one batch, with the arguments of `generate`. A copy of the
    model for vLLM goes to the folder `scratch` and is removed at the end.

    Raises:
        ConfigError: `config` asks for vLLM, and there is none.
        EngineError: vLLM ended with an error.
    """
    engine = _engine(model, config, exact=exact)
    if answer is not None or engine == "padded":
        for number, prompts in batches.items():
            answers = (answer or generate)(
                model,
                tokenizer,
                prompts,
                config,
                ends=ends,
                seed=number,
                should_stop=should_stop,
            )
            if answers is None:
                return
            yield number, answers
    else:
        copied = scratch if engine == "vllm" else None
        yield from _together(model, tokenizer, batches, config, ends, should_stop, copied)


def require_engine(config: GenerateConfig) -> None:
    """Raises `ConfigError` where the engine that `config` asks for is not installed."""
    if config.engine == "vllm":
        require_vllm()


def _engine(model: Any, config: GenerateConfig, *, exact: bool) -> str:
    """`paged` or `padded`: what `auto` means here, or what the configuration says."""
    if config.engine != "auto":
        return config.engine
    return "paged" if model.device.type == "cuda" and not exact else "padded"


def _together(
    model: Any,
    tokenizer: Any,
    batches: Mapping[int, Sequence[str]],
    config: GenerateConfig,
    ends: Sequence[int],
    should_stop: Callable[[], bool],
    copied: Path | None,
) -> Iterator[tuple[int, Answers]]:
    """All prompts as requests of one engine; vLLM if its copy has a place."""
    first = 0 if config.sampling is None else config.sampling.seed
    requests, homes = [], []
    for number, prompts in batches.items():
        encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        for place, prompt in enumerate(encoded):
            seed = (first * 1_000_003 + number) * _PROMPTS_OF_A_BATCH + place
            requests.append(Request(prompt=prompt, seed=seed))
            homes.append((number, place))
    limits: dict[str, Any] = {
        "most_tokens": max(len(r.prompt) for r in requests) + config.max_new_tokens,
        "max_new_tokens": config.max_new_tokens,
        "ends": sorted({*end_tokens(model, tokenizer), *ends}),
        "sampling": config.sampling,
    }
    engine = (
        Engine(model, rows=len(requests), **limits)
        if copied is None
        else Vllm(model, copied, **limits)
    )
    found: dict[int, dict[int, list[int]]] = {number: {} for number in batches}
    started = time.monotonic()
    try:
        for index, tokens in engine.run(requests, should_stop):
            number, place = homes[index]
            found[number][place] = tokens
            if len(found[number]) < len(batches[number]):
                continue
            rows = [found[number][i] for i in range(len(batches[number]))]
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            now = time.monotonic()
            yield (
                number,
                Answers([t.strip() for t in texts], [len(r) for r in rows], now - started),
            )
            started = time.monotonic()
    finally:
        engine.close()
