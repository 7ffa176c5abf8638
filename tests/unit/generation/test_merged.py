"""A merged folder computes what the model in memory does, and that one stays as it was."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as progress

from baton.generation.merged import save_merged
from baton.train.adapters import attach
from baton.train.config import AdapterConfig
from baton.train.quantize import nf4

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
IDS = torch.arange(5, 25).unsqueeze(0)


@pytest.fixture(autouse=True)
def _no_bars():
    progress.disable_progress_bar()
    yield
    progress.enable_progress_bar()


def network(kind="qwen2", **values):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | values)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def trained(base, *, targets="all-linear"):
    adapter = AdapterConfig(method="lora", r=4, alpha=8, targets=targets)
    model = attach(base, adapter, base_name="base", seed=0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("mistral", {}),
    ],
)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_folder_computes_what_the_model_does(tmp_path, kind, values, method):
    model = network(kind, **values)
    if method == "lora":
        model = trained(model)
    expected = logits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_merged(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if method == "lora":
        with model.disable_adapter():
            assert not torch.allclose(logits(model), expected, atol=0.1), "the adapter counts"


def test_only_adapters_that_are_active_count(tmp_path):
    model = trained(network(), targets=["q_proj", "v_proj"])
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model)
    save_merged(model, tmp_path / "first")
    model.set_adapter("other")
    save_merged(model, tmp_path / "other")
    first, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("first", "other"))
    torch.testing.assert_close(logits(first), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(other), expected, atol=0.1)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_4_bit_base_is_written_unpacked(tmp_path, targets):
    network().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=nf4(torch.float32), dtype=torch.float32
    )
    model = trained(base, targets=targets)
    save_merged(model, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    # bitsandbytes' product on a CPU rounds a little; what 4 bits change is far more.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.02)
    with model.disable_adapter():
        unquantised = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert (logits(unquantised) - logits(model)).abs().max() > 0.1
    again = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj"]))
    assert "Linear4bit" not in str(again)


def test_weights_keep_their_precision(tmp_path):
    model = trained(network().to(torch.bfloat16))
    save_merged(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
