"""One pretraining run (no torch in here)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from baton.config.decode import Count, at_least, between
from baton.data.config import PairConfig
from baton.eval.config import EvalConfig
from baton.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FolderTokenizer:
    """A tokenizer's folder, as `baton data t5 tokenizer` or `save_pretrained` writes it."""

    source: Literal["path"] = "path"
    path: str


@dataclass(frozen=True, kw_only=True)
class OwnTokenizer:
    """A byte-level BPE of `vocab` tokens, trained on the first `rows` training pairs."""

    source: Literal["train"] = "train"
    vocab: Annotated[int, at_least(300)] = 29_298
    rows: Annotated[Count, at_least(1)] = 500_000


@dataclass(frozen=True, kw_only=True)
class T5Shape:
    """The shape of the model; its vocabulary and special tokens are the tokenizer's.

    `source: random` is for smoke runs and benchmarks: every record of one says that its
    scores mean nothing.
    """

    source: Literal["scratch", "random"] = "scratch"
    d_model: Annotated[int, at_least(1)] = 768
    d_ff: Annotated[int, at_least(1)] = 3072
    d_kv: Annotated[int, at_least(1)] = 64
    num_heads: Annotated[int, at_least(1)] = 12
    num_layers: Annotated[int, at_least(1)] = 10
    num_decoder_layers: Annotated[int, at_least(1)] = 10
    feed_forward: Literal["relu", "gated-gelu", "gated-silu"] = "relu"
    dropout: Annotated[float, between(0, 1)] = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class T5TrainConfig(TrainConfig):
    """Training as everywhere, with the batch as people say it.

    `batch_samples`, the samples of one optimizer step, is `batch_size` x `accumulation` x
    `gpus`, whatever number of processes a leg has: it is not set by hand.

    Attributes:
        tokens_per_micro_batch: pads count; 0 takes what `batch_size` pairs of full length need.
        pad_to: widths are rounded up to a multiple of this, so that few shapes occur.
        fixed_shapes: every micro-batch of one width has as many rows, and compiled blocks are
            made for each shape by itself rather than for any.
        low_memory: read little ahead, pin no memory, give back what was read; same results.
    """

    sharding: Literal["none"] = "none"
    batch_size: Annotated[int, at_least(1)] = 32
    accumulation: Annotated[int, at_least(1)] = 2
    gpus: Annotated[int, at_least(1)] = 3
    batch_samples: Annotated[int, at_least(0)] = 0
    tokens_per_micro_batch: Annotated[int, at_least(0)] = 0
    activation_checkpointing: bool | None = False
    pad_to: Annotated[int, at_least(1)] = 8
    fixed_shapes: bool = False
    low_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        product = self.batch_size * self.accumulation * self.gpus
        if self.batch_samples not in (0, product):
            raise ValueError(
                f"batch_samples is batch_size x accumulation x gpus = {product}, got"
                f" {self.batch_samples}; set those three"
            )
        object.__setattr__(self, "batch_samples", product)


@dataclass(frozen=True, kw_only=True)
class DevScoreConfig:
    """What is generated at each dev evaluation; the best checkpoint is the best by its BLEU.

    Attributes:
        samples: so many validation pairs, the first ones; 0 chooses by dev loss instead.
        max_new_tokens: None is `data.max_seq_len`.
    """

    samples: Annotated[int, at_least(0)] = 256
    batch_size: Annotated[int, at_least(1)] = 64
    max_new_tokens: Annotated[int, at_least(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class T5Pretrain:
    """Pretrain a T5 on prompt-response pairs and score what it generates."""

    model: T5Shape = field(default_factory=T5Shape)
    tokenizer: OwnTokenizer | FolderTokenizer = field(default_factory=OwnTokenizer)
    data: PairConfig
    train: T5TrainConfig = field(default_factory=T5TrainConfig)
    dev_score: DevScoreConfig = field(default_factory=DevScoreConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if not self.train.tokens_per_micro_batch:
            tokens = self.train.batch_size * 2 * self.data.max_seq_len
            object.__setattr__(self, "train", replace(self.train, tokens_per_micro_batch=tokens))
        full = 2 * self.data.max_seq_len
        if self.train.tokens_per_micro_batch < full:
            raise ValueError(
                f"train.tokens_per_micro_batch must hold one pair of full length ({full} tokens),"
                f" got {self.train.tokens_per_micro_batch}"
            )
        self.eval.require_padded("an encoder-decoder model is answered by transformers alone")
