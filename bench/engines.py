"""Do the engines answer alike? Greedy answers of each beside those of transformers, one by one.

    python bench/engines.py [paged padded vllm] [--dtype float32 bfloat16]

A fixed set of 64 prompts of 4 to 200 tokens (seed 7), 64 new tokens, a Qwen2 of 2 layers with
random weights and a LoRA adapter on all linear layers; on the GPU if there is one. For each
engine: how many answers are identical, and every one that is not, with the place where it parts
and how far apart the two tokens were there, in standard deviations of the logits. Rounding parts
them at near-ties only; the exit status is 1 if a wider gap is met. `vllm` wants vLLM in this
environment, or in the Python that BATON_VLLM_PYTHON names.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.generation.engine import Engine, Request
from baton.generation.vllm import Vllm
from baton.train.adapters import attach
from baton.train.config import AdapterConfig

PROMPTS, LONGEST, NEW, VOCABULARY = 64, 200, 64, 2000
ENDS = list(range(5, VOCABULARY, 200))
# What rounding moves logits by, with room: float32 sums, and 8 bits of bfloat16.
WIDEST = {"float32": 1e-3, "bfloat16": 0.2}


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    lengths = generator.integers(4, LONGEST, PROMPTS)
    return [generator.integers(10, VOCABULARY, n).tolist() for n in lengths]


def network(dtype: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(device, getattr(torch, dtype))
    adapter = AdapterConfig(method="lora", r=8, alpha=16, targets="all-linear")
    model = attach(model, adapter, base_name="random", seed=0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def one_by_one(model: Any, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    return list(said[0, len(prompt) :].tolist())


def padded(model: Any, asked: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """All at once, padded on the left."""
    width = max(map(len, asked))
    ids = torch.zeros((len(asked), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(asked):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    said = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=ENDS,
        pad_token_id=0,
    )[:, width:].tolist()
    ended = (next((i + 1 for i, t in enumerate(row) if t in ENDS), len(row)) for row in said)
    return {number: row[:end] for number, (row, end) in enumerate(zip(said, ended, strict=True))}


def answers(engine: str, model: Any, asked: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    requests = [Request(prompt=prompt) for prompt in asked]
    limits: dict[str, Any] = {
        "most_tokens": LONGEST + NEW,
        "max_new_tokens": NEW,
        "ends": ENDS,
    }
    if engine == "padded":
        return padded(model, asked)
    if engine == "paged":
        made = Engine(model, rows=16, **limits)
        found = dict(made.run(requests))
        made.close()
        return found
    with tempfile.TemporaryDirectory() as folder:
        return dict(Vllm(model, Path(folder) / "model", **limits).run(requests))


def gap(
    model: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int], at: int
) -> float:
    ids = torch.tensor([[*prompt, *theirs[:at]]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    return float((logits[ours[at]] - logits[theirs[at]]).abs() / logits.std())


def compare(engine: str, dtype: str, device: torch.device) -> bool:
    """Print how one engine's answers differ; true if only where two tokens were near a tie."""
    model, asked = network(dtype, device), prompts()
    with torch.inference_mode():
        expected = [one_by_one(model, prompt) for prompt in asked]
        found = answers(engine, model, asked)
    lines, widest = [], 0.0
    for number, (prompt, theirs) in enumerate(zip(asked, expected, strict=True)):
        ours = found[number]
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:
            assert ours == theirs, f"prompt {number}: one answer is a part of the other"
            continue
        apart = gap(model, prompt, ours, theirs, at)
        widest = max(widest, apart)
        lines.append(
            f"    prompt {number} ({len(prompt)} tokens): token {at} is {ours[at]}, not"
            f" {theirs[at]}; {apart:.5f} apart"
        )
    print(f"{engine} {dtype}: {PROMPTS - len(lines)} of {PROMPTS} identical", *lines, sep="\n")
    return widest <= WIDEST[dtype]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="*", default=["padded", "paged", "vllm"])
    parser.add_argument("--dtype", nargs="+", default=list(WIDEST), choices=list(WIDEST))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPUs"
    print(f"{name}, Python {platform.python_version()}, torch {torch.__version__}")
    alike = [compare(engine, dtype, device) for dtype in args.dtype for engine in args.engines]
    return 0 if all(alike) else 1


if __name__ == "__main__":
    sys.exit(main())
