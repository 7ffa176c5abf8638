"""Tiny models, samples and legs for the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.distributed.tensor import distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from baton.handover import StopSignal
from baton.record import LegRecord, Plan, Runner, TaskPlan
from baton.stage import Alone, Leg
from baton.store.local import LocalStore
from baton.train.config import AdapterConfig, PathModel, TrainConfig
from baton.train.environment import environment_of
from baton.train.learner import Learner, build_learner
from baton.train.loop import Loop
from baton.train.loss import CausalLoss
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.train.sharding import ranks_to_shard_over

VOCAB = 97
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 with a window in its upper layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "llama": {"model_type": "llama"},
    "mistral with a window of 4": {"model_type": "mistral", "sliding_window": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma3 with a window of 4": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


@dataclass(frozen=True)
class Samples:
    """Samples in memory: a token source like any other."""

    rows: list[tuple[list[int], int]]

    @classmethod
    def drawn(cls, count: int, *, seed: int = 0, low: int = 6, high: int = 20) -> Samples:
        rng = np.random.default_rng(seed)
        rows = []
        for length in rng.integers(low, high, count).tolist():
            tokens = rng.integers(3, VOCAB, length).tolist()
            rows.append((tokens, int(rng.integers(1, length - 1))))
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.array([len(self.rows[i][0]) for i in indices], dtype=np.int64)

    def labelled(self, indices: np.ndarray) -> np.ndarray:
        rows = [self.rows[i] for i in indices]
        return np.array([len(tokens) - max(prompt, 1) for tokens, prompt in rows], dtype=np.int64)

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        tokens, prompt = self.rows[index]
        return np.array(tokens, dtype=np.int64), prompt


@dataclass(frozen=True)
class Tiny:
    """A tiny model in a folder, as baton trains it and as anybody else would load it."""

    folder: Path
    adapter: AdapterConfig

    def learner(
        self, *, dtype: torch.dtype = torch.float32, seed: int = 0, over: Ranks | None = None
    ) -> Learner:
        learner = build_learner(
            PathModel(source="path", path=str(self.folder)),
            self.adapter,
            base_folder=self.folder,
            revision="",
            device=CPU,
            compute_dtype=dtype,
            packed=True,
            seed=seed,
            over=over,
        )
        # LoRA's B is zero at the start, which would hide every gradient of A.
        generator = torch.Generator().manual_seed(1)
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.1
                if over is not None:
                    drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
                parameter.data.copy_(drawn)
        return learner

    def plain(self, learner: Learner, scratch: Path) -> torch.nn.Module:
        """The same weights, loaded by transformers and peft alone, with eager attention."""
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        if self.adapter.method == "qlora":
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        network = AutoModelForCausalLM.from_pretrained(self.folder, **options)
        for module in network.modules():
            # On some CPUs bitsandbytes would round its weights anew in eval mode.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if self.adapter.method == "full":
            return network
        learner.weights.save(scratch)
        return PeftModel.from_pretrained(network, scratch / "adapter", is_trainable=True)


def build(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    values = SIZES | MODELS[name] | changes
    kind = values.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # At the usual 0.02 every token looks the same and attention hardly matters.
                parameter.mul_(8)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Threads cost more than they bring at this size.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """`tiny("llama", "lora")`: the model of that name, built once a session."""
    folders: dict[str, Path] = {}

    def get(name: str = "qwen2", method: Any = "full", **adapter: Any) -> Tiny:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("model")
            build(name, folders[name])
        config = AdapterConfig(
            **({"method": method, "r": 4, "alpha": 8, "targets": "all-linear"} | adapter)
        )
        return Tiny(folders[name], config)

    return get


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Samples]:
    return Samples.drawn


@pytest.fixture(scope="session")
def samples() -> type[Samples]:
    return Samples


class Run:
    """A task in a folder, worked on leg by leg through `Loop`."""

    def __init__(self, root: Path, tiny: Tiny) -> None:
        self.root, self.tiny = root, tiny
        self.legs = 0
        self.stop = StopSignal()
        self.reports: list[dict[str, Any]] = []

    def leg(self, ranks: Ranks | None = None) -> Leg:
        self.legs += 1
        self.stop = StopSignal()
        task = TaskPlan(name="t", config={})
        record = LegRecord(
            task="t",
            number=self.legs,
            state="active",
            runner=Runner(host="h", pid=1, started_ticks=1, boot="b", pid_namespace="n"),
            started="2026-01-01T00:00:00Z",
            position=[],
        )
        plan = Plan(
            experiment="e",
            pipeline="p",
            digest="0" * 8,
            tasks=[task],
            created="2026-01-01T00:00:00Z",
            baton_version="0",
        )
        return Leg(
            plan=plan,
            task=task,
            config=None,
            record=record,
            store=LocalStore(self.root),
            stop=self.stop,
            peers=ranks or Alone(),
            check_fence=lambda: None,
            now=lambda: "2026-01-01T00:00:00Z",
            on_progress=lambda values: self.reports.append(dict(values)),
        )

    def loop(
        self,
        config: TrainConfig,
        train: Samples,
        dev: Samples | None = None,
        *,
        ranks: Ranks | None = None,
        wrap: Callable[..., Any] = lambda loss: loss,
        **options: Any,
    ) -> Loop:
        ranks = ranks or Ranks(0, 1, CPU)
        precision = Precision.choose(config.precision, CPU)
        over = ranks_to_shard_over(config, ranks)
        learner = self.tiny.learner(dtype=precision.dtype, over=over)
        loss = CausalLoss(learner.network, compute_dtype=precision.dtype)
        return Loop(
            leg=self.leg(ranks),
            ranks=ranks,
            config=config,
            model=learner.model,
            weights=learner.weights,
            loss=wrap(loss),
            train=train,
            dev=dev or Samples([]),
            sharded=learner.sharded,
            **({"environment": environment_of(ranks)} | options),
        )


@pytest.fixture
def task(tmp_path: Path, tiny: Callable[..., Tiny]) -> Callable[..., Run]:
    """`task("llama", "lora")`: an empty task folder with a tiny model to train."""
    count = 0

    def make(name: str = "qwen2", method: str = "full", root: Path | None = None) -> Run:
        nonlocal count
        count += 1
        root = root or tmp_path / f"task{count}"
        root.mkdir(exist_ok=True)
        return Run(root, tiny(name, method))

    return make


@pytest.fixture(scope="session")
def settings() -> Callable[..., TrainConfig]:
    """Training settings that make weights move within a few steps."""
    base = TrainConfig(
        batch_samples=4,
        tokens_per_micro_batch=40,
        learning_rate=1e-2,
        precision="fp32",
        log_every_steps=1,
        save_every_steps=1000,
        save_every_minutes=None,
    )
    return lambda **changes: replace(base, **changes)
