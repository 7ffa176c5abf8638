"""What an experiment says about its model, adapter and training (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from baton.config.decode import at_least, between

RANDOM_NOTICE = (
    "RANDOM WEIGHTS: this model was built from a config, not trained before; its scores say"
    " nothing about quality"
)


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model of the Hugging Face Hub or of ModelScope, at a revision pinned in the plan."""

    source: Literal["huggingface", "modelscope"]
    name: str
    revision: str = "main"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class PathModel:
    """A model folder as `save_pretrained` writes it, tokenizer included."""

    source: Literal["path"]
    path: str
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """Random weights from a config, with a tokenizer trained on the task's own data.

    For smoke runs and benchmarks only: every record and report of such a run says so.
    `config` is what `AutoConfig.for_model` takes, `model_type` included; its `vocab_size`
    may exceed the tokenizer's.
    """

    source: Literal["random"]
    config: dict[str, Any]
    tokenizer_vocab: Annotated[int, at_least(300)] = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config.model_type is missing: name one, such as qwen2")
        vocab = self.config.get("vocab_size", self.tokenizer_vocab)
        if not isinstance(vocab, int):
            raise ValueError(f"config.vocab_size must be a whole number, got {vocab!r}")
        if vocab < self.tokenizer_vocab:
            raise ValueError(
                f"config.vocab_size must be at least tokenizer_vocab ({self.tokenizer_vocab}),"
                f" got {vocab}"
            )


ModelConfig = HubModel | PathModel | RandomModel


def pin_key(model: ModelConfig) -> str:
    """Under which name a plan keeps the commit of this model; empty where there is none."""
    if isinstance(model, HubModel) and model.source == "huggingface":
        return f"model:{model.name}@{model.revision}"
    return ""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """How much of the model learns: LoRA, LoRA over an NF4 base (QLoRA), or all of it."""

    method: Literal["lora", "qlora", "full"] = "lora"
    r: Annotated[int, at_least(1)] = 8
    alpha: Annotated[int, at_least(1)] = 32
    dropout: Annotated[float, between(0, 1)] = 0.0
    targets: list[str] | Literal["all-linear"] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything about training that changes its result, and how often it is saved.

    `batch_samples` is the effective batch of one optimizer step over all processes;
    `tokens_per_micro_batch` only decides how it is cut to fit into memory, and
    `activation_checkpointing` whether layers make their activations anew in the backward pass;
    where they are not given, a GPU's memory is measured and the fastest that fits is chosen, and
    a CPU gets micro-batches of 8,192 tokens. `compile` is for GPUs;
    with `deterministic` nothing is compiled, because a compiler chooses its kernels by timing.

    `sharding: full` is for what does not fit on one device: of weights, gradients and the
    optimizer's state each process keeps a share (FSDP2, ZeRO stage 3). Micro-batches are then of
    8,192 tokens and layers make their activations anew, unless the configuration says otherwise.
    """

    epochs: Annotated[float, between(0, 10_000)] = 3.0
    max_steps: Annotated[int, at_least(1)] | None = None
    batch_samples: Annotated[int, at_least(1)] = 16
    tokens_per_micro_batch: Annotated[int, at_least(1)] | None = None
    activation_checkpointing: bool | None = None
    sharding: Literal["none", "full"] = "none"
    compile: bool = True
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: Annotated[float, between(0, 10)] = 1e-4
    schedule: Literal["cosine", "one_cycle", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, between(0, 1)] = 0.1
    warmup_steps: Annotated[int, at_least(0)] | None = None
    min_lr_ratio: Annotated[float, between(0, 1)] = 0.0
    weight_decay: Annotated[float, between(0, 10)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: Annotated[float, between(0, 1e9)] = 1.0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    deterministic: bool = False
    seed: int = 42
    log_every_steps: Annotated[int, at_least(1)] = 10
    eval_every_steps: Annotated[int, at_least(1)] | None = None
    save_every_steps: Annotated[int, at_least(1)] = 200
    save_every_minutes: Annotated[float, between(0.01, 1e6)] | None = 10.0
    keep_last: Annotated[int, at_least(2)] = 2
    keep_every_steps: Annotated[int, at_least(1)] | None = None
    early_stop_patience: Annotated[int, at_least(1)] | None = None
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"epochs must be more than 0, got {self.epochs}")
        if self.sharding == "full" and self.optimizer != "adamw":
            raise ValueError(f"sharding: full needs optimizer: adamw, got {self.optimizer}")
        if self.sharding == "full" and self.precision == "fp16":
            raise ValueError("sharding: full needs precision bf16 or fp32, got fp16")


def require_shardable(train: TrainConfig, adapter: AdapterConfig) -> None:
    """Raises `ValueError` where weights that are to be shared out are in 4 bits."""
    if train.sharding == "full" and adapter.method == "qlora":
        raise ValueError(
            "train.sharding: full cannot share out 4-bit weights; use adapter.method lora or full,"
            " got qlora"
        )
