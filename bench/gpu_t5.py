"""t5_pretrain at full size on one GPU and on two, against Hugging Face's Seq2SeqTrainer.

    python bench/gpu_t5.py [--steps 90] [--arms baton baton2 hf] [--minutes 4]

Random weights (187,692,288 parameters at vocabulary 29,298), random text, every prompt and every
response 192 tokens, 256 samples a step, AdamW, bf16, dropout 0.1, clipping at 1. Each arm is a
process of its own. `baton` and `baton2` are `baton submit` on one GPU and on two (one process
each); `hf` is Seq2SeqTrainer in bf16 with the fused AdamW. Samples a second are the
median after a third of the steps; `wall` is everything from start to end, compilation included.
An arm that fails, or takes longer than `--minutes`, is ended with all its processes; its line says
why, and the next one starts. `--tiny` runs the same on a CPU in a minute, to see that nothing is
broken.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton.config.home import home

FULL = {"length": 192, "batch": 256, "vocab": 29_298, "rows": 12_000}
TINY = {"length": 16, "batch": 8, "vocab": 600, "rows": 200}
TINY_SHAPE = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
}
ROWS_OF_AN_EPOCH = 10_000_000
# From TERM to KILL: what a leg needs to save and to end.
_GRACE_SECONDS = 30


class ArmError(Exception):
    """Why an arm has no figures."""


@dataclass(frozen=True)
class Figures:
    samples_per_s: float
    peak_gib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--arms", nargs="+", default=["baton", "baton2", "hf"])
    parser.add_argument("--minutes", type=float, default=4.0, help="at most so long an arm")
    parser.add_argument("--scratch", type=Path, default=Path("runs/bench_gpu_t5"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--micro-batch", type=int, help="samples at once; default: a GPU's share")
    parser.add_argument("--set", action="append", default=[], help="passed on to baton submit")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = TINY if args.tiny else FULL
    if args.inside:
        print(json.dumps(train_hf(args, size)))
        return
    # Or TERM would end this process alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to stop"))
    import torch

    gpus = torch.cuda.device_count()
    where = "CPU, tiny" if args.tiny else f"{gpus} x {torch.cuda.get_device_name()}"
    shutil.rmtree(args.scratch, ignore_errors=True)
    args.scratch.mkdir(parents=True)
    make_data(args.scratch, size)
    print(f"{where}, torch {torch.__version__}, {size['length']} + {size['length']} tokens")
    print(f"{'arm':8} {'samples/s':>10} {'peak GiB':>9} {'10M rows':>9} {'wall':>7}", flush=True)
    failed = [arm for arm in args.arms if not run_arm(args, size, arm, gpus)]
    if failed:
        sys.exit(f"no figures for {', '.join(failed)}")


def run_arm(args: argparse.Namespace, size: dict[str, int], arm: str, gpus: int) -> bool:
    """Run one arm to its end and print its line; False if it has no figures."""
    if arm == "baton2" and gpus < 2 and not args.tiny:
        print(f"{arm:8} skipped: there is one GPU", flush=True)
        return True
    started = time.monotonic()
    try:
        found = run_hf(args) if arm == "hf" else run_baton(args, size, arm)
    except ArmError as error:
        print(f"{arm:8} failed after {time.monotonic() - started:.0f} s: {error}", flush=True)
        return False
    wall, hours = time.monotonic() - started, ROWS_OF_AN_EPOCH / found.samples_per_s / 3600
    print(
        f"{arm:8} {found.samples_per_s:10,.0f} {found.peak_gib:9.1f} {hours:7.2f} h {wall:5.0f} s",
        flush=True,
    )
    return True


def run_to_its_end(
    command: Sequence[str], environment: Mapping[str, str], *, output: Path, minutes: float
) -> None:
    """Run a command, both its streams into a file; none of its processes outlives the call.

    Raises:
        ArmError: it failed, or took longer than `minutes`.
    """
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        try:
            status = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            raise ArmError(f"not done after {minutes:g} minutes\n{tail(output)}") from None
        finally:
            end(process)
    if status:
        raise ArmError(f"exit status {status}\n{tail(output)}")


def _die_with_parent() -> None:
    """TERM for a child of this script when the script is killed; `baton submit` passes it on."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def end(process: subprocess.Popen[bytes]) -> None:
    """TERM, then KILL for what is left of a process and of all that it started."""
    # `baton submit` gives every leg a session of its own: no process group holds them all.
    started = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    for pid in [process.pid, *started] if process.poll() is None else started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """All living processes below one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything; state and parent follow.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-2000:]


def make_data(scratch: Path, size: dict[str, int]) -> None:
    """Rows of random words that are cut at the full length, and a tokenizer trained on them."""
    rng = np.random.default_rng(0)
    # Skewed, as words are: a tokenizer finds pieces of two and three characters.
    draw = 0x4E00 + (rng.random((size["rows"], 2, size["length"] * 3)) ** 3 * 3000).astype(np.int64)
    draw[:, :, 11::12] = ord("，")
    with open(scratch / "pairs.jsonl", "w", encoding="utf-8") as file:
        for prompt, response in draw:
            row = {"prompt": "".join(map(chr, prompt)), "response": "".join(map(chr, response))}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    command = [sys.executable, "-m", "baton", "data", "t5", "tokenizer"]
    command += [str(scratch / "pairs.jsonl"), "--out", str(scratch / "tokenizer"), "--rows", "1500"]
    subprocess.run([*command, "--vocab", str(size["vocab"])], check=True, stdout=subprocess.DEVNULL)


def run_baton(args: argparse.Namespace, size: dict[str, int], arm: str) -> Figures:
    """Median samples a second and the peak of one GPU's memory, of a task on one GPU or two."""
    processes = 2 if arm == "baton2" else 1
    scratch, length = args.scratch.resolve(), size["length"]
    at_once = args.micro_batch or size["batch"] // processes
    experiment = {
        "pipeline": "t5_pretrain",
        "data": {"path": str(scratch / "pairs.jsonl"), "max_seq_len": length, "valid_rows": 8},
        "tokenizer": {"source": "path", "path": str(scratch / "tokenizer")},
        "model": {"source": "random", **(TINY_SHAPE if args.tiny else {})},
        "train": {
            "max_steps": args.steps,
            "batch_size": size["batch"],
            "accumulation": 1,
            "gpus": 1,
            "tokens_per_micro_batch": at_once * 2 * length,
            "pad_to": length,
            "compile": not args.no_compile,
            "learning_rate": 1e-4,
            "warmup_steps": 20,
            "log_every_steps": max(1, args.steps // 12),
            "save_every_steps": 10**6,
        },
        "dev_score": {"samples": 0},
    }
    path = scratch / f"{arm}.yaml"
    path.write_text(json.dumps(experiment), encoding="utf-8")
    command = [sys.executable, "-m", "baton", "submit", str(path), "--store", str(scratch / arm)]
    command += ["--site", "local-2gpu" if processes == 2 else "local"]
    for setting in args.set:
        command += ["--set", setting]
    environment = os.environ | {"BATON_HOME": str(home()), "BATON_STAGE": "train"}
    if args.tiny:
        environment |= {"BATON_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    output = scratch / f"{arm}.txt"
    try:
        run_to_its_end(command, environment, output=output, minutes=args.minutes)
    except ArmError as error:
        logs = [tail(log) for log in (scratch / arm).glob("**/tasks/*/log.txt")]
        raise ArmError("\n".join([str(error), *logs])) from error
    [task] = (scratch / arm).glob("**/tasks/*")
    log = (task / "log.txt").read_text(encoding="utf-8")
    rates = [float(rate) for rate in re.findall(r"tokens_per_s=(\d+)", log)]
    summary = json.loads((task / "train" / "summary.json").read_bytes())
    assert summary["tokens"] == summary["samples"] * 2 * length, "a sample is shorter than it seems"
    peak = summary["peak_gpu_memory_bytes"] or 0
    rate = statistics.median(rates[len(rates) // 3 :]) / (2 * length)
    return Figures(samples_per_s=rate, peak_gib=peak / 2**30)


def run_hf(args: argparse.Namespace) -> Figures:
    command = [sys.executable, __file__, "--inside", "hf", "--steps", str(args.steps // 3)]
    command += ["--scratch", str(args.scratch), *(["--tiny"] if args.tiny else [])]
    # Seq2SeqTrainer would use every GPU it sees through DataParallel.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "" if args.tiny else "0"}
    output = args.scratch / "hf.txt"
    run_to_its_end(command, environment, output=output, minutes=args.minutes)
    return Figures(**json.loads(output.read_text(encoding="utf-8").splitlines()[-1]))


def train_hf(args: argparse.Namespace, size: dict[str, int]) -> dict[str, Any]:
    """Seq2SeqTrainer on random token ids of the full length."""
    import torch
    from transformers import (
        AutoTokenizer,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5ForConditionalGeneration,
        TrainerCallback,
    )

    from baton.pipelines.t5_pretrain.config import T5Shape
    from baton.pipelines.t5_pretrain.model import t5_config

    tokenizer = AutoTokenizer.from_pretrained(args.scratch / "tokenizer")
    shape = T5Shape(**(TINY_SHAPE if args.tiny else {}))
    torch.manual_seed(0)
    network = T5ForConditionalGeneration(t5_config(shape, tokenizer))
    rng = np.random.default_rng(0)

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        ids = rng.integers(4, size["vocab"], (size["rows"], 2, size["length"]))

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> dict[str, Any]:
            prompt, response = torch.from_numpy(self.ids[index])
            return {
                "input_ids": prompt,
                "attention_mask": torch.ones_like(prompt),
                "labels": response,
            }

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.monotonic())

    trainer = Seq2SeqTrainer(
        model=network,
        args=Seq2SeqTrainingArguments(
            output_dir=str(args.scratch / "hf"),
            max_steps=args.steps,
            per_device_train_batch_size=size["batch"],
            learning_rate=1e-4,
            warmup_steps=10,
            bf16=not args.tiny,
            use_cpu=args.tiny,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            dataloader_num_workers=0 if args.tiny else 4,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Rows(),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    steady = statistics.median(seconds[len(seconds) // 3 :])
    peak = 0 if args.tiny else torch.cuda.max_memory_allocated()
    return {"samples_per_s": size["batch"] / steady, "peak_gib": peak / 2**30}


if __name__ == "__main__":
    main()
