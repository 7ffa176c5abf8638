"""LoRA layers computed together are the LoRA layers that PEFT computes one by one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from baton.train import stacked
from baton.train.dropout import drop
from baton.train.stacked import adapters_held, stack_projections

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


@pytest.mark.parametrize("values", [{"use_dora": True}, {"lora_bias": True}])
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


SEED = torch.tensor([7])


class Dropping(torch.nn.Module):
    """What takes the place of PEFT's dropout, so that both ways drop the same values."""

    p = 0.25

    def forward(self, x):
        return drop(x.flatten(0, -2), SEED, self.p).view(x.shape) if self.training else x


@pytest.mark.parametrize("kind", ["qwen2", "gemma"])
def test_adapter_dropout_takes_its_share_of_the_input(kind, monkeypatch):
    values = {"head_dim": 16} if kind == "gemma" else {}
    monkeypatch.setattr(stacked, "new_seed", lambda count, device: SEED.repeat(count))
    plain = with_lora(network(kind, **values), lora_dropout=0.25)
    for module in plain.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Dropping()
    expected = outcome(plain)
    model = with_lora(network(kind, **values), lora_dropout=0.25)
    assert stack_projections(model) == 14
    assert_same(outcome(model), expected)
    assert_same(outcome(model.eval()), outcome(with_lora(network(kind, **values)).eval()))


def test_dropout_differs_from_call_to_call_and_follows_the_seed():
    model = with_lora(network(), lora_dropout=0.25)
    stack_projections(model)
    torch.manual_seed(3)
    first, second = outcome(model), outcome(model)
    assert first[0] != second[0]
    torch.manual_seed(3)
    assert_same(outcome(model), first)


def test_of_several_adapters_the_one_at_work_is_computed():
    def two(model):
        made = with_lora(model)
        made.add_adapter("other", LoraConfig(r=8, lora_alpha=4, target_modules="all-linear"))
        for name, parameter in made.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.double()
                parameter.requires_grad_(True)
            if "lora_B.other" in name:
                torch.manual_seed(len(name))
                torch.nn.init.normal_(parameter, std=0.1)
        return made

    model, plain = two(network()), two(network())
    assert stack_projections(model) == 14
    plain.load_state_dict(model.state_dict())
    for name in ("other", "default"):
        for each in (model, plain):
            each.set_adapter(name)
        assert_same(outcome(model), outcome(plain))
        with adapters_held(model):
            torch.testing.assert_close(
                outcome_alone(model), outcome_alone(plain), rtol=1e-12, atol=0
            )
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(outcome_alone(model), outcome_alone(plain), rtol=1e-12, atol=0)


def outcome_alone(model):
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def test_ranks_that_differ_stay_apart():
    pattern = {"rank_pattern": {"gate_proj": 8, "down_proj": 2}}
    expected = outcome(with_lora(network(), **pattern))
    model = with_lora(network(), **pattern)
    assert stack_projections(model) == 14
    assert_same(outcome(model), expected)
