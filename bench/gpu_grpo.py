"""Seconds of a GRPO step on one GPU, beside TRL's GRPOTrainer, each in a fresh process.

    python bench/gpu_grpo.py [baton trl] [--steps 8] [--prompts 8] [--group 8] [--new-tokens 256]

A random-init Qwen2.5-3B in bfloat16, LoRA r 32 on all linear layers, 8 prompts with 8 completions
of 256 tokens each a step (random weights hardly ever end earlier), temperature 0.7, top-p 0.8,
top-k 20, beta 0: one update a batch. Both arms start from the same weights, are asked the same
prompts and reward completions by the same function. Steps are split into sampling (generation),
scoring (rewards) and update (everything else: log-probabilities, backward pass, optimizer); the
first steps, in which kernels are compiled, are told apart. `--beta 0.04` adds the reference's
forward pass to both; `--tiny` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_samples import QWEN25_3B

REPOSITORY = Path(__file__).parents[1]
MODEL = QWEN25_3B | {"model_type": "qwen2", "max_position_embeddings": 32768}
TINY = MODEL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
WARM_STEPS = 3


class Clock:
    """Seconds spent in each part of a step; waits for the device at the edges."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = [{}]

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            started = self._now()
            result = work(*args, **named)
            spent = self.steps[-1].get(part, 0.0) + self._now() - started
            self.steps[-1][part] = spent
            return result

        return run

    def step_ended(self, started: float) -> float:
        now = self._now()
        last = self.steps[-1]
        last["total"] = now - started
        last["update"] = last["total"] - last.get("sampling", 0.0) - last.get("scoring", 0.0)
        self.steps.append({})
        return now

    def _now(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> float:
        return self._now()


def plan_of(args: argparse.Namespace, folder: Path) -> Any:
    """A plan of one task whose settings are those of the bench."""
    from baton.plan import build_plan, select

    settings = {
        "matrix.reward": "null",
        "model": json.dumps(
            {
                "source": "random",
                "config": TINY if args.tiny else MODEL,
                "tokenizer_vocab": 500,
            }
        ),
        "data.path": "jobs/smoke/questions_gen.jsonl",
        "data.max_length": "1024",
        "adapter": "{method: lora, r: 32, alpha: 32, dropout: 0.0, targets: all-linear}",
        "sft.max_steps": "1",
        "sft.eval_every_steps": "1000",
        "grpo.max_steps": str(args.steps),
        "grpo.prompts": str(args.prompts),
        "grpo.group": str(args.group),
        "grpo.max_new_tokens": str(args.new_tokens),
        "grpo.sampling": "{temperature: 0.7, top_p: 0.8, top_k: 20}",
        "grpo.sample_batch": str(args.prompts * args.group),
        "grpo.iterations": "1",
        "grpo.beta": str(args.beta),
        "grpo.learning_rate": "5e-6",
        "grpo.warmup_steps": "0",
        "grpo.eval_every_steps": "1000",
        "grpo.save_every_steps": "1000",
        "grpo.log_every_steps": "1",
        "grpo.reward": "{keyword: 1.0, independent: 1.0}",
        "validation.prompts": "2",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    experiment = select("smoke/questions_gen", words).experiment
    return build_plan(experiment, created="now")


def prepared(args: argparse.Namespace, folder: Path) -> Any:
    """A leg at the beginning of the grpo stage: data, model and one supervised step are there."""
    from baton.config.decode import decode
    from baton.handover import StopSignal
    from baton.identity import this_runner
    from baton.legs import utc_now
    from baton.pipelines.questions_gen.config import QuestionsGen
    from baton.record import LegRecord
    from baton.runner import TaskRunner, task_store
    from baton.stage import Alone, Leg

    plan = plan_of(args, folder)
    [task] = plan.tasks
    store = task_store(folder, plan, task.name)
    TaskRunner(
        plan=plan, task=task, store=store, stop=StopSignal(), submission="bench", until="sft"
    ).run()
    return Leg(
        plan=plan,
        task=task,
        config=decode(QuestionsGen, task.config),
        record=LegRecord(
            task=task.name,
            number=1,
            state="active",
            stage="grpo",
            runner=this_runner(),
            started=utc_now(),
            position=[],
        ),
        store=store,
        stop=StopSignal(),
        peers=Alone(),
        check_fence=lambda: None,
        now=utc_now,
    )


def baton_arm(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The stage itself, its policy and its scorer under a clock."""
    from baton.pipelines.questions_gen.training import GRPO, Trainee

    leg = prepared(args, folder)
    loop = Trainee(leg, GRPO).loop()
    clock = Clock()
    rollouts: Any = loop.maker
    policy = rollouts.policy
    rollouts.policy = dataclasses.replace(policy, sample=clock.timed("sampling", policy.sample))
    rollouts.scorer.score = clock.timed("scoring", rollouts.scorer.score)
    started = clock.start()
    figures = rollouts.figures

    def step_ended() -> Any:
        nonlocal started
        found = figures()
        clock.steps[-1]["tokens"] = sum(map(len, rollouts.batch.completions))
        started = clock.step_ended(started)
        return found

    rollouts.figures = step_ended
    loop.run()
    return clock.steps[:-1]


def trl_arm(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """TRL on the same base, prompts and rewards; its generation is transformers' own."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from baton.data.tokenise import ChatEncoder
    from baton.pipelines.questions_gen.data import read_part
    from baton.pipelines.questions_gen.independent import Judge
    from baton.pipelines.questions_gen.scoring import Scorer

    leg = prepared(args, folder)
    base = leg.folder / "base"
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    rows = read_part(leg.folder, "train")
    encoder = ChatEncoder(tokenizer, system=None, max_length=1024)
    prompts = [encoder.prompt_text(row.request.text()) for row in rows]
    scorer = Scorer(leg.config.grpo.reward, Judge.of([row.problem for row in rows]))

    def reward(completions: list[str], **_: Any) -> list[float]:
        groups = [completions[i : i + args.group] for i in range(0, len(completions), args.group)]
        scored = scorer.score(groups)
        scorer.remember(completions, [one.reward for one in scored])
        return [one.normalised for one in scored]

    every = args.prompts * args.group
    micro = min(args.trl_micro_batch, every)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        peft_config=LoraConfig(
            r=32,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=args.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=every // micro,
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            temperature=0.7,
            top_p=0.8,
            top_k=20,
            beta=args.beta,
            loss_type="grpo",
            learning_rate=5e-6,
            gradient_checkpointing=False,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            seed=3407,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * max(1, args.steps)}),
        processing_class=tokenizer,
    )
    clock = Clock()
    generate, score = trainer._generate_single_turn, trainer._calculate_rewards
    trainer._generate_single_turn = clock.timed("sampling", generate)
    trainer._calculate_rewards = clock.timed("scoring", score)
    started = clock.start()

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            nonlocal started
            started = clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal started
            clock.steps[-1]["tokens"] = every * args.new_tokens
            started = clock.step_ended(started)

    trainer.add_callback(Steps())
    trainer.train()
    return clock.steps[:-1]


ARMS = {"baton": baton_arm, "trl": trl_arm}


def run_arm(args: argparse.Namespace) -> None:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        steps = ARMS[args.arm](args, Path(folder))
    warm = steps[min(WARM_STEPS, len(steps) - 1) :]
    result = {
        part: round(statistics.median(step.get(part, 0.0) for step in warm), 4)
        for part in ("total", "sampling", "scoring", "update", "tokens")
    }
    result["first_steps"] = [round(step["total"], 2) for step in steps[:WARM_STEPS]]
    if torch.cuda.is_available():
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="*", default=list(ARMS), help="baton, trl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--trl-micro-batch", type=int, default=16, help="completions a micro-batch")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        run_arm(args)
        return
    results = {}
    for arm in args.arms:
        words = [word for word in sys.argv[1:] if word not in ARMS]
        command = [sys.executable, __file__, *words, "--arm", arm]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"{arm} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            sys.exit(1)
        results[arm] = json.loads(found[0].removeprefix("RESULT "))
    parts = ("total", "sampling", "scoring", "update")
    print("| arm | seconds a step | sampling | scoring | update | peak GiB | first steps |")
    print("|---|---|---|---|---|---|---|")
    for arm, result in results.items():
        cells = [f"{result[part]:.3f}" for part in parts]
        peak = result.get("peak_gib", "")
        print(f"| {arm} | {' | '.join(cells)} | {peak} | {result['first_steps']} |")
    if {"baton", "trl"} <= results.keys():
        ratios = {
            part: results["trl"][part] / results["baton"][part]
            for part in parts
            if results["baton"][part]
        }
        print("trl / baton: " + ", ".join(f"{part} {r:.2f}x" for part, r in ratios.items()))


if __name__ == "__main__":
    main()
