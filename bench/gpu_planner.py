"""The memory planner against every setting a person might try, under several limits of memory.

    python bench/gpu_planner.py [lora qlora raft_memory_1] [--limits 139 80 40 24 16]

For each arm of gpu_sft.py, in one process: first a grid of micro-batches and recomputing layers,
each setting timed by itself; then, under each limit (`set_per_process_memory_fraction`), the
planner, and what it chose timed in the same way. The share is the planner's tokens a second of the
best of the grid that fits; `out of memory` must never be printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

STEPS = 16
SIZES = (2048, 4096, 8192, 14336, 24576)
SHARES = (0.0, 0.34, 0.67, 1.0)


def run_one(name: str, limits: list[float]) -> None:
    import torch

    from baton.train.layers import layers_of
    from baton.train.memory import Trials, plan_memory
    from baton.train.planner import MemoryPlan
    from gpu_sft import ARMS, build

    loop = build(replace(ARMS[name], budget=None, recompute=None), STEPS, lambda values: None)
    steps = [loop.cursor.at(step) for step in range(STEPS)]
    trials = Trials(
        model=loop.model,
        part=lambda batch, whole: loop.loss(batch) / whole.labelled,
        precision=loop.precision,
        ranks=loop.ranks,
        batches=loop.batches,
        source=loop.train,
        indices=max(steps, key=lambda indices: int(loop.train.lengths(indices).sum())),
    )
    layers = len(layers_of(loop.model))
    total = torch.cuda.get_device_properties(0).total_memory

    def rate(plan: MemoryPlan) -> tuple[float, float] | None:
        """Tokens a second, the best of two after one, and the peak in GiB."""
        found = [trials(plan) for _ in range(3)]
        if None in found:
            return None
        return max(t.tokens / t.seconds for t in found[1:]), found[0].peak / 2**30

    grid = {}
    for share in SHARES:
        for size in SIZES:
            plan = MemoryPlan(tokens=size, recompute_layers=round(share * layers))
            measured = rate(plan)
            if measured is not None:
                grid[plan] = measured
    for limit in limits:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / total))
        started = time.monotonic()
        (loop.leg.folder / "train/memory.json").unlink(missing_ok=True)
        plan = plan_memory(loop.leg, "train", loop.config, trials, steps)
        seconds = time.monotonic() - started
        measured = rate(plan)
        fitting = [(speed, p) for p, (speed, peak) in grid.items() if peak <= limit]
        best = max(fitting, key=lambda pair: pair[0], default=None)
        print(line(name, limit, layers, plan, measured, best, seconds), flush=True)


def line(
    name: str, limit: float, layers: int, plan: Any, measured: Any, best: Any, seconds: float
) -> str:
    said = f"{name:14} {limit:5.0f} GiB: {plan.tokens:6} tokens, {plan.recompute_layers}/{layers}"
    if measured is None:
        return said + " out of memory"
    said += f" recompute: {measured[0]:7,.0f} tok/s, {measured[1]:5.1f} GiB, in {seconds:.0f} s"
    if best is None:
        return said + "; nothing of the grid fits"
    speed, hand = best
    return said + (
        f"; best of the grid {speed:7,.0f} ({hand.tokens}, {hand.recompute_layers}),"
        f" share {measured[0] / speed:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="*", default=["lora", "qlora", "raft_memory_1"])
    parser.add_argument("--limits", nargs="+", type=float, default=[139, 80, 40, 24, 16])
    parser.add_argument("--one", action="store_true", help="in this process, for one arm")
    args = parser.parse_args()
    if args.one:
        run_one(args.arms[0], args.limits)
        return
    for name in args.arms:
        command = [sys.executable, __file__, name, "--one", "--limits", *map(str, args.limits)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
