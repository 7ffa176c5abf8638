"""Tiny clara models, rows and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.pipelines.clara.batch import BySamples, ClaraSource
from baton.pipelines.clara.model import ClaraLearner, build
from baton.pipelines.clara.prompt import Prompter
from baton.train.base import train_tokenizer
from baton.train.config import AdapterConfig, PathModel
from baton.train.layers import recompute_layers

TEXTS = [
    "Arden lies on the river Wye. It was founded in 1250.",
    "Belmore is a town of weavers who grow flax, hops and a great many pears besides.",
    "Corwick stands empty.",
    "The millers of Dunford sold barley to the potters of Eskhaven for two hundred years.",
    "Falstead burnt down in 1407 and again in 1512; nobody knows why.",
]
QUESTIONS = ["When was Arden founded?", "Who lives in Belmore?", "What burnt?"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory):
    """`base("mistral")`: a folder with a tiny model and its tokenizer."""
    folders: dict[str, Path] = {}

    def make(kind: str = "mistral", **changes: Any) -> Path:
        key = kind + json.dumps(changes, sort_keys=True)
        if key not in folders:
            folder = tmp_path_factory.mktemp("base")
            tokenizer = train_tokenizer(TEXTS * 4 + QUESTIONS, vocab_size=400)
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                kind,
                **SIZES,
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                **changes,
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        # At the usual 0.02 every token looks the same.
                        parameter.mul_(6)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[key] = folder
        return folders[key]

    return make


@pytest.fixture(scope="session")
def learner(base):
    """`learner("stage3")`: a model with adapters whose B is not zero."""

    def make(
        stage: str = "stage1",
        *,
        kind: str = "mistral",
        vectors: int = 4,
        dropout: float = 0.0,
        checkpointing: bool = False,
        seed: int = 0,
        method: str = "lora",
        **changes: Any,
    ) -> ClaraLearner:
        folder = base(kind, **changes)
        from transformers import AutoTokenizer

        made = build(
            PathModel(source="path", path=str(folder)),
            AdapterConfig(method=method, r=4, alpha=8, dropout=dropout, targets="all-linear"),
            AutoTokenizer.from_pretrained(folder),
            stage=stage,
            vectors=vectors,
            encoder_tokens=35,
            base_folder=folder,
            revision="",
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            seed=seed,
        )
        if checkpointing:
            recompute_layers(made.network)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return made

    return make


class MemoryFile:
    """A token file in memory."""

    def __init__(self, rows: list[tuple[list[int], int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, indices: Any) -> np.ndarray:
        return np.array([len(self.rows[i][0]) for i in indices], dtype=np.int64)

    def labelled(self, indices: Any) -> np.ndarray:
        return np.array([len(self.rows[i][0]) - max(self.rows[i][1], 1) for i in indices])

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        tokens, prompt = self.rows[index]
        return np.array(tokens, dtype=np.int64), prompt


def source_of(learner: ClaraLearner, asks, *, queries: bool) -> ClaraSource:
    """Samples of (question, answer, numbers of documents in TEXTS)."""
    prompter = Prompter(learner.vocabulary)
    said = [(*prompter.question(q, len(d) if not queries else 2), a) for q, a, d in asks]
    source = ClaraSource.__new__(ClaraSource)
    source.turns = MemoryFile([(e.tokens, e.prompt) for e in prompter.encode(said, max_length=400)])
    source.lists = MemoryFile([(list(d), 0) for _, _, d in asks])
    ids = learner.vocabulary.encoder_ids(TEXTS)
    source.documents = MemoryFile([(i, len(i)) for i in ids])
    found = learner.vocabulary.encoder_ids([q for q, _, _ in asks])
    source.queries = MemoryFile([(i, len(i)) for i in found]) if queries else None
    source._most = None
    return source


def batching_of(learner: ClaraLearner, *, share: bool = False) -> BySamples:
    ids = learner.vocabulary.memory_ids
    return BySamples(
        device=torch.device("cpu"),
        full=100,
        memory_ids=(ids[0], ids[-1] + 1),
        share_documents=share,
        pad_to=None,
    )
