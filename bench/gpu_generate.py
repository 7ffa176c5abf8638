"""Generation on one GPU: the paged engine beside transformers' own ways, each in a fresh process.

    python bench/gpu_generate.py [paged paged_lora paged_qlora paged_sampled same same_fp32
                                  single padded16 padded128 batching]

Random weights of Qwen2.5-3B's shape in bfloat16; 256 prompts of 16 to 256 tokens (a quarter of
lognormal lengths, median 230); every answer is 192 new tokens, greedy. `paged_lora` has an
adapter of r 16 on all linear layers attached, `paged_qlora` over an NF4 base; `paged_sampled`
draws at temperature 0.7, top-p 0.8, top-k 20. Prints new tokens a second without loading, the
first run (which captures the graphs) beside the second, and the peak of memory. `same` lists how
far greedy answers of the paged engine and of a padded batch agree, and how close the two tokens
were where they first differ; `same_fp32` does it in float32. `single`, `padded16` and
`padded128` are `model.generate`; `batching` is `model.generate_batch` with paged SDPA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

PROMPTS, NEW = 256, 192
PEERS = ["single", "padded16", "padded128", "batching"]
OURS = ["paged", "paged_lora", "paged_qlora", "paged_sampled"]


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    drawn = np.exp(generator.standard_normal(PROMPTS) * 0.6 + math.log(230))
    lengths = np.maximum(16, np.clip(drawn, 32, 1024).astype(int) // 4)
    return [generator.integers(10, 151_000, n).tolist() for n in lengths]


def load(method: str | None, attention: str = "sdpa") -> Any:
    import torch

    from sft_samples import QWEN25_3B, weights

    place = weights(QWEN25_3B)
    if method is None:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation=attention
        ).eval()
    from baton.train.config import AdapterConfig, PathModel
    from baton.train.learner import build_learner

    learner = build_learner(
        PathModel(source="path", path=str(place)),
        AdapterConfig(method=method, r=16, alpha=32, targets="all-linear"),
        base_folder=place,
        revision="",
        device=torch.device("cuda", 0),
        compute_dtype=torch.bfloat16,
        packed=False,
        seed=0,
    )
    for name, parameter in learner.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return learner.model.eval()


def paged(name: str) -> dict[str, float]:
    import torch

    from baton.eval.config import Sampling
    from baton.generation.engine import Engine, Request

    method = {"paged_lora": "lora", "paged_qlora": "qlora"}.get(name)
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=20) if name == "paged_sampled" else None
    requests = [Request(prompt=p, seed=i) for i, p in enumerate(prompts())]
    longest = max(len(r.prompt) for r in requests)
    engine = Engine(
        load(method),
        most_tokens=longest + NEW,
        max_new_tokens=NEW,
        ends=[],
        sampling=sampling,
    )
    rates = []
    for _ in range(3):
        started = time.monotonic()
        written = sum(len(tokens) for _, tokens in engine.run(requests))
        torch.cuda.synchronize()
        rates.append(written / (time.monotonic() - started))
    return {"new_tokens_per_s": max(rates[1:]), "first_run": rates[0]}


def padded(batch: int) -> dict[str, float]:
    import torch

    model = load(None)
    everything = prompts()
    for round_ in range(2):
        chosen = everything[round_ * batch : (round_ + 1) * batch]
        torch.cuda.synchronize()
        started = time.monotonic()
        greedy(model, chosen)
        torch.cuda.synchronize()
        seconds = time.monotonic() - started
    return {"new_tokens_per_s": len(chosen) * NEW / seconds}


def greedy(model: Any, chosen: list[list[int]]) -> list[list[int]]:
    import torch

    width = max(map(len, chosen))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in chosen]).cuda()
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chosen]).cuda()
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, width:].tolist()  # type: ignore[no-any-return]


def batching() -> dict[str, float]:
    import torch
    from transformers import GenerationConfig

    model = load(None, "paged|sdpa")
    model.config.use_cache = True

    def settings(new: int) -> Any:
        return GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )

    model.generate_batch(prompts()[:32], generation_config=settings(8))
    started = time.monotonic()
    found = model.generate_batch(prompts(), generation_config=settings(NEW))
    torch.cuda.synchronize()
    written = sum(len(answer.generated_tokens) for answer in found.values())
    return {"new_tokens_per_s": written / (time.monotonic() - started)}


def same(dtype: str) -> dict[str, float]:
    """How far the answers of two engines agree."""
    import torch

    from baton.generation.engine import Engine, Request

    model = load(None).to(getattr(torch, dtype))
    chosen = prompts()[:32]
    engine = Engine(model, most_tokens=512, max_new_tokens=NEW, ends=[])
    ours = dict(engine.run([Request(prompt=p) for p in chosen]))
    theirs = greedy(model, chosen)
    gaps, equal = [], []
    for number, prompt in enumerate(chosen):
        pairs = enumerate(zip(ours[number], theirs[number], strict=True))
        first = next((place for place, (a, b) in pairs if a != b), NEW)
        equal.append(first)
        if first == NEW:
            continue
        said = torch.tensor([prompt + theirs[number][:first]]).cuda()
        with torch.inference_mode():
            logits = model(said, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        a, b = ours[number][first], theirs[number][first]
        gaps.append(abs(float(logits[a] - logits[b])) / float(logits.std()))
    return {
        "identical": sum(n == NEW for n in equal),
        "of": len(chosen),
        "mean_common_tokens": float(np.mean(equal)),
        "widest_gap_in_standard_deviations": max(gaps, default=0.0),
    }


def run_one(name: str) -> None:
    import torch

    if name in OURS:
        found = paged(name)
    elif name.startswith("same"):
        found = same("bfloat16" if name == "same" else "float32")
    elif name == "batching":
        found = batching()
    else:
        found = padded({"single": 1, "padded16": 16, "padded128": 128}[name])
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print("RESULT " + json.dumps({"arm": name, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="*", default=[*OURS, "same", "same_fp32", *PEERS])
    parser.add_argument("--one", action="store_true", help="in this process, for one arm")
    args = parser.parse_args()
    if args.one:
        run_one(args.arms[0])
        return
    for name in args.arms:
        command = [sys.executable, __file__, name, "--one"]
        done = subprocess.run(
            command, env=os.environ, capture_output=True, text=True, timeout=300, check=False
        )
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not results:
            print(f"{name}: failed\n{done.stderr[-3000:]}", flush=True)
            continue
        found = json.loads(results[0].removeprefix("RESULT "))
        values = " ".join(f"{k}={v:,.2f}" for k, v in found.items() if k != "arm")
        print(f"{name:14} {values}", flush=True)


if __name__ == "__main__":
    main()
