"""The T5 of a run: built from its shape and its tokenizer, or loaded for answering."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from baton.config.decode import encode
from baton.pipelines.t5_pretrain.config import T5Pretrain, T5Shape
from baton.stage import Leg
from baton.train.base import load_tokenizer
from baton.train.biased import can_fuse, fuse
from baton.train.config import PathModel
from baton.train.layers import is_compiled
from baton.train.learner import Learner
from baton.train.precision import Precision
from baton.train.seq2seq import compile_blocks
from baton.train.state import FullWeights
from baton.tuning.model import BASE


def t5_config(shape: T5Shape, tokenizer: Any) -> T5Config:
    """transformers' configuration; every special id is the tokenizer's, the decoder starts on pad.

    `tokenizer` needs `pad_token_id`, `eos_token_id` and a length.
    """
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        d_kv=shape.d_kv,
        num_heads=shape.num_heads,
        num_layers=shape.num_layers,
        num_decoder_layers=shape.num_decoder_layers,
        feed_forward_proj=shape.feed_forward,
        dropout_rate=shape.dropout,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True, kw_only=True)
class PairModel:
    """The model of the task in `folder`."""

    config: T5Pretrain
    folder: Path

    @classmethod
    def of(cls, leg: Leg) -> PairModel:
        return cls(config=leg.config, folder=leg.folder)

    def tokenizer(self) -> Any:
        """The one that the task's data stage trained, or copied from where the experiment says."""
        base = self.folder / BASE
        return load_tokenizer(PathModel(source="path", path=str(base)), base_folder=base)

    def description(self) -> dict[str, str]:
        """The model as records name it."""
        shape = self.config.model
        layers = f"{shape.num_layers} + {shape.num_decoder_layers} layers"
        return {"source": shape.source, "name": f"T5, {layers} of {shape.d_model}"}

    def learner(self, device: torch.device, *, packed: bool) -> Learner:
        """The model with random weights, drawn from the shape's seed: to train, or to load into.

        Weights are float32 masters for training (`packed`) and, where training computes in
        bfloat16, that for generation.
        """
        config = self.config
        said = t5_config(config.model, self.tokenizer())
        # On the CPU whatever the device is: the same seed draws the same weights everywhere.
        torch.manual_seed(config.model.seed)
        network = T5ForConditionalGeneration(said)
        dtype = Precision.choose(config.train.precision, device).dtype
        if not packed and dtype == torch.bfloat16:
            network = network.to(dtype)
        network = network.to(device)
        compiled = packed and is_compiled(config.train, device)
        if compiled:
            if can_fuse(device, dtype):
                fuse(network)
            compile_blocks(network, dynamic=False if config.train.fixed_shapes else None)
        identity = {"shape": encode(config.model), "vocabulary": said.vocab_size}
        return Learner(
            network=network,
            model=network,
            weights=FullWeights(network),
            base_fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
            compiled=compiled,
        )
