"""Layers that recompute: how many, which, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.train.config import TrainConfig
from baton.train.layers import is_compiled, layers_of, recompute_layers

IDS = torch.arange(20)[None]


def network(layers=6):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=50,
    )
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (2, [2, 5]), (3, [1, 3, 5]), (6, [*range(6)])]
)
def test_the_layers_that_recompute_are_spread_evenly(count, expected):
    model = network()
    recompute_layers(model, count)
    changed = [i for i, layer in enumerate(layers_of(model)) if "forward" in vars(layer)]
    assert changed == expected


def test_recomputing_gives_the_same_bits_and_runs_layers_twice():
    plain, model = network(), network()
    recompute_layers(model, 4)
    calls = []
    for layer in layers_of(model):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for one in (plain, model):
        one(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(calls) == 6 + 4
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_without_gradients_nothing_is_recomputed():
    model = network()
    recompute_layers(model)
    with torch.no_grad():
        expected = network()(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_cpu_compiles_nothing_and_says_nothing(caplog):
    assert not is_compiled(TrainConfig(), torch.device("cpu"))
    assert not caplog.records
