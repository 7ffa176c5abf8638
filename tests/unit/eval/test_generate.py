"""Answers in batches are those that transformers gives one by one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from baton.eval.config import GenerateConfig, Sampling
from baton.eval.generate import end_tokens, generate
from baton.train.base import train_tokenizer

PROMPTS = [
    "头疼怎么办",
    "What helps against a headache?",
    "a",
    "one two three four five six seven eight nine ten",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROMPTS * 3, vocab_size=320)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(10)
    return model


def ending_soon(model, tokenizer):
    """The same model, likely to end its answer within a few tokens."""
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = model.lm_head.weight.mean(0) * 3
        model.lm_head.weight[tokenizer.eos_token_id] += 1.5
    return model


def one_by_one(model, tokenizer, prompts, **options):
    """New tokens of each prompt alone, by transformers, the end token among them."""
    answers = []
    for prompt in prompts:
        encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        decoding = GenerationConfig(
            do_sample=False,
            max_new_tokens=options.get("max_new_tokens", 12),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        out = model.generate(**encoded, generation_config=decoding)
        answers.append(out[0, encoded["input_ids"].shape[1] :].tolist())
    return answers


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_a_greedy_batch_is_what_transformers_says_to_each_prompt_alone(model, tokenizer):
    expected = one_by_one(model, tokenizer, PROMPTS)
    answers = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12))
    assert answers.texts == [text_of(tokenizer, tokens) for tokens in expected]
    assert answers.new_tokens == [len(tokens) for tokens in expected]
    assert len(set(answers.texts)) == len(PROMPTS)
    assert answers.seconds > 0


def test_new_tokens_are_counted_up_to_the_end_token(model, tokenizer):
    model = ending_soon(model, tokenizer)
    expected = one_by_one(model, tokenizer, PROMPTS, max_new_tokens=40)
    counts = [len(tokens) for tokens in expected]
    answers = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=40))
    assert answers.new_tokens == counts
    assert answers.texts == [text_of(tokenizer, tokens) for tokens in expected]
    assert len(set(counts)) > 1
    assert min(counts) < 40


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.05},  # Qwen2.5-Instruct's own
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
    ],
    ids=str,
)
def test_penalties_of_the_model_do_not_touch_greedy_answers(values, model, tokenizer):
    plain = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=20))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **values)
    again = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=20))
    assert again.texts == plain.texts


@pytest.mark.parametrize("values", [{"min_p": 0.5}, {"typical_p": 0.3}], ids=str)
def test_filters_of_the_model_do_not_touch_sampled_answers(values, model, tokenizer):
    config = GenerateConfig(max_new_tokens=20, sampling=Sampling())
    plain = generate(model, tokenizer, PROMPTS, config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **values)
    assert generate(model, tokenizer, PROMPTS, config).texts == plain.texts


def test_sampling_defaults_and_lengths_of_the_model_are_not_used(model, tokenizer):
    plain = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        top_p=0.5,
        max_new_tokens=2,
        max_length=3,
        eos_token_id=tokenizer.eos_token_id,
    )
    again = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12))
    assert (again.texts, again.new_tokens) == (plain.texts, plain.new_tokens)


@pytest.mark.parametrize("after", [0, 3])
def test_a_stop_gives_no_answers_within_a_token(after, model, tokenizer):
    asked = 0

    def should_stop():
        nonlocal asked
        asked += 1
        return asked > after

    assert (
        generate(
            model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=50), should_stop=should_stop
        )
        is None
    )
    assert asked == after + 1


def test_seeded_sampling_repeats_and_another_seed_draws_anew(model, tokenizer):
    def texts(seed=0, **options):
        config = GenerateConfig(max_new_tokens=12, sampling=Sampling(temperature=1.5, **options))
        torch.rand(1)  # what was drawn before must not matter
        return generate(model, tokenizer, PROMPTS, config, seed=seed).texts

    assert texts() == texts()
    assert texts(seed=1) == texts(seed=1) != texts()
    assert (
        texts(top_k=40)
        != generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12)).texts
    )


def test_sampling_with_top_k_of_one_is_greedy(model, tokenizer):
    greedy = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=12))
    narrow = GenerateConfig(max_new_tokens=12, sampling=Sampling(top_k=1))
    assert generate(model, tokenizer, PROMPTS, narrow).texts == greedy.texts


def test_answers_end_at_any_of_the_end_tokens_of_model_and_tokenizer(model, tokenizer):
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    first = one_by_one(model, tokenizer, PROMPTS[:1])[0]
    model.generation_config.eos_token_id = [first[2], tokenizer.pad_token_id]
    assert set(end_tokens(model, tokenizer)) == {
        first[2],
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    }
    answers = generate(model, tokenizer, PROMPTS[:1], GenerateConfig(max_new_tokens=12))
    assert answers.new_tokens == [first.index(first[2]) + 1]


def test_the_tokenizers_own_padding_side_does_not_matter(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=8)).texts
    tokenizer.padding_side = "right"
    try:
        found = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=8)).texts
    finally:
        tokenizer.padding_side = "left"
    assert found == expected
