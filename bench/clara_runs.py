"""Whole tasks of clara on GPUs, through `baton run`: short of memory, and on several GPUs.

Part of `bench/gpu_clara.py`, which calls it. A model of random weights and rows of random words:
it is the machinery that is looked at.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("stage1", "stage2", "stage3")
EXPERIMENT = """\
pipeline: clara
model:
  source: random
  config: {model_type: mistral, hidden_size: WIDTH, intermediate_size: INNER,
           num_hidden_layers: LAYERS, num_attention_heads: 8, num_key_value_heads: 4,
           max_position_embeddings: 2048, sliding_window: null}
  tokenizer_vocab: 1024
memory: {doc_max_length: 256, compress_rate: 32}
data: {stage1: FOLDER/stage1.jsonl, stage2: FOLDER/stage2.jsonl, stage3: FOLDER/stage3.jsonl}
adapter: {r: 16, alpha: 32, dropout: 0.0}
stage1:
  max_length: 512
  train: &train {max_steps: 6, batch_samples: 16, micro_batch: 16, learning_rate: 1e-3,
    activation_checkpointing: false, compile: false, log_every_steps: 1, save_every_steps: 3}
stage2: {max_length: 512, top_k: 2, train: *train}
stage3: {max_length: 512, top_k: 2, train: *train}
eval: {generate: {max_new_tokens: 8}, systems: [clara]}
"""
# The share of the memory that a task took which it is then given.
SHORT = 0.6
# Set before anything is on the GPU; what torch then refuses is an ordinary lack of memory.
LIMITED = """\
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)))
from baton.cli import main
main()
"""


@dataclass(frozen=True)
class Run:
    """What came of a task: each stage's losses by step, and its summary; seconds of the whole."""

    losses: dict[str, list[float]]
    summaries: dict[str, dict[str, Any]]
    seconds: float
    output: str

    @property
    def peak_bytes(self) -> int:
        """The most GPU memory of any stage; 0 on a CPU."""
        return max(s["peak_gpu_memory_bytes"] or 0 for s in self.summaries.values())

    def differs_from(self, other: Run) -> float:
        """The largest relative difference of any step's loss in any stage."""
        return max(
            abs(ours - theirs) / theirs
            for stage in STAGES
            for ours, theirs in zip(self.losses[stage], other.losses[stage], strict=True)
        )


def memory(folder: Path, *, tiny: bool) -> None:
    """One task with all of the GPU, and the same with three fifths of what it took."""
    experiment = write(folder, tiny=tiny)
    print("\nout of memory: a micro-batch of 16 samples, through all three stages", flush=True)
    free = run(experiment, folder / "free")
    _say("all memory", free)
    if not free.peak_bytes:
        print("no GPU, so nothing to be short of", flush=True)
        return
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    short = run(experiment, folder / "short", fraction=SHORT * free.peak_bytes / total)
    _say(f"at most {SHORT * free.peak_bytes / 2**30:.2f} GiB", short)
    for line in short.output.splitlines():
        if "out of memory" in line:
            print(f"    {line}")
    print(f"largest difference of a step's loss: {short.differs_from(free):.1e}", flush=True)


def ranks(folder: Path, processes: int, *, tiny: bool) -> None:
    """One task in one process and in several, one a GPU."""
    experiment = write(folder, tiny=tiny)
    print(f"\n{processes} processes, through all three stages", flush=True)
    alone = run(experiment, folder / "alone")
    _say("1 process", alone)
    together = run(experiment, folder / "together", processes=processes)
    _say(f"{processes} processes", together)
    print(f"largest difference of a step's loss: {together.differs_from(alone):.1e}", flush=True)


def write(folder: Path, *, tiny: bool) -> Path:
    """Rows of random words, 64 a stage, and the experiment; returns its path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(400)]

    def some(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    documents = [some(20 if tiny else 100) for _ in range(40)]
    rows: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for _ in range(64):
        document = [rng.choice(documents)]
        pair = {"question": [some(6)], "answers": [some(10 if tiny else 80)], "docs": document}
        rows["stage1"].append({"data_type": "qa"} | pair)
        for stage, count in (("stage2", 2), ("stage3", 4)):
            ask = {"question": some(6), "gold_answer": some(4), "pos_index": [0]}
            rows[stage].append(ask | {"docs": rng.sample(documents, count)})
    for stage, some_rows in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in some_rows)
        (folder / f"{stage}.jsonl").write_text(lines, encoding="utf-8")
    text = EXPERIMENT.replace("FOLDER", str(folder))
    sizes = {"WIDTH": (64, 1024), "INNER": (128, 2816), "LAYERS": (2, 12)}
    for name, (small, large) in sizes.items():
        text = text.replace(name, str(small if tiny else large))
    path = folder / "runs.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def run(experiment: Path, store: Path, *, processes: int = 1, fraction: float = 0.0) -> Run:
    """A task to the end of stage 3. Raises `SystemExit` with the task's words if it fails."""
    start = ["-c", LIMITED, str(fraction)] if fraction else ["-m", "baton"]
    command = [
        sys.executable, *start, "run", str(experiment), "--store", str(store),
        "--stage", "stage3", "--processes", str(processes),
    ]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(
        command,
        env=os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended in {done.returncode}\n{done.stdout[-4000:]}")
    [task] = store.glob("runs/*/tasks/runs")
    losses, summaries = {}, {}
    for stage in STAGES:
        lines = (task / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        losses[stage] = [values["loss"] for values in found if "loss" in values]
        summaries[stage] = json.loads((task / stage / "summary.json").read_bytes())
    return Run(losses, summaries, time.monotonic() - started, done.stdout)


def _say(name: str, run: Run) -> None:
    ends = ", ".join(f"{values[0]:.4f} to {values[-1]:.4f}" for values in run.losses.values())
    print(f"{name:20} {run.seconds:5.0f} s, peak {run.peak_bytes / 2**30:5.2f} GiB, losses {ends}",
          flush=True)  # fmt: skip
