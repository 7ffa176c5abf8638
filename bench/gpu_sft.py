"""Supervised fine-tuning on a GPU: the training loop beside its peers, each in a fresh process.

    python bench/gpu_sft.py [lora_planned qlora_planned lora qlora lora_memory qlora_memory raft
                             raft_memory_1 raft_memory_2 raft_memory_4 raft_dropout
                             raft_memory_4_dropout
                             full full_sharded lora_sharded
                             reference trl trainer] [--steps 16] [--gpus 2]

Random weights of the published shape; samples of random tokens with lognormal lengths (median
230, sigma 0.6, 32 to 1,024), of which a quarter is prompt, or of 4,096 tokens for `raft`
(4 samples a step; `raft_memory_2` takes them 2 at a time, with activations made anew).
`full` trains all weights; `full_sharded` and `lora_sharded` share them out over the processes of
`--gpus` (with one process they are whole). The peak of memory is that of one process.
Prints, for each arm, real tokens a second after the first steps, the peak of memory, the wall
time with loading and compiling, and loss and gradient norm of the first step, which every arm
shares with `reference`: PEFT and transformers in float32. `trl` and `trainer` need those packages
(and liger-kernel); they train on the same samples at their best documented setting and at the
one that guides give.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
WARM_STEPS = 6


class Samples:
    """A `TokenSource` of random tokens."""

    def __init__(self, lengths: np.ndarray[Any, Any], vocabulary: int) -> None:
        self._lengths = lengths.astype(np.int64)
        self._prompts = np.maximum(8, self._lengths // 4)
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


def question_lengths(count: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(0)
    drawn = np.exp(generator.standard_normal(count) * 0.6 + math.log(230))
    return np.clip(drawn, 32, 1024)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training: `batch` samples a step, micro-batches of at most `budget` tokens.

    What is None is planned by the loop.
    """

    shape: Mapping[str, Any]
    method: str
    batch: int
    budget: int | None = None
    recompute: bool | None = False
    rank: int = 16
    length: int | None = None
    dropout: float = 0.0
    sharding: Literal["none", "full"] = "none"


RAFT = Arm(shape=QWEN25_7B, method="lora", batch=4, budget=16384, rank=64, length=4096)
ARMS = {
    "lora_planned": Arm(shape=QWEN25_3B, method="lora", batch=96, recompute=None),
    "qlora_planned": Arm(shape=QWEN25_3B, method="qlora", batch=96, recompute=None),
    "lora": Arm(shape=QWEN25_3B, method="lora", batch=96, budget=14336),
    "qlora": Arm(shape=QWEN25_3B, method="qlora", batch=96, budget=14336),
    "lora_memory": Arm(shape=QWEN25_3B, method="lora", batch=96, budget=10240, recompute=True),
    "qlora_memory": Arm(shape=QWEN25_3B, method="qlora", batch=96, budget=10240, recompute=True),
    "raft": RAFT,
    "raft_dropout": replace(RAFT, dropout=0.05),
    "raft_memory_4_dropout": replace(RAFT, recompute=True, dropout=0.05),
    "full": Arm(shape=QWEN25_3B, method="full", batch=96, budget=8192),
    "full_sharded": Arm(shape=QWEN25_3B, method="full", batch=96, budget=8192, sharding="full"),
    "lora_sharded": Arm(shape=QWEN25_3B, method="lora", batch=96, budget=14336, sharding="full"),
    **{
        f"raft_memory_{batch}": replace(RAFT, budget=4096 * batch, recompute=True)
        for batch in (1, 2, 4)
    },
}


def samples(arm: Arm, steps: int) -> Samples:
    count = arm.batch * (steps + 1)
    lengths = question_lengths(count) if arm.length is None else np.full(count, arm.length)
    return Samples(lengths, arm.shape["vocab_size"])


