"""A small T5 from random weights on a few thousand pairs: does it learn, and by which curves?

    python bench/t5_learns.py --train chat_train_3k.parquet --valid chat_valid_1k.parquet

Trains a tokenizer and a model on the training pairs with `baton run` and prints the dev loss and
the character BLEU of every evaluation, the step that was kept as the best, and some answers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

EXPERIMENT = """\
pipeline: t5_pretrain
data: {{path: {train}, valid: {valid}, max_seq_len: 64}}
tokenizer: {{source: train, vocab: 2048}}
model: {{d_model: 128, d_ff: 512, d_kv: 32, num_heads: 4, num_layers: 2, num_decoder_layers: 2}}
train:
  epochs: {epochs}
  batch_size: 32
  accumulation: 1
  gpus: 1
  learning_rate: 2e-3
  warmup_steps: 100
  log_every_steps: 20
  eval_every_steps: 94
  save_every_steps: 94
dev_score: {{samples: 128, batch_size: 64}}
eval: {{generate: {{max_new_tokens: 64, batch_size: 64}}, max_samples: 200, report_samples: 4}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--store", type=Path, default=Path("runs/bench_t5_learns"))
    args = parser.parse_args()
    args.store.mkdir(parents=True, exist_ok=True)
    path = args.store / "learns.yaml"
    train, valid = args.train.resolve(), args.valid.resolve()
    path.write_text(EXPERIMENT.format(train=train, valid=valid, epochs=args.epochs))
    started = time.monotonic()
    command = [sys.executable, "-m", "baton", "run", str(path), "--task", "learns"]
    subprocess.run([*command, "--store", str(args.store)], check=True)
    [file] = args.store.glob("**/tasks/learns/eval/eval.json")
    record = json.loads(file.read_bytes())
    bleu = {
        line["step"]: line["dev_bleu"]
        for line in map(json.loads, (file.parents[1] / "train/metrics.jsonl").open())
        if "dev_bleu" in line
    }
    training = record["training"]
    print(
        f"{training['total_parameters']:,} parameters, {training['samples']:,} samples,"
        f" {time.monotonic() - started:.0f} s in all; best step {training['best_step']}"
    )
    print(f"{'step':>6} {'dev loss':>9} {'dev BLEU':>9}")
    for step, loss in record["dev_curve"]:
        print(f"{step:6.0f} {loss:9.3f} {bleu[step]:9.2f}")
    score = record["scores"][0]
    interval = f"[{score['low']:.2f}, {score['high']:.2f}]"
    print(f"validation {score['column']} {score['value']:.2f} {interval}")
    for sample in record["samples"]:
        print(f"> {sample['prompt'][:60]}\n  {sample['prediction'][:120]}")


if __name__ == "__main__":
    main()
