"""A small T5 from random weights on a few thousand pairs: does it learn, and by which curves?

    python bench/t5_learns.py --train chat_train_3k.parquet --valid chat_valid_1k.parquet
    python bench/t5_learns.py --train chat_train_3k.parquet --memorise 200

Trains a tokenizer and a model on the training pairs with `baton run` and prints the losses and the
character BLEU of every evaluation, the step that was kept as the best, some answers, and where
the report with the curves is. `--memorise` trains on the first rows alone and takes these very
rows for validation: what a model that can learn must then know by heart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

EXPERIMENT = """\
pipeline: t5_pretrain
data: {{path: {train}, valid: {valid}, rows: {rows}, valid_rows: {valid_rows}, max_seq_len: 160}}
tokenizer: {{source: train, vocab: {vocab}}}
model:
  d_model: 128
  d_ff: 256
  d_kv: 32
  num_heads: 4
  num_layers: 2
  num_decoder_layers: 2
  feed_forward: gated-gelu
  dropout: {dropout}
train:
  epochs: {epochs}
  batch_size: 16
  accumulation: 1
  gpus: 1
  optimizer: adamw
  learning_rate: 3e-3
  schedule: cosine
  warmup_steps: 100
  log_every_steps: 20
  eval_every_steps: {every}
  save_every_steps: {every}
  save_every_minutes: null
  keep_last: 5
dev_score: {{samples: 128, batch_size: 128}}
eval: {{generate: {{max_new_tokens: 160, batch_size: 100}}, max_samples: 200, report_samples: 4}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    validation = parser.add_mutually_exclusive_group(required=True)
    validation.add_argument("--valid", type=Path)
    validation.add_argument("--memorise", type=int, metavar="ROWS")
    parser.add_argument("--epochs", type=int, help="default: 12; 80 to memorise")
    parser.add_argument("--store", type=Path, default=Path("runs/bench_t5_learns"))
    parser.add_argument("--set", action="append", default=[], help="passed on to baton")
    args = parser.parse_args()
    name = "memorises" if args.memorise else "learns"
    args.store.mkdir(parents=True, exist_ok=True)
    path = args.store / f"{name}.yaml"
    path.write_text(experiment(args), encoding="utf-8")
    options = ["--store", str(args.store), *(word for each in args.set for word in ("--set", each))]
    baton("run", str(path), "--task", name, *options)
    # The newest, where the store has runs of other settings.
    found = args.store.glob(f"**/tasks/{name}/eval/eval.json")
    show(max(found, key=lambda file: file.stat().st_mtime))
    baton("collect", str(path), "--out", str(args.store / "report"), *options)


def experiment(args: argparse.Namespace) -> str:
    train, rows = args.train.resolve(), args.memorise
    return EXPERIMENT.format(
        train=train,
        valid=train if rows else args.valid.resolve(),
        rows=rows or "null",
        valid_rows=rows or 512,
        vocab=1024 if rows else 4096,
        dropout=0.0 if rows else 0.1,
        epochs=args.epochs or (80 if rows else 12),
        # Once an epoch of 3,000 rows; every eight epochs of 200.
        every=100 if rows else 188,
    )


def baton(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "baton", *words], check=True)


def show(file: Path) -> None:
    """The curves of a finished task, its best step, its score and some answers."""
    record = json.loads(file.read_bytes())
    training, bleu = record["training"], dict(record["dev_scores"]["dev_bleu"])
    losses = {row[0]: row[1] for row in record["loss_curve"]}
    print(
        f"{training['total_parameters']:,} parameters, {training['samples']:,} samples,"
        f" {training['seconds']:.0f} s of training; best step {training['best_step']}"
    )
    print(f"{'step':>6} {'train loss':>11} {'dev loss':>9} {'dev BLEU':>9}")
    for step, loss in record["dev_curve"]:
        train = losses[max((each for each in losses if each <= step), default=min(losses))]
        print(f"{step:6.0f} {train:11.3f} {loss:9.3f} {bleu[step]:9.2f}")
    score = record["scores"][0]
    interval = f"[{score['low']:.2f}, {score['high']:.2f}]"
    print(f"validation {score['column']} {score['value']:.2f} {interval}")
    for sample in record["samples"]:
        print(f"> {sample['prompt'][:60]}\n  {sample['prediction'][:120]}")


if __name__ == "__main__":
    main()
