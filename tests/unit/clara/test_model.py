"""Roles, rows, sizes: what of the model learns, and how it is saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clara_lab import QUESTIONS, batching_of, source_of
from transformers import AutoConfig, AutoModelForCausalLM

from baton.config.decode import decode
from baton.errors import ConfigError, DamagedError
from baton.pipelines.clara.config import Clara, Stage2
from baton.pipelines.clara.losses import ReadingLoss, RetrievalLoss
from baton.pipelines.clara.model import ENCODER, LEARNS, MEMORY, REASONER, ROLES
from baton.pipelines.clara.presets import PRESETS, Preset, chosen, loop_config, preset_for
from baton.train.adapters import attach
from baton.train.batching import Whole
from baton.train.config import AdapterConfig
from baton.train.optim import Schedule

RANDOM = {"source": "random", "config": {"model_type": "mistral"}}
DATA = {"stage1": "1", "stage2": "2", "stage3": "3"}
ASKS = [(q, "an answer", (0, 2)) for q in QUESTIONS]


def config(**changes) -> Clara:
    return decode(Clara, {"model": RANDOM, "data": DATA, **changes})


# --- sizes --------------------------------------------------------------------------------------


def test_an_adapter_of_mistral_7b_has_41_943_040_weights() -> None:
    shape = AutoConfig.for_model(
        "mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    adapter = config().adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.targets) == (
        16, 32, 0.1, "all-linear"
    )  # fmt: skip
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        model = attach(network, adapter, base_name="m", seed=0, names=ROLES["stage3"])
    counts = Counter()
    for name, parameter in model.named_parameters():
        for role in ROLES["stage3"]:
            counts[role] += parameter.numel() * (f".{role}." in name)
    assert counts == dict.fromkeys(ROLES["stage3"], 41_943_040)


@pytest.mark.parametrize(
    ("rate", "vectors"), [(4, 64), (16, 16), (32, 8), (64, 4), (128, 2), (256, 1)]
)
def test_a_document_has_its_length_by_the_rate_of_vectors(rate, vectors) -> None:
    assert config(memory={"compress_rate": rate}).memory.vectors == vectors


def test_rates_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="compress_rate"):
        config(memory={"compress_rate": 8})
    with pytest.raises(ConfigError, match="becomes no vector at all"):
        config(memory={"compress_rate": 256, "doc_max_length": 128})


# --- defaults -----------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    task = config()
    for name, batch, length, top_k in (
        ("stage1", 128, 2048, 1), ("stage2", 128, 2048, 5), ("stage3", 32, 1024, 5)
    ):  # fmt: skip
        stage = task.stage(name)
        train = stage.train
        assert (stage.max_length, stage.documents) == (length, top_k)
        assert chosen(train, name, "off") == Preset(
            batch_samples=batch, micro_batch=2, samples=None
        )
        assert (train.betas, train.weight_decay, train.clip_norm) == ((0.9, 0.95), 0.0, 1.0)
        assert (train.epochs, train.seed, train.ce_average) == (1.0, 42, "global")
        if name != "stage3":
            assert (train.learning_rate, train.schedule) == (1e-4, "cosine")
            assert (train.warmup_ratio, train.min_lr_ratio) == (0.03, 0.1)
            assert (stage.mse_loss, stage.qa_loss, stage.mse_weight) == (True, True, 0.1)
    assert (task.stage3.train.learning_rate, task.stage3.train.schedule) == (5e-6, "constant")
    assert (task.stage3.temperature, task.stage3.upstream_topk_mask) == (0.02, False)
    assert (task.stage2.init_decoder, task.data.held_out) == ("fresh", 0.1)
    assert (task.memory.doc_max_length, task.memory.compress_rate) == (256, 32)
    assert task.eval.generate.max_new_tokens == 64
    assert task.eval.generate.sampling is None
    assert config(until="stage2").eval.generate.max_new_tokens == 128
    given = config(until="stage2", eval={"generate": {"max_new_tokens": 9}}).eval.generate
    assert given == replace(task.eval.generate, max_new_tokens=9)


def test_an_adapter_keeps_the_defaults_that_are_not_overridden() -> None:
    whole = config().adapter
    assert replace(whole, r=8) == config(adapter={"r": 8}).adapter
    assert (whole.method, whole.alpha) == ("lora", 32)


def test_three_steps_with_one_of_warm_up_use_these_rates() -> None:
    train = loop_config(config(), "stage1", chosen(config().stage1.train, "stage1", "off"))
    schedule = Schedule.of(train, 3)
    assert schedule.warmup_steps == 1
    assert [schedule.at(step) for step in range(4)] == pytest.approx([0, 1e-4, 5.5e-5, 1e-5])
    constant = loop_config(config(), "stage3", chosen(config().stage3.train, "stage3", "off"))
    assert [Schedule.of(constant, 3).at(step) for step in range(3)] == [5e-6] * 3


def test_presets_go_by_memory_and_what_is_set_wins() -> None:
    assert [preset_for(gb) for gb in (8, 15.9, 24, 39.6, 47, 79.1, 141)] == [
        "16gb", "16gb", "16gb", "40gb", "40gb", "80gb", "80gb"
    ]  # fmt: skip
    assert {k: (p.batch_samples, p.micro_batch, p.samples) for k, p in PRESETS.items()} == {
        "16gb": (32, 1, 200), "40gb": (64, 2, 500), "80gb": (128, 2, 1000)
    }  # fmt: skip
    own = config(stage1={"train": {"batch_samples": 48, "samples": 7}}).stage1.train
    assert chosen(own, "stage1", "16gb") == Preset(batch_samples=48, micro_batch=1, samples=7)
    assert chosen(config().stage3.train, "stage3", "80gb").batch_samples == 32


def test_a_micro_batch_is_told_to_the_loop_in_tokens_of_full_samples() -> None:
    task = config(stage2={"top_k": 3})
    full = 2048 + 3 * (259 + 8)
    sizes = chosen(task.stage2.train, "stage2", "off")
    assert loop_config(task, "stage2", sizes).tokens_per_micro_batch == 2 * full
    with pytest.raises(ConfigError, match="follows from micro_batch"):
        config(stage1={"train": {"tokens_per_micro_batch": 100}})


# --- what learns --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_only_the_roles_of_a_stage_and_the_memory_rows_learn(learner, stage, kind) -> None:
    tied = {"tie_word_embeddings": True} if kind == "qwen2" else {}
    model = learner(stage, kind=kind, **tied)
    before = {n: p.clone() for n, p in model.model.state_dict().items()}
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    asks = [(q, a, (0, 2, 3) if stage == "stage3" else d) for q, a, d in ASKS]
    source = source_of(model, asks, queries=stage == "stage3")
    if stage == "stage3":
        loss = RetrievalLoss(model, decode_stage3(), compute_dtype=torch.float32)
    else:
        loss = ReadingLoss(model, Stage2(top_k=2), compute_dtype=torch.float32)
    indices = np.arange(3)
    whole = Whole(3, int(source.labelled(indices).sum()))
    for _ in range(2):
        loss.part(batching_of(model).collate(source, indices, budget=0), whole).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.model.state_dict().items() if not torch.equal(p, before[n])}
    roles = {role for role in ROLES["stage3"] for n in changed if f".{role}." in n}
    assert roles == set(LEARNS[stage])
    assert {n for n in changed if "lora" not in n} == {"base_model.model.model.embed_tokens.memory"}
    memory = model.embedding.memory
    moved = (memory != before["base_model.model.model.embed_tokens.memory"]).any(dim=1)
    assert moved.all(), "each memory row learns"


def decode_stage3():
    from baton.pipelines.clara.config import Stage3

    return Stage3(top_k=2)


def test_the_embedding_looks_up_old_rows_in_the_base_and_new_ones_in_its_own(learner) -> None:
    model = learner("stage1")
    embedding, first = model.embedding, model.vocabulary.first
    with torch.no_grad():
        embedding.memory.fill_(7.0)
    ids = torch.tensor([[3, first, first - 1, first + 3, first + 4, first + 6]])
    rows = embedding(ids)
    assert torch.equal(rows[0, [0, 2]], embedding.weight[[3, first - 1]])
    assert (rows[0, [1, 3]] == 7.0).all()
    assert torch.equal(rows[0, [4, 5]], embedding.weight[[first + 4, first + 6]])
    assert not (embedding.weight[first:] == 7.0).any(), "a tied head keeps its rows"


def test_roles_switch_and_come_back(learner) -> None:
    model = learner("stage3")
    ids = torch.tensor([[1, 2, 3]])

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return model.network(input_ids=ids, packed_lengths=(3,)).logits

    with model.roles.using(ENCODER):
        encoder = hidden()
        with model.roles.using(REASONER):
            assert not torch.equal(hidden(), encoder)
        assert torch.equal(hidden(), encoder)
    with model.roles.using(None):
        plain = hidden()
    with model.model.disable_adapter():
        assert torch.equal(hidden(), plain)


def test_weights_come_back_and_others_are_refused(learner, tmp_path: Path) -> None:
    saved, other = learner("stage2", seed=1), learner("stage2", seed=2)
    saved.weights.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["decoder", "encoder", MEMORY]
    other.weights.load(tmp_path)
    theirs = other.model.state_dict()
    for name, tensor in saved.model.state_dict().items():
        if "base_layer" not in name and "embed_tokens.base" not in name:
            assert torch.equal(tensor, theirs[name]), name
    with pytest.raises(DamagedError, match=r"memory\.safetensors: holds .*memory \(4, 32\)"):
        learner("stage2", vectors=2).weights.load(tmp_path)


def test_the_query_reasoner_can_start_from_the_encoder(learner, tmp_path: Path) -> None:
    earlier, later = learner("stage2", seed=1), learner("stage3", seed=2)
    earlier.weights.save(tmp_path)
    later.weights.start_from(tmp_path, ENCODER, REASONER)
    wanted = earlier.parameters_of(ENCODER)
    for ours, theirs in zip(later.parameters_of(REASONER), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_stage_without_any_loss_is_refused(stage) -> None:
    with pytest.raises(ConfigError, match="qa_loss and mse_loss are both false"):
        config(**{stage: {"qa_loss": False, "mse_loss": False}})


def test_full_fine_tuning_is_refused() -> None:
    with pytest.raises(ConfigError, match="clara trains adapters"):
        config(adapter={"method": "full"})


def test_an_nf4_base_trains_as_well(learner) -> None:
    model = learner("stage2", method="qlora")
    loss = ReadingLoss(model, Stage2(top_k=2), compute_dtype=torch.float32)
    source = source_of(model, ASKS, queries=False)
    indices = np.arange(3)
    whole = Whole(3, int(source.labelled(indices).sum()))
    value = loss.part(batching_of(model).collate(source, indices, budget=0), whole)
    value.backward()
    assert torch.isfinite(value)
    assert all(p.grad is not None for p in model.parameters_of(ENCODER))
    assert isinstance(config(adapter={"method": "qlora"}).adapter, AdapterConfig)
