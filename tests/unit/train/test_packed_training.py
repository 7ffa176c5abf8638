"""Packing changes nothing: each sample's loss and gradients are those it has alone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.errors import ModelError
from baton.train import attention
from baton.train.batch import PackedBatch, collate
from baton.train.config import AdapterConfig, PathModel
from baton.train.layers import recompute_layers
from baton.train.learner import build_learner
from baton.train.loss import CausalLoss

CPU = torch.device("cpu")
DENSE = [
    "qwen2",
    "qwen2 with a window in its upper layer",
    "llama",
    "mistral with a window of 4",
    "qwen3",
    "gpt_neox",
    "gemma",
    "gemma3 with a window of 4",
    "gpt2",
]


def alone(model, tokens, prompt):
    """Loss and gradients of one sample by transformers' own loss, summed over its labels."""
    ids = torch.tensor(tokens)[None]
    labels = ids.clone()
    labels[:, : max(prompt, 1)] = -100
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss * (
        len(tokens) - max(prompt, 1)
    )
    model.zero_grad()
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def only(batch: PackedBatch, keep: int) -> PackedBatch:
    """The same pack with the labels of one sample."""
    start = sum(batch.lengths[:keep])
    mine = (batch.predicts >= start) & (batch.predicts < start + batch.lengths[keep])
    return dataclasses.replace(batch, predicts=batch.predicts[mine], labels=batch.labels[mine])


def agree(ours, theirs, *, relative):
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        largest = their.abs().max()
        assert (our - their).abs().max() <= relative * max(largest, 1e-3)


def packed(source, order):
    return collate(source, order, device=CPU)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "full") for name in DENSE]
    + [(name, "lora") for name in DENSE if name != "gpt2"]
    + [("qwen2", "qlora"), ("mistral with a window of 4", "qlora"), ("gpt_neox", "qlora")],
)
def test_a_packed_sample_has_the_loss_and_the_gradients_it_has_alone(
    name, method, tiny, drawn, tmp_path
):
    model = tiny(name, method)
    learner = model.learner()
    learner.model.train()
    plain = model.plain(learner, tmp_path).train()
    source = drawn(4, high=24)
    loss = CausalLoss(learner.network, compute_dtype=torch.float32)
    batch = packed(source, [2, 0, 3, 1])
    for place, index in enumerate([2, 0, 3, 1]):
        expected, expected_gradients = alone(plain, *source.rows[index])
        learner.model.zero_grad()
        got = loss(only(batch, place))
        got.backward()
        assert got.item() == pytest.approx(expected, rel=1e-6)
        agree(gradients(learner.model), expected_gradients, relative=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_loss_of_a_pack_is_the_sum_over_its_samples(method, tiny, drawn, tmp_path):
    model = tiny("llama", method)
    learner = model.learner()
    plain = model.plain(learner, tmp_path)
    source = drawn(5)
    total, summed = 0.0, None
    for row in source.rows:
        value, parts = alone(plain, *row)
        total += value
        summed = parts if summed is None else [a + b for a, b in zip(summed, parts, strict=True)]
    got = CausalLoss(learner.network, compute_dtype=torch.float32)(packed(source, range(5)))
    learner.model.zero_grad()
    got.backward()
    assert got.item() == pytest.approx(total, rel=1e-6)
    agree(gradients(learner.model), summed, relative=1e-5)


def test_neighbours_and_their_order_do_not_touch_a_sample(tiny, drawn):
    learner = tiny("mistral with a window of 4").learner()
    loss = CausalLoss(learner.network, compute_dtype=torch.float32)
    source = drawn(6)
    with torch.no_grad():
        values = {
            order: loss(only(packed(source, order), order.index(0))).item()
            for order in [(0,), (0, 1), (1, 0), (3, 2, 0, 4), (4, 3, 5, 1, 2, 0)]
        }
    for order, value in values.items():
        assert value == pytest.approx(values[(0,)], rel=1e-6), order


def test_the_last_token_of_a_sample_does_not_predict_the_next_sample(samples):
    source = samples([([5, 6, 7], 1), ([8, 9], 0), ([10, 11, 12, 13], 3)])
    batch = packed(source, [0, 1, 2])
    assert batch.predicts.tolist() == [0, 1, 3, 7]
    assert batch.labels.tolist() == [6, 7, 9, 13]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert len(batch.labels) == source.labelled(range(3)).sum()


def test_checkpointed_activations_give_the_same_gradients(tiny, drawn):
    model = tiny("qwen2", "lora")
    batch = packed(drawn(3), range(3))
    found = []
    for checkpointing in (False, True):
        learner = model.learner()
        if checkpointing:
            recompute_layers(learner.network)
        learner.model.train()
        CausalLoss(learner.network, compute_dtype=torch.float32)(batch).backward()
        found.append(gradients(learner.model))
    agree(*found, relative=1e-6)


def build(folder: Path, kind: str, **values) -> PathModel:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(sizes | values))
    ).save_pretrained(folder)
    return PathModel(source="path", path=str(folder))


