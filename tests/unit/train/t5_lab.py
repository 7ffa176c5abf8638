"""Tiny T5s, pairs in memory and loops over them, for tests in one process and in several."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from transformers import T5ForConditionalGeneration

from baton.pipelines.t5_pretrain.config import T5Shape, T5TrainConfig
from baton.pipelines.t5_pretrain.model import t5_config
from baton.train.environment import environment_of
from baton.train.loop import Loop
from baton.train.ranks import Ranks
from baton.train.seq2seq import Padded, Seq2SeqLoss
from baton.train.state import FullWeights

CPU = torch.device("cpu")
PAD, EOS, VOCAB = 5, 9, 97
TINY = T5Shape(
    d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2, dropout=0.1
)
CONFIG = T5TrainConfig(
    batch_size=2,
    accumulation=2,
    gpus=1,
    tokens_per_micro_batch=64,
    learning_rate=1e-2,
    precision="fp32",
    log_every_steps=1,
    save_every_steps=1000,
    save_every_minutes=None,
    warmup_steps=2,
)


class Vocabulary(SimpleNamespace):
    """As much of a tokenizer as a model's configuration asks for; its ids are not T5's own."""

    def __len__(self) -> int:
        return VOCAB


def network(shape=TINY):
    torch.manual_seed(0)
    config = t5_config(shape, Vocabulary(pad_token_id=PAD, eos_token_id=EOS))
    return T5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Pairs:
    """Pairs in memory: a token source like any other."""

    rows: list[tuple[list[int], int]]

    @classmethod
    def drawn(cls, count, *, seed=0, longest=14):
        rng = np.random.default_rng(seed)
        rows = []
        for prompt, response in rng.integers(2, longest, (count, 2)).tolist():
            tokens = rng.integers(10, VOCAB, prompt + response)
            tokens[[prompt - 1, -1]] = EOS
            rows.append((tokens.tolist(), prompt))
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, indices):
        return np.array([len(self.rows[i][0]) for i in indices], dtype=np.int64)

    def labelled(self, indices):
        rows = [self.rows[i] for i in indices]
        return np.array([len(tokens) - prompt for tokens, prompt in rows], dtype=np.int64)

    def sample(self, index):
        tokens, prompt = self.rows[index]
        return np.array(tokens, dtype=np.int64), prompt


def padded(**options):
    return Padded(device=CPU, pad=PAD, start=PAD, **options)


def loop_of(run, config, train, *, shape=TINY, ranks=None, **options):
    """A loop over `train` in the task folder of `run`."""
    ranks = ranks or Ranks(0, 1, CPU)
    net = network(shape)
    defaults = {
        "dev": Pairs([]),
        "batching": padded(),
        "environment": environment_of(ranks),
    }
    return Loop(
        leg=run.leg(ranks),
        ranks=ranks,
        config=config,
        model=net,
        weights=FullWeights(net),
        loss=Seq2SeqLoss(net, compute_dtype=torch.float32),
        train=train,
        **(defaults | options),
    )
