"""Peak memory of raft's training on one GPU: Qwen2.5-7B's shape, 4,096 tokens, batch 1, 2 and 4.

    python bench/gpu_raft_memory.py [--batches 1 2 4] [--steps 2] [--dropout 0.05]

Random weights in bfloat16 (the shape decides about memory, not the values), LoRA r 64 on all
linear layers, AdamW, each batch with and without activation checkpointing, through baton's own
loop. Two micro-batches a step, so that gradients are held while the second one runs. The guide
that raft follows gives about 18, 24 and 32 GB. `--tiny` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from baton.errors import ConfigError
from baton.handover import StopSignal
from baton.legs import this_runner, utc_now
from baton.record import LegRecord, Plan, TaskPlan
from baton.stage import Alone, Leg
from baton.store.local import LocalStore
from baton.train import attention
from baton.train.adapters import AdapterWeights, attach
from baton.train.config import AdapterConfig, TrainConfig
from baton.train.layers import compile_layers, is_compiled, recompute_layers
from baton.train.loop import Loop
from baton.train.loss import CausalLoss
from baton.train.precision import Precision
from baton.train.ranks import Ranks
from baton.train.stacked import stack_projections

QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
TINY = QWEN25_7B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
GUIDE_GB = {1: 18, 2: 24, 4: 32}
# A teacher's answer of about a thousand tokens at the end of a full row.
ANSWER_SHARE = 0.25
MICRO_BATCHES = 2


@dataclass(frozen=True)
class FullRows:
    """Rows of exactly `tokens` random tokens, a quarter of them the answer."""

    count: int
    tokens: int
    vocabulary: int

    def __len__(self) -> int:
        return self.count

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full(len(indices), self.tokens, dtype=np.int64)

    def labelled(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.lengths(indices) - self._prompt

    def sample(self, index: int) -> tuple[NDArray[np.int64], int]:
        rng = np.random.default_rng(index)
        return rng.integers(0, self.vocabulary, self.tokens), self._prompt

    @property
    def _prompt(self) -> int:
        return self.tokens - int(self.tokens * ANSWER_SHARE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args()
    ranks = Ranks.of(Alone())
    on_gpu = ranks.device.type == "cuda"
    if not on_gpu and not args.tiny:
        parser.error("needs a CUDA device; --tiny tries the script on a CPU")

    shape = TINY if args.tiny else QWEN25_7B
    started = time.monotonic()
    model = build(shape, args.dropout, ranks.device)
    total = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}; {total / 1e9:.2f} B parameters,")
    print(f"{learning / 1e6:.1f} M of them learn; built in {time.monotonic() - started:.0f} s")
    print(f"{'batch':>5} {'checkpointing':>13} {'peak GB':>8} {'reserved GB':>11}"
          f" {'guide GB':>8} {'s/step':>7} {'tokens/s':>9}")  # fmt: skip
    for checkpointing in (False, True):
        if checkpointing:
            recompute_layers(model.get_base_model())
        for batch in args.batches:
            run(model, batch, args.tokens, args.steps, ranks, shape, checkpointing)


def build(shape: dict[str, Any], dropout: float, device: torch.device) -> Any:
    """The base in bfloat16 on the device, frozen, with float32 adapters around it."""
    attention.register()
    values = dict(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with device:
        network = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.NAME
        )
    network.requires_grad_(False)
    adapter = AdapterConfig(r=64, alpha=128, dropout=dropout, targets="all-linear")
    model = attach(network, adapter, base_name="random", seed=0)
    stack_projections(model)
    if is_compiled(TrainConfig(), device):
        compile_layers(network)
    return model


def run(
    model: Any,
    batch: int,
    tokens: int,
    steps: int,
    ranks: Ranks,
    shape: dict[str, Any],
    checkpointing: bool,
) -> None:
    """Train a few steps at one setting and print a line about it."""
    on_gpu = ranks.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    samples = batch * MICRO_BATCHES
    config = TrainConfig(
        max_steps=steps,
        batch_samples=samples,
        tokens_per_micro_batch=batch * tokens,
        precision="bf16",
        learning_rate=1e-5,
        weight_decay=0.01,
        save_every_steps=steps + 1,
        save_every_minutes=None,
        log_every_steps=steps + 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            leg=leg_in(Path(folder)),
            ranks=ranks,
            config=config,
            model=model,
            weights=AdapterWeights(model),
            loss=CausalLoss(
                model.get_base_model(),
                compute_dtype=Precision.choose("bf16", ranks.device).dtype,
                compiled=is_compiled(config, ranks.device),
            ),
            train=FullRows(samples * steps, tokens, shape["vocab_size"]),
            dev=FullRows(0, tokens, shape["vocab_size"]),
        )
        try:
            loop.run()
        except ConfigError as error:
            print(f"{batch:5} {'yes' if checkpointing else 'no':>13} {str(error)[:60]}")
            return
        seconds = loop.timing.training_seconds / steps
        shrunk = loop.state.tokens_per_micro_batch != batch * tokens
    peak, reserved = (
        (torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9)
        if on_gpu
        else (float("nan"), float("nan"))
    )
    guide = GUIDE_GB.get(batch, float("nan"))
    print(
        f"{batch:5} {'yes' if checkpointing else 'no':>13} {peak:8.1f} {reserved:11.1f}"
        f" {guide:8} {seconds:7.2f} {samples * tokens / seconds:9,.0f}"
        + ("  ran out of memory and went on with half a micro-batch" if shrunk else ""),
        flush=True,
    )


def leg_in(folder: Path) -> Leg:
    """A leg of a task that exists nowhere else."""
    task = TaskPlan(name="memory", config={})
    plan = Plan(
        experiment="bench", pipeline="raft", digest="0", tasks=[task], created=utc_now(),
        baton_version="0",
    )  # fmt: skip
    record = LegRecord(
        task="memory", number=1, state="active", runner=this_runner(), started=utc_now(),
        position=[],
    )  # fmt: skip
    return Leg(
        plan=plan,
        task=task,
        config=None,
        record=record,
        store=LocalStore(folder),
        stop=StopSignal(),
        peers=Alone(),
        check_fence=lambda: None,
        now=utc_now,
    )


if __name__ == "__main__":
    main()
