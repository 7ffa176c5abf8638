"""LoRA layers computed together are the LoRA layers that PEFT computes one by one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from baton.train import gated
from baton.train.stacked import stack_projections

IDS = torch.arange(40).reshape(2, 20)


def network(kind="qwen2", **values):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | values))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.double().requires_grad_(False)


def with_lora(model, **values):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, LoraConfig(**settings | values))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def outcome(model):
    """The loss and every gradient, in float64."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=0)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize(
    ("kind", "values", "stacked"),
    [
        ("qwen2", {}, 14),  # biases on q, k and v
        ("llama", {"attention_bias": True}, 14),
        ("mistral", {}, 14),
        ("gemma", {"head_dim": 16}, 14),  # another activation: stacked, not gated
        ("qwen3", {"head_dim": 16}, 14),
        ("phi3", {"pad_token_id": 0}, 8),  # one layer for q, k, v, one for gate and up
    ],
)
def test_loss_and_gradients_are_those_of_peft(kind, values, stacked):
    expected = outcome(with_lora(network(kind, **values)))
    model = with_lora(network(kind, **values))
    assert stack_projections(model) == stacked
    assert_same(outcome(model), expected)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]]
)
def test_some_targets_only(targets):
    expected = outcome(with_lora(network(), target_modules=targets))
    model = with_lora(network(), target_modules=targets)
    assert stack_projections(model) == 2 * len(targets)
    assert_same(outcome(model), expected)


def test_a_layer_called_out_of_turn_still_answers_for_its_own_input():
    model = with_lora(network())
    plain = with_lora(network())
    stack_projections(model)
    ours = model.base_model.model.model.layers[0].self_attn
    theirs = plain.base_model.model.model.layers[0].self_attn
    one, other = torch.randn(2, 3, 64, dtype=torch.float64)
    for name, x in (("k_proj", one), ("q_proj", one), ("k_proj", other), ("v_proj", one)):
        got, expected = getattr(ours, name)(x), getattr(theirs, name)(x)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("values", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_variants_of_lora_stay_with_peft(values):
    assert stack_projections(with_lora(network(), **values)) == 0


def test_the_names_of_the_parameters_stay(tmp_path):
    model = with_lora(network())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stack_projections(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    # Stacked weights are shared, not copied.
    attention = model.base_model.model.model.layers[0].self_attn
    q, k = attention.q_proj.base_layer.weight, attention.k_proj.base_layer.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_the_gradient_of_the_gate_is_that_of_autograd():
    torch.manual_seed(0)
    both = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 12, dtype=torch.float64)
    out = torch.nn.functional.silu(both[:, :12]) * both[:, 12:]
    out.backward(grad)
    got, product = gated.gate_backward(grad, both.detach())
    torch.testing.assert_close(got, both.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(product, out.detach(), rtol=1e-12, atol=1e-14)