def train_once(model: PathModel, source) -> None:
    learner = build_learner(
        model,
        AdapterConfig(method="full"),
        base_folder=Path(model.path),
        revision="",
        device=CPU,
        compute_dtype=torch.float32,
        packed=True,
        seed=0,
    )
    CausalLoss(learner.network, compute_dtype=torch.float32)(packed(source, range(len(source))))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gemma2", {"head_dim": 8}),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_a_model_with_soft_capping_or_sinks_is_refused(kind, values, tmp_path, drawn):
    with pytest.raises(ModelError) as caught:
        train_once(build(tmp_path, kind, **values), drawn(2))
    name = {"gemma2": "Gemma2Attention", "gpt_oss": "GptOssAttention"}[kind]
    assert str(caught.value) == (
        f"{name} uses logit soft-capping or attention sinks, which packed training does not have;"
        " choose a model without them"
    )


LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("mamba", {"state_size": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
        ("qwen3_5_text", LINEAR),
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 4}),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    ],
)
def test_a_model_whose_layers_look_across_samples_is_refused(kind, values, tmp_path, drawn):
    with pytest.raises(ModelError):
        train_once(build(tmp_path, kind, **values), drawn(2))


def test_attention_without_lengths_is_one_causal_sample():
    query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
    out, weights = attention.packed_attention(torch.nn.Identity(), query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert weights is None
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-6)


def flash(q, k, v, *, cu_seq_q, window_size, scale, **_):
    """What the GPU's kernel does, and refuses, by torch's other attention."""
    if {q.dtype, k.dtype, v.dtype} - {torch.float16, torch.bfloat16}:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    assert window_size == (-1, 0)
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1)[None] for x in (q, k, v)),
            is_causal=True, scale=scale, enable_gqa=True,
        )[0].transpose(0, 1)
        for start, end in itertools.pairwise(cu_seq_q.tolist())
        if end > start
    ]  # fmt: skip
    return torch.cat(pieces)


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3", "gpt_neox", "gemma", "gpt2"])
def test_a_float32_model_trains_with_the_gpus_kernel_under_autocast(name, tiny, drawn, monkeypatch):
    # The kernel itself is in torch builds for CPUs, too, but runs on none.
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    learner = tiny(name, "full").learner()
    source = drawn(3)
    loss = CausalLoss(learner.network, compute_dtype=torch.bfloat16)
    found = []
    for pad_to in (None, 16):
        learner.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(collate(source, [0, 1, 2], device=CPU, pad_to=pad_to))
        value.backward()
        found.append((value.item(), gradients(learner.model)))
    (by_pieces, theirs), (by_kernel, ours) = found
    assert by_kernel == pytest.approx(by_pieces, rel=1e-3)
    agree(ours, theirs, relative=0.05)


def test_a_padded_pack_has_edges_and_pads_without_labels(samples):
    source = samples([([5, 6, 7], 1), ([8, 9], 0)])
    batch = collate(source, [0, 1], device=CPU, pad_to=8)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 8)
    assert batch.lengths == (3, 2, 3)
    assert batch.edges.dtype == torch.int32
    # The number of edges is a multiple, so that few shapes occur; empty samples fill it up.
    assert batch.edges.tolist() == [0, 3, 5, *[8] * 14]
    assert batch.labels.tolist() == [6, 7, 9]
    assert batch.longest >= 3


def test_pads_are_no_longer_than_a_sample_may_be(samples):
    # Beyond its longest sample the kernel writes nothing, not even zeros.
    source = samples([([1] * 600, 1)])
    batch = collate(source, [0], device=CPU, pad_to=4096)
    assert sum(batch.lengths) == 4096
    assert max(batch.lengths) <= batch.longest