def build(arm: Arm, steps: int, on_progress: Callable[[Mapping[str, Any]], None]) -> Any:
    """The `Loop` that trains the arm, as in a task; with the folder it writes to."""
    import torch

    from baton.handover import StopSignal
    from baton.record import LegRecord, Plan, Runner, TaskPlan
    from baton.stage import Leg
    from baton.store.local import LocalStore
    from baton.train.config import AdapterConfig, PathModel, TrainConfig
    from baton.train.environment import environment_of
    from baton.train.layers import is_compiled
    from baton.train.learner import build_learner
    from baton.train.loop import Loop
    from baton.train.loss import CausalLoss
    from baton.train.ranks import Ranks
    from baton.train.sharding import ranks_to_shard_over

    ranks = Ranks.join()
    root = Path(ranks.broadcast(tempfile.mkdtemp()))
    task, started = TaskPlan(name="bench", config={}), "2026-01-01T00:00:00Z"
    runner = Runner(host="h", pid=1, started_ticks=1, boot="b", pid_namespace="n")
    leg = Leg(
        plan=Plan(
            experiment="bench",
            pipeline="medical_qa",
            digest="0" * 8,
            tasks=[task],
            created=started,
            baton_version="0",
        ),
        task=task,
        config=None,
        record=LegRecord(
            task="bench", number=1, state="active", runner=runner, started=started, position=[]
        ),
        store=LocalStore(root),
        stop=StopSignal(),
        peers=ranks,
        check_fence=lambda: None,
        now=lambda: started,
        on_progress=on_progress,
    )
    config = TrainConfig(
        max_steps=steps,
        batch_samples=arm.batch,
        tokens_per_micro_batch=arm.budget,
        activation_checkpointing=arm.recompute,
        sharding=arm.sharding,
        log_every_steps=1,
        save_every_steps=10_000,
        save_every_minutes=None,
        warmup_ratio=0.0,
    )
    learner = build_learner(
        PathModel(source="path", path=str(weights(arm.shape))),
        AdapterConfig(
            method=arm.method,
            r=arm.rank,
            alpha=2 * arm.rank,
            dropout=arm.dropout,
            targets="all-linear",
        ),
        base_folder=root,
        revision="",
        device=ranks.device,
        compute_dtype=torch.bfloat16,
        packed=True,
        seed=0,
        compiled=is_compiled(config, ranks.device),
        over=ranks_to_shard_over(config, ranks),
    )
    return Loop(
        leg=leg,
        ranks=ranks,
        config=config,
        model=learner.model,
        weights=learner.weights,
        loss=CausalLoss(learner.network, compute_dtype=torch.bfloat16),
        sharded=learner.sharded,
        train=samples(arm, steps),
        dev=Samples(np.empty(0), 1000),
        environment=environment_of(ranks),
    )


def train(arm: Arm, steps: int) -> dict[str, float]:
    """Real tokens a second after the first steps, and the first step's loss and norm."""
    import torch

    marks: dict[int, float] = {}
    tokens: dict[int, int] = {}

    def mark(values: Mapping[str, Any]) -> None:
        step = values.get("step")
        if step in (WARM_STEPS, steps) and step not in marks:
            torch.cuda.synchronize()
            marks[step], tokens[step] = time.monotonic(), loop.state.tokens

    loop = build(arm, steps, mark)
    loop.run()
    if not loop.leg.is_first:
        return {}
    log = loop.leg.folder / "train/metrics.jsonl"
    first = json.loads(log.read_text().splitlines()[0])
    # The checkpoint of an arm that trains all weights is as large as a disk is free.
    shutil.rmtree(loop.leg.folder)
    seconds = marks[steps] - marks[WARM_STEPS]
    return {
        "tokens_per_s": (tokens[steps] - tokens[WARM_STEPS]) / seconds,
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
    }


def reference(steps: int) -> dict[str, float]:
    """Loss and gradient norm of the first step of `lora`, by PEFT and transformers in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from baton.train.cursor import Cursor

    arm = ARMS["lora"]
    source = samples(arm, steps)
    model = AutoModelForCausalLM.from_pretrained(
        weights(arm.shape), dtype=torch.float32, device_map={"": 0}
    ).requires_grad_(False)
    torch.manual_seed(0)
    config = LoraConfig(
        r=arm.rank, lora_alpha=2 * arm.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    indices = Cursor(len(source), arm.batch, 42).at(0)
    labelled, total = int(source.labelled(indices).sum()), 0.0
    for index in indices:
        tokens, prompt = source.sample(int(index))
        ids = torch.tensor(tokens, device="cuda")[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="sum")
        (loss / labelled).backward()
        total += loss.item() / labelled
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {"loss": total, "grad_norm": float(torch.stack(norms).norm())}


def trl(steps: int) -> dict[str, float]:
    """TRL's SFTTrainer: packing, flex attention, Liger's fused loss, 8 packs of 1,024."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = peer_model("flex_attention")
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    rows = peer_rows(8 * 2 * (steps + 2) * 5)
    config = SFTConfig(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        packing=True,
        max_length=1024,
        use_liger_kernel=True,
        dataset_num_proc=1,
        gradient_checkpointing=False,
        **peer_settings(steps),
    )
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return peer_run(trainer, lambda inputs: int(inputs["input_ids"].numel()))


