"""The paged engine says what transformers' own generation says, whatever else it is writing."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from baton.eval.config import Sampling
from baton.generation.engine import Engine, Request
from baton.generation.pages import PAGE
from baton.train.stacked import stack_projections

END = 7
NEW = 90
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def network(kind, **values):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    lengths = (5, PAGE, 130, 1, 33, PAGE - 1, PAGE + 1, 20)
    return [torch.randint(10, 300, (n,), generator=generator).tolist() for n in lengths]


def engine(model, **options):
    settings = {"most_tokens": 130 + NEW, "max_new_tokens": NEW, "ends": [END], "rows": 3}
    return Engine(model, **settings | options)


def greedy(model, prompt):
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("qwen2", {}),
        ("llama", {}),
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {"head_dim": 24}),
    ],
)
def test_greedy_answers_are_those_of_transformers(kind, values, prompts):
    model = network(kind, **values)
    made = engine(model)
    found = dict(made.run([Request(prompt=p) for p in prompts]))
    assert found == {i: greedy(model, p) for i, p in enumerate(prompts)}
    assert made.pages.free == made.pages.count - 1


def test_an_answer_ends_with_the_end_token(prompts):
    model = network("qwen2")
    plain = greedy(model, prompts[0])
    end = plain[4]
    [(_, answer)] = engine(model, ends=[end]).run([Request(prompt=prompts[0])])
    assert answer == plain[: plain.index(end) + 1]


def test_adapters_are_used_as_they_are_at_each_run(prompts):
    model = network("qwen2")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = greedy(model, prompts[2])
    stack_projections(model)
    made = engine(model)
    request = [Request(prompt=prompts[2])]
    assert dict(made.run(request)) == {0: expected}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with model.disable_adapter():
        base = greedy(model, prompts[2])
    assert dict(made.run(request)) == {0: base}
    assert base != expected


def test_what_is_drawn_depends_on_the_seed_alone(prompts):
    model = network("qwen2")
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=20, repetition_penalty=1.2)
    requests = [Request(prompt=p, seed=i) for i, p in enumerate(prompts)]
    few = dict(engine(model, sampling=sampling, rows=2).run(requests))
    all_at_once = dict(engine(model, sampling=sampling, rows=8).run(requests))
    assert few == all_at_once
    other = dict(engine(model, sampling=sampling).run([Request(prompt=prompts[0], seed=99)]))
    assert other[0] != few[0]


def test_stopping_gives_all_pages_back(prompts):
    made = engine(network("qwen2"), ends=[])
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) > 3

    found = list(made.run([Request(prompt=p) for p in prompts], should_stop))
    assert len(found) < len(prompts)
    assert made.pages.free == made.pages.count - 1
    assert len(dict(made.run([Request(prompt=p) for p in prompts]))) == len(prompts)


def test_a_prompt_that_is_too_long_is_refused():
    made = engine(network("qwen2"))
    with pytest.raises(ValueError, match="a prompt of 131 tokens: made for 220 in all"):
        list(made.run([Request(prompt=[1] * 131)]))
