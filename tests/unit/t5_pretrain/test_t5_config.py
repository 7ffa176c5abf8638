"""What an experiment may say about a T5, and the model it stands for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import T5ForConditionalGeneration

from baton.config.decode import decode, encode
from baton.errors import ConfigError
from baton.pipelines.t5_pretrain.config import T5Pretrain, T5Shape
from baton.pipelines.t5_pretrain.model import t5_config
from baton.plan import build_plan, select


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HOME", str(Path(__file__).parents[3]))


def configs(*settings: str) -> dict[str, T5Pretrain]:
    plan = build_plan(select("t5_pretrain", settings).experiment, created="now")
    return {task.name: decode(T5Pretrain, task.config) for task in plan.tasks}


class Vocabulary(SimpleNamespace):
    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(("vocab", "parameters"), [(29_298, 187_692_288), (40_960, 196_648_704)])
def test_the_model_of_the_experiment_has_exactly_so_many_parameters(
    vocab: int, parameters: int
) -> None:
    shape = configs()["10m"].model
    assert shape == T5Shape()
    vocabulary = Vocabulary(size=vocab, pad_token_id=7, eos_token_id=8)
    with torch.device("meta"):
        network = T5ForConditionalGeneration(t5_config(shape, vocabulary))
    assert network.num_parameters() == parameters
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.config.decoder_start_token_id == network.config.pad_token_id == 7
    assert network.config.eos_token_id == 8


def test_the_templates_are_those_of_the_guide() -> None:
    found = {
        name: (config.train.epochs, config.train.save_every_steps)
        for name, config in configs().items()
    }
    assert found == {"1m": (5, 2000), "5m": (4, 3000), "10m": (3, 5000), "50m": (2, 10_000)}
    for config in configs().values():
        train = config.train
        assert (train.batch_size, train.accumulation, train.batch_samples) == (32, 2, 192)
        assert (train.learning_rate, train.warmup_steps, train.clip_norm) == (1e-4, 1024, 1.0)
        assert (train.log_every_steps, train.keep_last) == (100, 5)
        assert config.data.max_seq_len == 192
        assert train.tokens_per_micro_batch == 32 * 2 * 192


def test_without_its_matrix_the_experiment_is_the_10m_template() -> None:
    [(name, alone)] = configs("matrix.template=null").items()
    assert name == "t5_pretrain"
    assert alone == configs()["10m"]


def test_fields_can_be_overridden_and_what_follows_from_them_follows() -> None:
    train = configs("train.batch_size=24")["10m"].train
    assert train.batch_samples == 24 * 2 * 3
    assert train.tokens_per_micro_batch == 24 * 2 * 192
    config = configs(
        "train.optimizer=adafactor",
        "train.schedule=one_cycle",
        "train.learning_rate=3e-4",
        "train.low_memory=true",
        "train.tokens_per_micro_batch=73728",
        "model.num_layers=4",
        "tokenizer={source: path, path: tok}",
    )["5m"]
    assert (config.train.optimizer, config.train.schedule) == ("adafactor", "one_cycle")
    assert (config.train.learning_rate, config.train.low_memory) == (3e-4, True)
    assert config.train.tokens_per_micro_batch == 73_728
    assert config.model.num_layers == 4
    assert decode(T5Pretrain, encode(config)) == config
    # What a template says, too.
    templates = configs("train.epochs=1", "train.save_every_steps=7")
    assert {(c.train.epochs, c.train.save_every_steps) for c in templates.values()} == {(1, 7)}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ("train.batch_samples=100",),
            "batch_samples is batch_size x accumulation x gpus = 192, got 100; set those three",
        ),
        (
            ("train.tokens_per_micro_batch=100",),
            "train.tokens_per_micro_batch must hold one pair of full length (384 tokens), got 100",
        ),
        (("data.valid_share=0",), "valid_share must be more than 0 where no valid file is given"),
        (("data.columns={prompt: a}",), "columns must map prompt and response to columns"),
    ],
)
def test_what_cannot_be_is_said(settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs(*settings)
    assert says in str(caught.value)


def test_both_files_of_pairs_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "response": "x"}}\n')
    settings = ("data.hub=null", f"data.path={tmp_path}/train.jsonl", "matrix.template=null")
    settings = (*settings, f"data.valid={tmp_path}/valid.jsonl")

    def digest() -> str:
        return build_plan(select("t5_pretrain", settings).experiment, created="now").digest

    before = digest()
    assert digest() == before
    (tmp_path / "valid.jsonl").write_text('{"prompt": "other", "response": "x"}\n')
    assert digest() != before
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        digest()
    assert f"data.valid: there is no file {tmp_path}/valid.jsonl" in str(caught.value)
