"""From three processes to two and back: the same order, the same global batch, the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from baton.train.metrics import read_lines

HERE = Path(__file__).parent

# Each world is forked from this process, in which everything is imported already.
WORKER = textwrap.dedent(
    """
    import importlib.util, json, os, sys
    from dataclasses import replace
    from pathlib import Path
    import torch
    torch.set_num_threads(1)

    def load(name, path):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    here, root = Path(sys.argv[1]), Path(sys.argv[2])
    helpers, t5 = load("helpers", here / "conftest.py"), load("t5_lab", here / "t5_lab.py")
    from baton.train.config import AdapterConfig
    from baton.train.ranks import Ranks

    STEPS, SHAPE = 9, replace(t5.TINY, dropout=0.0)
    CONFIG = replace(t5.CONFIG, batch_size=2, accumulation=2, gpus=3, batch_samples=12,
                     max_steps=STEPS, learning_rate=1e-3, eval_every_steps=3)

    def train(name, leg, world, rank, stop_at):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ["BATON_RENDEZVOUS"] = f"file://{root}/{name}-{leg}"
        ranks = Ranks.join()
        used = []

        class Noting(t5.Padded):
            def collate(self, source, indices, *, budget):
                if source is pairs:
                    used.append([loop.state.step, indices.tolist()])
                return super().collate(source, indices, budget=budget)

        pairs = t5.Pairs.drawn(40)
        run = helpers.Run(root / name, helpers.Tiny(root, AdapterConfig(method="full")))
        run.legs = leg
        loop = t5.loop_of(run, CONFIG, pairs, shape=SHAPE, ranks=ranks, stop_at=stop_at,
                          dev=t5.Pairs.drawn(5, seed=4),
                          batching=Noting(device=t5.CPU, pad=t5.PAD, start=t5.PAD))
        loop.run()
        (root / f"{name}-{leg}-{rank}.json").write_text(json.dumps(used))
        ranks.leave()

    def world(name, leg, size, stop_at):
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                train(name, leg, size, rank, stop_at)
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * size

    for name in ("alone", "moved"):
        (root / name).mkdir()
    world("alone", 0, 1, None)
    world("moved", 0, 3, 3)
    world("moved", 1, 2, 6)
    world("moved", 2, 3, None)
    """
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(HERE), str(folder)],
        env=os.environ | {"BATON_DEVICE": "cpu", "BATON_PEER_TIMEOUT": "60"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def samples_by_step(root, name):
    """Which samples each step used, whichever rank they went to, and on how many ranks."""
    used: dict[int, list[int]] = {}
    for path in root.glob(f"{name}-*-*.json"):
        for step, indices in json.loads(path.read_text()):
            used.setdefault(step, []).extend(indices)
    return {step: sorted(indices) for step, indices in used.items()}


@pytest.mark.slow
def test_every_step_uses_the_same_samples_however_many_processes_there_are(root):
    alone, moved = samples_by_step(root, "alone"), samples_by_step(root, "moved")
    assert sorted(alone) == list(range(9))
    assert all(len(indices) == 12 for indices in alone.values())
    assert moved == alone
    shares = {path.stem: json.loads(path.read_text()) for path in root.glob("moved-1-*.json")}
    assert sorted(shares) == ["moved-1-0", "moved-1-1"]
    assert all(shares.values())


@pytest.mark.slow
def test_the_run_is_the_one_of_a_single_process(root):
    ours, theirs = (
        read_lines(root / name / "train" / "metrics.jsonl") for name in ("moved", "alone")
    )
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    assert sum("dev_loss" in line for line in ours) == 3
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-4)
    last = "train/checkpoints/step-000009/model.safetensors"
    one, many = load_file(root / "alone" / last), load_file(root / "moved" / last)
    for key, value in one.items():
        assert torch.allclose(many[key], value, rtol=1e-4, atol=1e-5), key