def trainer(steps: int) -> dict[str, float]:
    """HF's Trainer as guides set it: padded batches of 2, accumulated 8 times, checkpointing."""
    import torch
    from transformers import Trainer, TrainingArguments

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])

        return {
            "input_ids": padded("input_ids", 0),
            "attention_mask": padded("attention_mask", 0),
            "labels": padded("labels", -100),
        }

    model = peer_model("sdpa")
    model.enable_input_require_grads()
    args = TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
        **peer_settings(steps),
    )
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in peer_rows(16 * steps)]
    made = Trainer(model, args, train_dataset=rows, data_collator=collate)
    return peer_run(made, lambda inputs: int(inputs["attention_mask"].sum()))


def peer_model(attention: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        weights(QWEN25_3B),
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation=attention,
    )
    model.config.use_cache = False
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def peer_rows(count: int) -> list[dict[str, list[int]]]:
    source = Samples(question_lengths(count), QWEN25_3B["vocab_size"])
    rows = []
    for index in range(count):
        tokens, prompt = source.sample(index)
        ids = tokens.tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def peer_settings(steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "bf16": True,
        "learning_rate": 1e-4,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "optim": "adamw_torch_fused",
        "disable_tqdm": True,
    }


def peer_run(trainer: Any, count: Callable[[Any], int]) -> dict[str, float]:
    """Real tokens a second after the first steps."""
    import torch
    from transformers import TrainerCallback

    warm, seen, marks = 2, [0], []

    class Mark(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= warm:
                torch.cuda.synchronize()
                marks.append((time.monotonic(), seen[0]))

    original = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen[0] += count(inputs)
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    trainer.add_callback(Mark())
    trainer.train()
    (started, before), (ended, after) = marks[0], marks[-1]
    return {"tokens_per_s": (after - before) / (ended - started)}


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


def run_one(name: str, steps: int, gpus: int) -> None:
    import torch

    started = time.monotonic()
    if name in ARMS:
        found = train(replace(ARMS[name], batch=ARMS[name].batch * gpus), steps)
    else:
        found = {"reference": reference, "trl": trl, "trainer": trainer}[name](steps)
    found["wall_s"] = time.monotonic() - started
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print("RESULT " + json.dumps({"arm": name, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    peers = ["reference", "trl", "trainer"]
    parser.add_argument("arms", nargs="*", default=[*ARMS, *peers])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=1, help="processes; a step grows with them")
    parser.add_argument("--one", action="store_true", help="in this process, for one arm")
    args = parser.parse_args()
    if args.one:
        run_one(args.arms[0], args.steps, args.gpus)
        return
    print(f"{'arm':14} {'tokens/s':>9} {'peak GiB':>9} {'wall s':>7} {'loss':>8} {'norm':>8}")
    for name in args.arms:
        for gpus in sorted({1, args.gpus}):
            print(row(name, args.steps, gpus), flush=True)


def row(name: str, steps: int, gpus: int) -> str:
    """What an arm gave, as a line of the table; `gpus` processes with one GPU each."""
    command = [sys.executable, __file__, name, "--one", "--steps", str(steps), "--gpus", str(gpus)]
    shared = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if gpus > 1:
        shared |= {"WORLD_SIZE": str(gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if gpus > 1 else {}),
        )
        for rank in range(gpus)
    ]
    # The first speaks for all: the loop counts the tokens of every process.
    first, *_ = [process.communicate() for process in running]
    label = name if gpus == 1 else f"{name} x{gpus}"
    found = [line for line in first[0].splitlines() if line.startswith("RESULT ")]
    if running[0].returncode or not found:
        return f"{label:14} failed: {first[1].strip()[-800:]}"
    r = json.loads(found[0].removeprefix("RESULT "))
    speed = f"{r['tokens_per_s']:9,.0f}" if "tokens_per_s" in r else " " * 9
    gate = f"{r['loss']:8.4f} {r['grad_norm']:8.4f}" if "loss" in r else ""
    return f"{label:14} {speed} {r['peak_gib']:9.1f} {r['wall_s']:7.0f} {gate}"


if __name__ == "__main__":
    main()
