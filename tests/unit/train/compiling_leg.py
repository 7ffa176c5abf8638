"""A leg in a process of its own that compiles a tiny model's layers, as GPUs do, on a CPU.

`python compiling_leg.py TASK MODEL`; prints, as JSON, what torch's caches had and what they lacked.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import torch
from conftest import Run, Samples, Tiny
from torch._dynamo.utils import counters

from baton.train.config import AdapterConfig, TrainConfig
from baton.train.layers import compile_layers


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(1)
    run = Run(Path(sys.argv[1]), Tiny(Path(sys.argv[2]), AdapterConfig(method="full")))
    config = TrainConfig(
        batch_samples=2,
        tokens_per_micro_batch=64,
        precision="fp32",
        max_steps=4,
        log_every_steps=1,
        save_every_steps=1000,
    )
    loop = run.loop(config, Samples.drawn(8))
    compile_layers(loop.model)
    started = time.monotonic()
    outcome = loop.run()
    print(
        json.dumps(
            {
                "outcome": outcome.value,
                "seconds": time.monotonic() - started,
                "hits": counters["inductor"]["fxgraph_cache_hit"],
                "misses": counters["inductor"]["fxgraph_cache_miss"],
            }
        )
    )


if __name__ == "__main__":
    main()
