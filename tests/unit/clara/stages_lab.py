"""Whole tasks of clara in a folder, on the rows of the smoke experiment."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

from baton.config.decode import decode, encode
from baton.config.override import set_key
from baton.handover import StopSignal
from baton.pipelines.clara import data, evaluate, training
from baton.pipelines.clara.config import Clara
from baton.record import LegRecord, Plan, Runner, TaskPlan
from baton.stage import Alone, Leg, Outcome
from baton.store.local import LocalStore
from baton.train.config import RANDOM_NOTICE

REPOSITORY = Path(__file__).parents[3]
SMOKE = REPOSITORY / "jobs" / "smoke"
TRAIN = {
    "max_steps": 6, "batch_samples": 8, "learning_rate": 5e-3, "log_every_steps": 1,
    "eval_every_steps": 3, "save_every_steps": 2, "save_every_minutes": None,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model": {
        "source": "random",
        "config": {
            "model_type": "mistral", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 512, "initializer_range": 0.2,
        },
        "tokenizer_vocab": 400,
    },
    "data": {f"stage{n}": str(SMOKE / f"clara_stage{n}.jsonl") for n in (1, 2, 3)}
    | {"held_out": 0.2},
    "memory": {"doc_max_length": 128, "compress_rate": 32},
    "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "targets": "all-linear"},
    "stage1": {"max_length": 384, "train": TRAIN},
    "stage2": {"max_length": 384, "top_k": 2, "train": TRAIN},
    "stage3": {"max_length": 384, "top_k": 2, "train": TRAIN},
    "eval": {"generate": {"max_new_tokens": 6, "batch_size": 4}, "bootstrap_resamples": 100},
}  # fmt: skip


def configured(changes: dict[str, Any]) -> Clara:
    """`CONFIG` with some keys changed, as in `{"stage1.train.max_steps": 3}`."""
    values: dict[str, Any] = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        set_key(values, key, value)
    return decode(Clara, values)


class Task:
    """A task folder, and legs that work on it stage by stage."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root = root
        root.mkdir(exist_ok=True, parents=True)
        self.config = configured({k.replace("__", "."): v for k, v in changes.items()})
        self.peers: Any = Alone()
        self.legs = 0

    def leg(self, **changes: Any) -> Leg:
        self.legs += 1
        task = TaskPlan(name="t", config=encode(self.config))
        runner = Runner(host="h", pid=1, started_ticks=1, boot="b", pid_namespace="n")
        record = LegRecord(
            task="t", number=self.legs, state="active", runner=runner, started="", position=[]
        )
        plan = Plan(
            experiment="e", pipeline="clara", digest="0", tasks=[task], created="",
            baton_version="0",
        )  # fmt: skip
        values: dict[str, Any] = {
            "plan": plan, "task": task, "config": self.config, "record": record,
            "store": LocalStore(self.root), "stop": StopSignal(), "peers": self.peers,
            "check_fence": lambda: None, "now": lambda: "", "progress_every_seconds": 0.0,
            "notice": RANDOM_NOTICE,
        }  # fmt: skip
        return Leg(**values | changes)

    def run(self, *stages: str, **changes: Any) -> Outcome:
        """One leg through some stages, as the runner would: done ones are skipped."""
        leg = self.leg(**changes)
        everything = {
            "data": data.prepare,
            **{f"stage{n}": training.stage_of(f"stage{n}") for n in (1, 2, 3)},
            "eval": evaluate.evaluate,
        }
        for name in stages or everything:
            marker = self.root / name / "done"
            if marker.exists():
                continue
            leg.amend(stage=name)
            leg.start_over(stage=name)
            if name == "data" and leg.peers.rank:
                leg.peers.broadcast(None)
            else:
                outcome = everything[name](leg)
                if name == "data":
                    leg.peers.broadcast(None)
                if outcome is Outcome.HANDED_OVER:
                    return outcome
            marker.parent.mkdir(exist_ok=True)
            marker.touch()
            if leg.peers.agree(leg.stop.is_set)[0]:
                return Outcome.HANDED_OVER
        return Outcome.FINISHED

    def results(self) -> dict[str, bytes]:
        """Every file that must come out the same whatever happened on the way."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            is_final = "/final/" in name and not name.endswith(("README.md", "task.json"))
            if path.is_file() and (
                is_final or name.endswith(("metrics.jsonl", "predictions.jsonl", ".tokens"))
            ):
                found[name] = path.read_bytes()
        return found


def signal_at(stage: str, step: int, number: signal.Signals):
    """Reports progress to; sends a signal to this process when a stage gets to a step."""

    def heard(progress: Any) -> None:
        if progress.get("stage") == stage and progress.get("step", -1) >= step:
            os.kill(os.getpid(), number)

    return heard
