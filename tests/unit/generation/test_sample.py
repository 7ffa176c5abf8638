"""Completions that follow from prompt, seed and weights, whatever stands beside them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.eval.config import Sampling
from baton.generation.sample import Sampler
from baton.train.attention import NAME
from baton.train.config import AdapterConfig, PathModel
from baton.train.learner import build_learner

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
    should_stop = changes.pop("should_stop", lambda: False)
    options = {
        "sampling": Sampling(temperature=1.0, top_p=1.0, top_k=0),
        "most_tokens": 64,
        "max_new_tokens": 12,
        "ends": [END],
        "pad": 0,
        "rows": 32,
    }
    sampler = Sampler(model=model, **(options | changes))
    return sampler.draw(prompts, count=count, seeds=list(seeds), should_stop=should_stop)


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


def test_sampling_stops_when_asked_to(model: Any) -> None:
    calls = iter(range(100))
    assert drawn(model, should_stop=lambda: next(calls) > 3) is None


def test_seeds_must_be_as_many_as_completions(model: Any) -> None:
    with pytest.raises(ValueError, match="12 completions need as many seeds, got 2"):
        drawn(model, seeds=[1, 2])


def test_a_model_loaded_to_train_on_packs_draws_what_it_draws_loaded_to_generate(
    tmp_path: Path,
) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    found = []
    for packed in (True, False):
        learner = build_learner(
            PathModel(source="path", path=str(tmp_path)),
            AdapterConfig(method="lora", r=4, alpha=8, targets="all-linear"),
            base_folder=tmp_path,
            revision="",
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            packed=packed,
            seed=0,
        )
        generator = torch.Generator().manual_seed(1)
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        found.append(drawn(learner.model))
        assert learner.network.config._attn_implementation == (NAME if packed else "sdpa")
    assert found[0] == found[1]
