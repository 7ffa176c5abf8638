"""What a checkpoint holds comes back as it was, in our hands and in other people's."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from baton.errors import DamagedError
from baton.train.adapters import AdapterWeights, attach
from baton.train.batch import collate
from baton.train.config import TrainConfig
from baton.train.loss import CausalLoss
from baton.train.optim import build_optimizer
from baton.train.state import (
    FullWeights,
    Timing,
    TrainState,
    differences,
    load_optimizer,
    read_state,
    save_optimizer,
    write_state,
)

CPU = torch.device("cpu")
IDS = torch.arange(3, 20)[None]


def trained(learner, source, steps=3):
    """The optimizer after a few steps, and the names of what it moves."""
    loss = CausalLoss(learner.network, compute_dtype=torch.float32)
    named = [(n, p) for n, p in learner.model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(named, TrainConfig(learning_rate=1e-2))
    batch = collate(source, range(len(source)), device=CPU)
    for _ in range(steps):
        (loss(batch) / 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, {p: n for n, p in named}


@pytest.mark.parametrize(("name", "method"), [("qwen2", "full"), ("llama", "lora")])
def test_the_optimizer_comes_back_bit_by_bit(name, method, tiny, drawn, tmp_path):
    model = tiny(name, method)
    optimizer, names = trained(model.learner(), drawn(3))
    save_optimizer(optimizer, names, tmp_path)
    fresh = model.learner()
    named = [(n, p) for n, p in fresh.model.named_parameters() if p.requires_grad]
    other = build_optimizer(named, TrainConfig(learning_rate=1e-2))
    load_optimizer(other, {p: n for n, p in named}, tmp_path)
    fresh_names = {p: n for n, p in named}
    expected = {names[p]: items for p, items in optimizer.state.items()}
    found = {fresh_names[p]: items for p, items in other.state.items()}
    assert found.keys() == expected.keys()
    for key, items in expected.items():
        assert found[key].keys() == items.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for item, value in items.items():
            assert torch.equal(found[key][item], value)
            assert found[key][item].dtype == value.dtype


def test_a_resumed_optimizer_takes_the_same_next_step(tiny, drawn, tmp_path):
    model, source = tiny("llama", "lora"), drawn(3)
    first = model.learner()
    optimizer, names = trained(first, source)
    first.weights.save(tmp_path)
    save_optimizer(optimizer, names, tmp_path)
    second = model.learner(seed=9)
    second.weights.load(tmp_path)
    named = [(n, p) for n, p in second.model.named_parameters() if p.requires_grad]
    other = build_optimizer(named, TrainConfig(learning_rate=1e-2))
    load_optimizer(other, {p: n for n, p in named}, tmp_path)
    batch = collate(source, range(3), device=CPU)
    for learner, stepper in ((first, optimizer), (second, other)):
        (CausalLoss(learner.network, compute_dtype=torch.float32)(batch) / 10).backward()
        stepper.step()
    for (name, one), two in zip(
        first.model.named_parameters(), second.model.parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_an_optimizer_of_another_model_is_refused(tiny, drawn, tmp_path):
    optimizer, names = trained(tiny("llama", "lora").learner(), drawn(2))
    save_optimizer(optimizer, names, tmp_path)
    other = tiny("gpt_neox", "lora").learner()
    named = {p: n for n, p in other.model.named_parameters() if p.requires_grad}
    with pytest.raises(DamagedError) as caught:
        load_optimizer(
            build_optimizer(((n, p) for p, n in named.items()), TrainConfig()), named, tmp_path
        )
    assert "no parameter 'base_model.model.model.layers.0." in str(caught.value)


def test_an_optimizer_with_a_gap_is_refused(tiny, drawn, tmp_path):
    learner = tiny("llama", "lora").learner()
    optimizer, names = trained(learner, drawn(2))
    gone = next(iter(names))
    del optimizer.state[gone]
    save_optimizer(optimizer, names, tmp_path)
    fresh = build_optimizer(((n, p) for p, n in names.items()), TrainConfig())
    with pytest.raises(DamagedError) as caught:
        load_optimizer(fresh, names, tmp_path)
    assert str(caught.value) == (
        f"optimizer.safetensors: nothing saved for parameter {names[gone]!r}"
    )


def test_tied_weights_are_written_once_and_stay_tied(tiny, tmp_path):
    model = tiny("qwen2")
    first = model.learner().network
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.5)
    FullWeights(first).save(tmp_path)
    second = model.learner().network
    FullWeights(second).load(tmp_path)
    assert second.lm_head.weight.data_ptr() == second.model.embed_tokens.weight.data_ptr()
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    numbers = sum(p.numel() for p in first.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * numbers + 8000


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    FullWeights(tiny("qwen2").learner().network).save(tmp_path)
    with pytest.raises(DamagedError) as caught:
        FullWeights(tiny("gpt_neox").learner().network).load(tmp_path)
    assert str(caught.value).startswith(
        "model.safetensors: these weights do not match the model: ['"
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_a_plain_peft_folder_with_the_same_logits(method, tiny, drawn, tmp_path):
    model = tiny("qwen2", method)
    learner = model.learner()
    trained(learner, drawn(3))
    learner.weights.save(tmp_path)
    plain = model.plain(learner, tmp_path)
    assert isinstance(plain, PeftModel)
    # Stacked products round otherwise.
    learner.network.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(IDS).logits, learner.model.eval()(IDS).logits)
    base = AutoModelForCausalLM.from_pretrained(model.folder)
    with torch.no_grad():
        assert (base(IDS).logits - plain(IDS).logits).abs().max() > 0.01


def test_an_adapter_folder_names_the_model_and_no_folder_of_this_machine(tiny, tmp_path):
    model = tiny("llama", "lora")
    network = AutoModelForCausalLM.from_pretrained(model.folder)
    wrapped = attach(network, model.adapter, base_name="org/some-model", seed=0)
    AdapterWeights(wrapped).save(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/some-model"
    assert config["inference_mode"] is True
    assert wrapped.peft_config["default"].inference_mode is False
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    text = "".join(path.read_text() for path in (tmp_path / "adapter").glob("*.json"))
    text += "".join(path.read_text() for path in (tmp_path / "adapter").glob("*.md"))
    assert str(model.folder) not in text
    assert str(tmp_path) not in text


def test_an_adapter_is_drawn_from_its_seed_in_float32(tiny):
    model = tiny("llama", "lora")

    def weights(seed):
        return {
            n: p
            for n, p in model.learner(dtype=torch.bfloat16, seed=seed).model.named_parameters()
            if p.requires_grad
        }

    one, same, other = weights(1), weights(1), weights(2)
    assert all(p.dtype == torch.float32 for p in one.values())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_of_another_shape_is_refused(tiny, tmp_path):
    tiny("llama", "lora").learner().weights.save(tmp_path)
    with pytest.raises(DamagedError) as caught:
        tiny("llama", "lora", targets=["q_proj"]).learner().weights.load(tmp_path)
    assert "these adapter weights do not match: ['base_model.model" in str(caught.value)


def test_the_state_comes_back(tmp_path):
    state = TrainState(
        step=7,
        samples=28,
        tokens=1000,
        labelled_tokens=500,
        dev_history=[[3, 2.5], [6, 0.1 + 0.2]],
        dev_pending=True,
        window=[[1.25, 0.5]],
        tokens_per_micro_batch=64,
        scaler={"scale": 65536.0, "_growth_tracker": 3},
        identity={"base": "x"},
        environment={"torch": "y"},
    )
    timing = Timing(training_seconds=1.5, peak_gpu_memory_bytes=7, first_started="t")
    write_state(state, timing, tmp_path)
    assert read_state(tmp_path) == (state, timing)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DamagedError):
        read_state(tmp_path)


def test_the_best_is_the_lowest_and_of_equals_the_first():
    state = TrainState(tokens_per_micro_batch=1)
    assert state.best is None
    assert state.evaluations_since_best() == 0
    state.dev_history = [[10, 2.0], [20, 1.0], [30, 1.0], [40, 1.5]]
    assert state.best == (20, 1.0)
    assert state.evaluations_since_best() == 2


def test_differences_say_what_was_and_what_is():
    assert differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == {
        "a": "1 -> nothing",
        "b": "2 -> 3",
        "c": "nothing -> 4",
    }
