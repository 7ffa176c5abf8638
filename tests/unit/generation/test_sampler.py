"""Completions that follow from prompt, seed and weights, whatever stands beside them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.eval.config import Sampling
from baton.generation.draw import choose
from baton.generation.sampler import Sampler

VOCAB = 50
END = 2
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def model() -> Any:
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def drawn(model: Any, prompts: Any = PROMPTS, **changes: Any) -> Any:
    count = changes.pop("count", 4)
    seeds = changes.pop("seeds", range(100, 100 + count * len(prompts)))
    stop = changes.pop("should_stop", lambda: False)
    options = {
        "sampling": Sampling(temperature=1.0, top_p=1.0, top_k=0),
        "max_new_tokens": 12,
        "ends": [END],
        "rows": 32,
    }
    sampler = Sampler(model=model, **(options | changes))
    return sampler.draw(prompts, list(seeds), count=count, should_stop=stop)


def test_completions_do_not_depend_on_their_batch(model: Any) -> None:
    whole = drawn(model)
    assert len(whole) == 12
    assert drawn(model, rows=5) == whole
    assert drawn(model, rows=1) == whole
    alone = drawn(model, [PROMPTS[2]], seeds=range(108, 112))
    assert alone == whole[8:]


def test_another_seed_draws_another_completion_and_the_global_one_does_not_matter(
    model: Any,
) -> None:
    torch.manual_seed(1)
    first = drawn(model)
    torch.manual_seed(2)
    assert drawn(model) == first
    assert len({tuple(row) for row in first}) > 9
    assert drawn(model, seeds=range(200, 212)) != first


def test_a_completion_ends_with_its_end_token_and_holds_nothing_behind_it(model: Any) -> None:
    rows = drawn(model, count=40, max_new_tokens=30)
    lengths = Counter(END in row for row in rows)
    assert lengths[True] > 5, "nothing would be tested"
    for row in rows:
        assert END not in row[:-1]
        assert len(row) == 30 or row[-1] == END


def test_tokens_are_drawn_as_often_as_the_model_says(model: Any) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    count = 4000
    rows = drawn(model, [PROMPTS[0]], count=count, seeds=range(count), max_new_tokens=1)
    found = np.bincount([row[0] for row in rows], minlength=VOCAB) / count
    wanted = logits.softmax(0).numpy()
    # Three standard deviations of a share, and a little for fifty looks at once.
    assert (np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / count) + 1e-3).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 20, 0.8), (1.3, 0, 0.5)])
def test_only_tokens_that_transformers_leaves_are_drawn_and_as_often(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(3)) * 3
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    steps.append(TopPLogitsWarper(top_p))
    wanted = steps(torch.zeros(1, 1).long(), logits.clone()).softmax(1)[0].double()
    count = 40_000
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    seeds, places = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    tokens = choose(logits.expand(count, -1), sampling, seeds, places)
    found = torch.bincount(tokens, minlength=200).double() / count
    assert (found[wanted == 0] == 0).all()
    # Four standard deviations of a share, and a little for two hundred looks at once.
    assert ((found - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt() + 1e-4).all()


def test_sampling_stops_when_asked_to(model: Any) -> None:
    calls = iter(range(100))
    assert drawn(model, should_stop=lambda: next(calls) > 0) is None


def test_seeds_must_be_as_many_as_completions(model: Any) -> None:
    with pytest.raises(ValueError, match="12 completions need as many seeds, got 2"):
        drawn(model, seeds=[1, 2])
