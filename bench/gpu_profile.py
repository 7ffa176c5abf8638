"""Where the time of a training step goes, kernel by kernel, on one GPU.

    python bench/gpu_profile.py [lora_planned raft_memory_4_dropout t5 ...] [--rows 40]

Takes the arms of gpu_sft.py, and `t5`: the model of t5_pretrain (187,692,288 parameters), 256
samples of 192 + 192 tokens a step. Each runs in a process of its own until kernels are compiled;
two steps are then recorded. Prints a step's wall time and how long the GPU was busy in it; kinds of
kernels with their time and share of it; and the kernels themselves, with calls a step and the time
of one.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

WARM, RECORDED = 8, 2
T5_LENGTH, T5_BATCH, T5_VOCABULARY = 192, 256, 29_298
# The first that matches the name of a kernel says of what kind it is.
KINDS = {
    "attention": r"flash_|fmha|sdpa|^_(biased|packed)_",
    "matrix products": r"nvjet|gemm|cutlass|cublas",
    "4-bit weights": r"[dD]equantize",
    "gated MLP": r"^_gate_",
    "loss": r"^_cross_entropy",
    "dropout": r"^_drop",
    "weights in 16 bits": r"multi_tensor.*Copy",
    "optimizer and clipping": r"multi_tensor",
    "compiled": r"^triton_",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms", nargs="*", default=["lora_planned", "raft_memory_4_dropout", "t5"])
    parser.add_argument("--rows", type=int, default=40, help="kernels to print")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        profile(args.arms[0], args.rows)
        return
    failed = []
    for name in args.arms:
        command = [sys.executable, __file__, name, "--one", "--rows", str(args.rows)]
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"no profile of {', '.join(failed)}")


def profile(name: str, rows: int) -> None:
    import torch

    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    marks: dict[int, float] = {}

    def progress(values: Mapping[str, Any]) -> None:
        step = values.get("step")
        if step not in (WARM, WARM + RECORDED) or step in marks:
            return
        torch.cuda.synchronize()
        if step == WARM:
            torch.cuda.reset_peak_memory_stats()
            recorder.start()
            marks[step] = time.monotonic()
        else:
            marks[step] = time.monotonic()
            recorder.stop()

    loop = t5_loop(progress) if name == "t5" else sft_loop(name, progress)
    loop.run()
    wall_ms = 1e3 * (marks[WARM + RECORDED] - marks[WARM]) / RECORDED
    report(name, recorder, wall_ms, rows)


def sft_loop(name: str, progress: Callable[[Mapping[str, Any]], None]) -> Any:
    from gpu_sft import ARMS, build

    return build(ARMS[name], WARM + RECORDED + 1, progress)


def t5_loop(progress: Callable[[Mapping[str, Any]], None]) -> Any:
    """The loop of t5_pretrain's train stage, on random tokens."""
    import numpy as np
    import torch
    from transformers import T5ForConditionalGeneration

    from baton.pipelines.t5_pretrain.config import T5Shape
    from baton.pipelines.t5_pretrain.model import t5_config
    from baton.train.biased import fuse
    from baton.train.config import TrainConfig
    from baton.train.environment import environment_of
    from baton.train.loop import Loop
    from baton.train.ranks import Ranks
    from baton.train.seq2seq import Padded, Seq2SeqLoss, compile_blocks
    from baton.train.state import FullWeights
    from gpu_sft import bench_leg
    from sft_samples import Samples

    class Tokenizer:
        pad_token_id, eos_token_id = 0, 1

        def __len__(self) -> int:
            return T5_VOCABULARY

    steps, ranks = WARM + RECORDED + 1, Ranks.join()
    torch.manual_seed(0)
    network = T5ForConditionalGeneration(t5_config(T5Shape(), Tokenizer())).to(ranks.device)
    fuse(network)
    compile_blocks(network, dynamic=False)
    lengths = np.full(T5_BATCH * (steps + 1), 2 * T5_LENGTH)
    return Loop(
        leg=bench_leg(ranks, progress),
        ranks=ranks,
        config=TrainConfig(
            max_steps=steps,
            batch_samples=T5_BATCH,
            tokens_per_micro_batch=T5_BATCH * 2 * T5_LENGTH,
            activation_checkpointing=False,
            log_every_steps=1,
            save_every_steps=10_000,
            save_every_minutes=None,
        ),
        model=network,
        weights=FullWeights(network),
        loss=Seq2SeqLoss(network, compute_dtype=torch.bfloat16),
        batching=Padded(device=ranks.device, pad=0, start=0, pad_to=T5_LENGTH, fixed_rows=True),
        train=Samples(lengths, T5_VOCABULARY, prompt_share=0.5),
        dev=Samples(np.empty(0), 1000),
        environment=environment_of(ranks),
    )


def report(name: str, recorder: Any, wall_ms: float, rows: int) -> None:
    import torch

    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in recorder.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            taken = kernels[event.name]
            taken[0] += event.self_device_time_total / 1e3 / RECORDED
            taken[1] += 1 / RECORDED
    busy = sum(ms for ms, _ in kernels.values())
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{name}: {wall_ms:.1f} ms a step, GPU busy {busy:.1f} ms, peak {peak:.1f} GiB")
    kinds: collections.Counter[str] = collections.Counter()
    for kernel, (ms, _) in kernels.items():
        kinds[kind_of(kernel)] += ms
    for kind, ms in kinds.most_common():
        print(f"  {kind:24} {ms:8.2f} ms {ms / busy:6.1%}")
    for kernel, (ms, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])[:rows]:
        print(f"    {ms:8.2f} ms {calls:6.0f} x {1e3 * ms / calls:8.1f} us  {kernel[:110]}")
    sys.stdout.flush()


def kind_of(kernel: str) -> str:
    return next((kind for kind, name in KINDS.items() if re.search(name, kernel)), "other")


if __name__ == "__main__":
    main()
