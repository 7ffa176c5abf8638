"""Supervised fine-tuning on a GPU: the training loop beside its peers, each in a fresh process.

    python bench/gpu_sft.py [lora_planned qlora_planned trl unsloth ...] [--steps 16] [--gpus 2]

Ours: lora_planned, qlora_planned, lora, qlora, lora_memory, qlora_memory, lora_deterministic,
raft, raft_memory_1, raft_memory_2, raft_memory_4, raft_dropout, raft_memory_4_dropout, full,
full_sharded, lora_sharded. Peers, each of which needs its package (and `trl` liger-kernel): trl,
trl_qlora, unsloth, unsloth_qlora, trainer, trainer_qlora, trainer_guide. Without names: all.

Random weights of the published shape; samples of random tokens with lognormal lengths (median
230, sigma 0.6, 32 to 1,024), of which a quarter is prompt, or of 4,096 tokens for `raft`
(4 samples a step; `raft_memory_2` takes them 2 at a time, with activations made anew).
`full` trains all weights; `full_sharded` and `lora_sharded` share them out over the processes of
`--gpus` (with one process they are whole). The peak of memory is that of one process.
Prints, for each arm, real tokens a second after the first steps, the peak of memory, the wall
time with loading and compiling, and loss and gradient norm of the first step beside those that
PEFT and transformers have in float32 for the same samples: `off` where they lie further apart than
16 bits explain. The exit status is then 1, and if an arm fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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

from sft_peers import PEERS, keep_first_step, reference
from sft_samples import QWEN25_3B, QWEN25_7B, Samples, question_lengths, weights

WARM_STEPS = 6
REFERENCE = "reference"
# How far 16 bits, 4-bit weights and other random adapters may move the first step.
TOLERANCES = {"loss": 2e-3, "grad_norm": 3e-2}


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
    prompt_share: float = 0.25
    sharding: Literal["none", "full"] = "none"
    deterministic: bool = False


RAFT = Arm(
    shape=QWEN25_7B,
    method="lora",
    batch=4,
    budget=16384,
    rank=64,
    length=4096,
    # Documents and a question, then the teacher's answer.
    prompt_share=3000 / 4096,
)
ARMS = {
    "lora_planned": Arm(shape=QWEN25_3B, method="lora", batch=96, recompute=None),
    "qlora_planned": Arm(shape=QWEN25_3B, method="qlora", batch=96, recompute=None),
    "lora": Arm(shape=QWEN25_3B, method="lora", batch=96, budget=14336),
    "qlora": Arm(shape=QWEN25_3B, method="qlora", batch=96, budget=14336),
    "lora_memory": Arm(shape=QWEN25_3B, method="lora", batch=96, budget=10240, recompute=True),
    "qlora_memory": Arm(shape=QWEN25_3B, method="qlora", batch=96, budget=10240, recompute=True),
    "lora_deterministic": Arm(
        shape=QWEN25_3B, method="lora", batch=96, budget=14336, deterministic=True
    ),
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
    return Samples(lengths, arm.shape["vocab_size"], arm.prompt_share)


def bench_leg(ranks: Any, on_progress: Callable[[Mapping[str, Any]], None]) -> Any:
    """A leg of a task by itself, in a folder that is its store."""
    from baton.handover import StopSignal
    from baton.record import LegRecord, Plan, Runner, TaskPlan
    from baton.stage import Leg
    from baton.store.local import LocalStore

    root = Path(ranks.broadcast(tempfile.mkdtemp()))
    task, started = TaskPlan(name="bench", config={}), "2026-01-01T00:00:00Z"
    runner = Runner(host="h", pid=1, started_ticks=1, boot="b", pid_namespace="n")
    return Leg(
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


def build(arm: Arm, steps: int, on_progress: Callable[[Mapping[str, Any]], None]) -> Any:
    """The `Loop` that trains the arm, as in a task; with the folder it writes to."""
    import torch

    from baton.train.config import AdapterConfig, PathModel, TrainConfig
    from baton.train.environment import environment_of, make_deterministic
    from baton.train.layers import is_compiled
    from baton.train.learner import build_learner
    from baton.train.loop import Loop
    from baton.train.loss import CausalLoss
    from baton.train.ranks import Ranks
    from baton.train.sharding import ranks_to_shard_over

    if arm.deterministic:
        make_deterministic()
    ranks = Ranks.join()
    leg = bench_leg(ranks, on_progress)
    config = TrainConfig(
        max_steps=steps,
        batch_samples=arm.batch,
        tokens_per_micro_batch=arm.budget,
        activation_checkpointing=arm.recompute,
        sharding=arm.sharding,
        deterministic=arm.deterministic,
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
        base_folder=leg.folder,
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


def train(arm: Arm, steps: int, first: Path) -> dict[str, float]:
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
    keep_first_step(
        first,
        [loop.train.labelled_sample(int(index)) for index in loop.cursor.at(0)],
        shape=arm.shape,
        method=arm.method,
        rank=arm.rank,
    )
    log = loop.leg.folder / "train/metrics.jsonl"
    logged = json.loads(log.read_text().splitlines()[0])
    # The checkpoint of an arm that trains all weights is as large as a disk is free.
    shutil.rmtree(loop.leg.folder)
    seconds = marks[steps] - marks[WARM_STEPS]
    return {
        "tokens_per_s": (tokens[steps] - tokens[WARM_STEPS]) / seconds,
        "loss": logged["loss"],
        "grad_norm": logged["grad_norm"],
    }


def run_one(name: str, steps: int, gpus: int, first: Path) -> None:
    import torch

    started = time.monotonic()
    if name == REFERENCE:
        found = reference(first)
    elif name in PEERS:
        found = PEERS[name](steps, first)
    else:
        found = train(replace(ARMS[name], batch=ARMS[name].batch * gpus), steps, first)
    found["wall_s"] = time.monotonic() - started
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print("RESULT " + json.dumps({"arm": name, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*ARMS, *PEERS]
    parser.add_argument("arms", nargs="*", default=names, metavar="arm")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=1, help="processes; a step grows with them")
    parser.add_argument("--no-reference", action="store_true", help="compare with nothing")
    parser.add_argument("--one", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args.arms[0], args.steps, args.gpus, args.one)
        return
    if unknown := sorted(set(args.arms) - set(names)):
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(names)}")
    print(f"{'arm':21} {'tokens/s':>9} {'peak GiB':>9} {'wall s':>7} {'loss':>8} {'float32':>8}"
          f" {'norm':>8} {'float32':>8}")  # fmt: skip
    is_right = True
    for name in args.arms:
        for gpus in sorted({1, args.gpus}):
            line, is_so = row(name, args.steps, gpus, may_compare=not args.no_reference)
            print(line, flush=True)
            is_right &= is_so
    sys.exit(0 if is_right else 1)


def row(name: str, steps: int, gpus: int, *, may_compare: bool) -> tuple[str, bool]:
    """What an arm gave, as a line of the table, and whether it did what it should."""
    label = name if gpus == 1 else f"{name} x{gpus}"
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.json"
        found, error = in_processes(name, steps, gpus, first)
        if found is None:
            return f"{label:21} failed: {error}", False
        beside = referred(first) if may_compare else None
    line = (
        f"{label:21} {found['tokens_per_s']:9,.0f} {found['peak_gib']:9.1f} {found['wall_s']:7.0f}"
    )
    if beside is None:
        return f"{line} {found['loss']:8.4f} {'':8} {found['grad_norm']:8.4f}", True
    is_near = all(
        abs(found[figure] - beside[figure]) <= tolerance * beside[figure]
        for figure, tolerance in TOLERANCES.items()
    )
    compared = "".join(f" {found[f]:8.4f} {beside[f]:8.4f}" for f in TOLERANCES)
    return f"{line}{compared}{'' if is_near else ' off'}", is_near


def referred(first: Path) -> dict[str, Any]:
    """The reference for a first step; worked out once for each."""
    digest = hashlib.sha256(first.read_bytes()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"baton-bench-reference-{digest}.json"
    if not kept.exists():
        found, error = in_processes(REFERENCE, 1, 1, first)
        if found is None:
            sys.exit(f"the reference failed: {error}")
        kept.write_text(json.dumps(found), encoding="utf-8")
    return dict(json.loads(kept.read_bytes()))


def in_processes(
    name: str, steps: int, gpus: int, first: Path
) -> tuple[dict[str, Any] | None, str]:
    """The result of an arm, in `gpus` processes with one GPU each; or the end of what it said."""
    command = [sys.executable, __file__, name, "--one", str(first)]
    command += ["--steps", str(steps), "--gpus", str(gpus)]
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
    said, *_ = [process.communicate() for process in running]
    results = [line for line in said[0].splitlines() if line.startswith("RESULT ")]
    if running[0].returncode or not results:
        return None, said[1].strip()[-800:]
    return json.loads(results[0].removeprefix("RESULT ")), ""


if __name__ == "__main__":
    main()
