"""The medical_qa matrix on one GPU: a random-init Qwen2.5-3B, real rows, a preemption half-way.

    python bench/gpu_medical_qa.py --data medical_qa.csv --encoding gb18030 [--steps 60]

Submits `jobs/medical_qa.yaml` for LoRA and QLoRA with the model's real shape and random
weights, sends TERM to each task at half of its steps, lets the launcher resume it, and prints
what the eval records say: tokens a second of training, peak memory, legs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from sft_samples import QWEN25_3B

MODEL = QWEN25_3B | {"model_type": "qwen2", "max_position_embeddings": 32768}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="rows with title, ask, answer")
    parser.add_argument("--encoding", default="gb18030")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-samples", type=int, default=16)
    parser.add_argument("--store", type=Path, default=Path("runs/bench"))
    parser.add_argument("--set", action="append", default=[], help="passed on to baton submit")
    parser.add_argument("--site", default="local", help="a file in launch/, e.g. for two GPUs")
    parser.add_argument("--verify", action="store_true", help="run baton verify-resume as well")
    args = parser.parse_args()

    model = {"source": "random", "config": MODEL, "tokenizer_vocab": 16000}
    columns = {"question": ["title", "ask"], "answer": "answer"}
    settings = [
        f"model={json.dumps(model)}",
        f"data={json.dumps({'path': str(args.data), 'encoding': args.encoding})}",
        f"data.columns={json.dumps(columns)}",
        f"matrix.data.rows=[{args.rows}]",
        f"train.max_steps={args.steps}",
        f"train.batch_samples={args.batch_samples}",
        "train.eval_every_steps=1000000",
        "eval.max_samples=64",
        "eval.generate={max_new_tokens: 64, batch_size: 64}",
        *args.set,
    ]
    common = ["medical_qa", "--store", str(args.store)]
    for setting in settings:
        common += ["--set", setting]
    tasks = [f"lora_{args.rows}", f"qlora_{args.rows}"]
    drills = [word for t in tasks for word in ("--drill", f"{t}=TERM@{args.steps // 2}")]
    started = time.monotonic()
    submitted = subprocess.run(
        [sys.executable, "-m", "baton", "submit", *common, "--site", args.site, *drills]
    )
    wall = time.monotonic() - started
    if submitted.returncode:
        sys.exit(submitted.returncode)
    if args.verify:
        for task in tasks:
            subprocess.run(
                [sys.executable, "-m", "baton", "verify-resume", f"medical_qa/{task}", *common[1:]]
            )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, wall {wall:.0f} s in all")
    print(f"{'task':14} {'steps':>6} {'legs':>5} {'tok/s':>8} {'peak GiB':>9} {'gen tok/s':>10}")
    for path in sorted(args.store.glob("medical_qa/*/tasks/*/eval/eval.json")):
        record = json.loads(path.read_text())
        training, generation = record["training"], record["generation"]
        peak = training["peak_gpu_memory_bytes"] / 2**30
        print(
            f"{record['task']:14} {training['steps']:6} {training['legs']:5}"
            f" {training['tokens_per_s']:8,.0f} {peak:9.1f}"
            f" {generation['new_tokens_per_s']:10,.0f}"
        )


if __name__ == "__main__":
    main()
