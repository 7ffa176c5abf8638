"""Models of published shapes with random weights, and samples of random tokens to train them on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

QWEN25_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN25_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


class Samples:
    """A `TokenSource` of random tokens; `prompt_share` of each sample carries no loss."""

    def __init__(
        self, lengths: np.ndarray[Any, Any], vocabulary: int, prompt_share: float = 0.25
    ) -> None:
        self._lengths = lengths.astype(np.int64)
        self._prompts = np.maximum(8, (self._lengths * prompt_share).astype(np.int64))
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, indices: Any) -> Any:
        return self._lengths[indices]

    def labelled(self, indices: Any) -> Any:
        return self._lengths[indices] - self._prompts[indices]

    def sample(self, index: int) -> tuple[Any, int]:
        generator = np.random.default_rng(index)
        tokens = generator.integers(10, self._vocabulary - 900, self._lengths[index])
        return tokens, int(self._prompts[index])

    def labelled_sample(self, index: int) -> tuple[list[int], list[int]]:
        """Tokens and labels of a sample as transformers takes them: -100 for no label."""
        tokens, prompt = self.sample(index)
        return tokens.tolist(), [-100] * prompt + tokens[prompt:].tolist()


def question_lengths(count: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(0)
    drawn = np.exp(generator.standard_normal(count) * 0.6 + math.log(230))
    return np.clip(drawn, 32, 1024)


def weights(shape: Mapping[str, Any]) -> Path:
    """A folder with random bfloat16 weights of this shape, made once."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    folder = Path(tempfile.gettempdir()) / f"baton-bench-{shape['hidden_size']}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(
                Qwen2Config(max_position_embeddings=32768, **shape), dtype=torch.bfloat16
            )
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return folder
