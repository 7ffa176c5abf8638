"""Tasks of t5_pretrain in a folder, without a launcher."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.config.decode import decode, encode
from baton.handover import StopSignal
from baton.pipelines.t5_pretrain import data, training
from baton.pipelines.t5_pretrain.config import T5Pretrain
from baton.record import LegRecord, Plan, Runner, TaskPlan
from baton.stage import Alone, Leg, Outcome
from baton.store.local import LocalStore


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    # Threads cost more than they bring at this size.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Task:
    """A task folder, and legs that work on it stage by stage."""

    def __init__(self, root: Path, source: Path, **changes: Any) -> None:
        self.root = root
        values: dict[str, dict[str, Any]] = {
            "data": {
                "path": str(source),
                "columns": {"prompt": "q", "response": "a"},
                "valid_share": 0.1,
                "max_seq_len": 16,
            },
            "tokenizer": {"source": "train", "vocab": 300},
        }
        for section, change in changes.items():
            values[section] = values.get(section, {}) | change
        self.config = decode(T5Pretrain, values)
        self.stop = StopSignal()
        self.legs = 0

    def leg(self) -> Leg:
        self.legs += 1
        self.root.mkdir(exist_ok=True)
        task = TaskPlan(name="t", config=encode(self.config))
        runner = Runner(host="h", pid=1, started_ticks=1, boot="b", pid_namespace="n")
        record = LegRecord(
            task="t", number=self.legs, state="active", runner=runner, started="", position=[]
        )
        plan = Plan(
            experiment="e",
            pipeline="t5_pretrain",
            digest="0",
            tasks=[task],
            created="",
            baton_version="0",
        )
        return Leg(
            plan=plan,
            task=task,
            config=self.config,
            record=record,
            store=LocalStore(self.root),
            stop=self.stop,
            peers=Alone(),
            check_fence=lambda: None,
            now=lambda: "",
        )

    def prepare(self) -> Outcome:
        return data.prepare(self.leg())

    def train(self) -> Outcome:
        return training.train(self.leg())

    def files(self) -> dict[str, bytes]:
        names = ["train.tokens", "train.index", "train.json", "valid.tokens", "valid.jsonl"]
        return {name: (self.root / "data" / name).read_bytes() for name in names}


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    """`task(source, data={...}, train={...})`: an empty task folder of its own."""
    numbers = itertools.count()

    def make(source: Path, **changes: Any) -> Task:
        return Task(tmp_path / f"task{next(numbers)}", source, **changes)

    return make


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More rows than one batch of encoding."""
    path = tmp_path / "many.jsonl"
    rows = ({"q": f"question {n}", "a": f"answer {n * n}"} for n in range(9000))
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
