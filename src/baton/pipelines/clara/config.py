"""One task of the matrix (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from baton.config.decode import at_least, between
from baton.eval.config import EvalConfig, GenerateConfig
from baton.train.config import AdapterConfig, ModelConfig, TrainConfig

StageName = Literal["stage1", "stage2", "stage3"]
STAGES: tuple[StageName, ...] = ("stage1", "stage2", "stage3")
System = Literal["clara", "text", "no_document"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How a document becomes vectors: `doc_max_length // compress_rate` of them."""

    doc_max_length: Annotated[int, at_least(1)] = 256
    compress_rate: Literal[4, 16, 32, 64, 128, 256] = 32

    def __post_init__(self) -> None:
        if self.doc_max_length < self.compress_rate:
            raise ValueError(
                f"doc_max_length ({self.doc_max_length}) must be at least compress_rate"
                f" ({self.compress_rate}), or a document becomes no vector at all"
            )

    @property
    def vectors(self) -> int:
        """Memory tokens, and so vectors, of a document."""
        return self.doc_max_length // self.compress_rate

    @property
    def encoder_tokens(self) -> int:
        """The most tokens of a document that the encoder reads: its text and three more."""
        return self.doc_max_length + 3


@dataclass(frozen=True, kw_only=True)
class ClaraData:
    """Rows of each stage, and which of them do not train.

    Attributes:
        held_out: this part of each file chooses the best checkpoint; of the last stage's, half of
            it is scored instead, unless `test` names rows to score.
        seed: of the split and of the paraphrase prompts.
    """

    stage1: str
    stage2: str
    stage3: str
    test: str | None = None
    held_out: Annotated[float, between(0.001, 0.9)] = 0.1
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class ClaraTrain(TrainConfig):
    """Training as everywhere; the micro-batch is said in samples.

    Attributes:
        batch_samples: of one optimizer step; 0 is the preset's, or 128 (stage 3: 32).
        micro_batch: samples at once, halved after running out of memory; 0 is the preset's, or 2.
        samples: train on the first so many rows; 0 is the preset's number, or all.
        preset: the guide's numbers for a GPU of so much memory, where the three above are 0.
        ce_average: over the labelled tokens of the whole batch, or (as the reference does, whose
            loss moves with the micro-batch) of each micro-batch.
        tokens_per_micro_batch: not set by hand; it follows from `micro_batch`.
    """

    sharding: Literal["none"] = "none"
    epochs: Annotated[float, between(0, 10_000)] = 1.0
    batch_samples: Annotated[int, at_least(0)] = 0
    micro_batch: Annotated[int, at_least(0)] = 0
    samples: Annotated[int, at_least(0)] = 0
    preset: Literal["off", "auto", "16gb", "40gb", "80gb"] = "off"
    ce_average: Literal["global", "microbatch"] = "global"
    tokens_per_micro_batch: Annotated[int, at_least(0)] = 0
    learning_rate: Annotated[float, between(0, 10)] = 1e-4
    schedule: Literal["cosine", "one_cycle", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, between(0, 1)] = 0.03
    min_lr_ratio: Annotated[float, between(0, 1)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_micro_batch:
            raise ValueError("tokens_per_micro_batch follows from micro_batch; set that")


@dataclass(frozen=True, kw_only=True)
class Stage3Train(ClaraTrain):
    """The end-to-end stage: a smaller batch, a small constant rate."""

    learning_rate: Annotated[float, between(0, 10)] = 5e-6
    schedule: Literal["cosine", "one_cycle", "linear", "constant"] = "constant"
    warmup_ratio: Annotated[float, between(0, 1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """Encoder and decoder learn to say what a document holds."""

    train: ClaraTrain = field(default_factory=ClaraTrain)
    max_length: Annotated[int, at_least(8)] = 2048
    qa_loss: bool = True
    mse_loss: bool = True
    mse_weight: Annotated[float, between(0, 1e6)] = 0.1

    def __post_init__(self) -> None:
        _require_a_loss(self.qa_loss, self.mse_loss)

    @property
    def documents(self) -> int:
        """In a prompt."""
        return 1


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """The encoder goes on; a decoder learns to answer from exactly `top_k` documents."""

    train: ClaraTrain = field(default_factory=ClaraTrain)
    max_length: Annotated[int, at_least(8)] = 2048
    top_k: Annotated[int, at_least(1)] = 5
    init_decoder: Literal["fresh", "stage1"] = "fresh"
    qa_loss: bool = True
    mse_loss: bool = True
    mse_weight: Annotated[float, between(0, 1e6)] = 0.1

    def __post_init__(self) -> None:
        _require_a_loss(self.qa_loss, self.mse_loss)

    @property
    def documents(self) -> int:
        """In a prompt."""
        return self.top_k


@dataclass(frozen=True, kw_only=True)
class Stage3:
    """A query reasoner learns to choose `top_k` of a row's documents, from the answers alone."""

    train: Stage3Train = field(default_factory=Stage3Train)
    max_length: Annotated[int, at_least(8)] = 1024
    top_k: Annotated[int, at_least(1)] = 5
    temperature: Annotated[float, between(1e-6, 1e6)] = 0.02
    upstream_topk_mask: bool = False

    @property
    def documents(self) -> int:
        """In a prompt."""
        return self.top_k


def _require_a_loss(qa_loss: bool, mse_loss: bool) -> None:
    if not (qa_loss or mse_loss):
        raise ValueError("qa_loss and mse_loss are both false, so there is nothing to learn")


StageConfig = Stage1 | Stage2 | Stage3


@dataclass(frozen=True, kw_only=True)
class ClaraGenerate(GenerateConfig):
    """As everywhere; `max_new_tokens` 0 is 64, or 128 where stage 2 is the last."""

    max_new_tokens: Annotated[int, at_least(0)] = 0


@dataclass(frozen=True, kw_only=True)
class ClaraEval(EvalConfig):
    """As everywhere; besides the trained model, text baselines answer the same rows."""

    generate: ClaraGenerate = field(default_factory=lambda: ClaraGenerate(batch_size=16))
    systems: list[System] = field(default_factory=lambda: ["clara", "text", "no_document"])

    def __post_init__(self) -> None:
        if "clara" not in self.systems or len(set(self.systems)) < len(self.systems):
            raise ValueError(f"systems must name clara, each once, got {self.systems}")


@dataclass(frozen=True, kw_only=True)
class Clara:
    """Train a compressor of documents, then its reader, then its retriever; score the answers.

    Attributes:
        until: the last stage that trains; those after it are passed over, and what the last one
            trained is scored.
    """

    model: ModelConfig
    data: ClaraData
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    adapter: AdapterConfig = field(
        default_factory=lambda: AdapterConfig(r=16, alpha=32, dropout=0.1, targets="all-linear")
    )
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    stage3: Stage3 = field(default_factory=Stage3)
    until: Literal["stage2", "stage3"] = "stage3"
    eval: ClaraEval = field(default_factory=ClaraEval)

    def __post_init__(self) -> None:
        if self.adapter.method == "full":
            raise ValueError("adapter.method: clara trains adapters; choose lora or qlora")
        self.eval.require_padded("clara's decoder reads vectors, which only that engine takes")
        if not self.eval.generate.max_new_tokens:
            tokens = 64 if self.until == "stage3" else 128
            generate = replace(self.eval.generate, max_new_tokens=tokens)
            object.__setattr__(self, "eval", replace(self.eval, generate=generate))

    @property
    def train(self) -> TrainConfig:
        """How the last stage trains."""
        return self.stage(self.until).train

    def stage(self, name: StageName) -> StageConfig:
        """The part of the configuration that belongs to a stage."""
        found: StageConfig = getattr(self, name)
        return found

    @property
    def trained(self) -> tuple[StageName, ...]:
        """The stages that train, in order."""
        return STAGES[: STAGES.index(self.until) + 1]

    def full_sample(self, name: StageName) -> int:
        """The most tokens that a sample of a stage can cost: prompt, answer and its documents."""
        stage = self.stage(name)
        document = self.memory.encoder_tokens + self.memory.vectors
        queries = 1 if name == "stage3" else 0
        return stage.max_length + (stage.documents + queries) * document
