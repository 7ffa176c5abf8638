"""Sharded training over gloo is that of whole models, on any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from baton.errors import DamagedError, StoreError
from baton.train.adapters import FOLDER, WEIGHTS
from baton.train.metrics import read_lines
from baton.train.ranks import Ranks
from baton.train.shard_files import load_tensors
from baton.train.sharded_state import ShardedState
from baton.train.state import MODEL, OPTIMIZER, FullWeights

# Every process of a world is a fork of this one, in which everything is imported already.
WORKER = textwrap.dedent(
    """
    import importlib.util, json, os, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
    helpers = importlib.util.module_from_spec(spec)
    sys.modules["helpers"] = helpers
    spec.loader.exec_module(helpers)
    from baton.train.config import AdapterConfig, TrainConfig
    from baton.train.ranks import Ranks

    def train(root, job, leg, world, rank, stop_at):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ["BATON_RENDEZVOUS"] = f"file://{root}/{job['name']}-{leg}"
        ranks = Ranks.join()
        adapter = AdapterConfig(method=job["method"], r=4, alpha=8, targets="all-linear")
        run = helpers.Run(root / job["name"], helpers.Tiny(Path(job["model"]), adapter))
        run.legs = leg
        loop = run.loop(
            TrainConfig(**job["config"]),
            helpers.Samples([tuple(row) for row in job["train"]]),
            helpers.Samples([tuple(row) for row in job["dev"]]),
            ranks=ranks,
            stop_at=stop_at,
        )
        loop.run()
        local = lambda t: getattr(t, "to_local", lambda: t)().numel()
        held = {
            "weights": sum(local(p) for p in loop.model.parameters()),
            "all_weights": sum(p.numel() for p in loop.model.parameters()),
            "moments": sum(local(t) for s in loop.optimizer.state.values() for t in s.values()),
        }
        (root / job["name"] / f"held-{leg}-{rank}.json").write_text(json.dumps(held))
        ranks.leave()

    root = Path(sys.argv[2])
    for job in json.loads(sys.argv[3]):
        (root / job["name"]).mkdir()
        for leg, (size, stop_at) in enumerate(job["worlds"]):
            children = []
            for rank in range(size):
                child = os.fork()
                if child == 0:
                    try:
                        train(root, job, leg, size, rank, stop_at)
                    except BaseException:
                        import traceback
                        traceback.print_exc()
                        os._exit(1)
                    os._exit(0)
                children.append(child)
            assert [os.waitpid(child, 0)[1] for child in children] == [0] * size, job["name"]
    """
)
STEPS = 6
# Tied head and embeddings learn; of a frozen base with a head of its own, adapters do.
METHODS = {"full": ("gemma", "full"), "lora": ("llama", "lora")}


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny, drawn, settings):
    """Where all trainings were done: `METHOD-WAY`, a task each."""
    # Five samples a step in micro-batches of few tokens: one process has more than the other.
    config = settings(max_steps=STEPS, batch_samples=5, eval_every_steps=2, save_every_steps=2)
    train, dev = drawn(20, seed=4, low=4, high=30).rows, drawn(5, seed=5).rows
    ways = {
        "whole": ("none", [(2, None)]),
        "sharded": ("full", [(2, None)]),
        "resumed": ("full", [(2, 4), (2, None)]),
        "moved": ("full", [(2, 2), (1, 3), (3, 4), (2, None)]),
    }
    jobs = [
        {
            "name": f"{name}-{way}",
            "model": str(tiny(model).folder),
            "method": method,
            "train": train,
            "dev": dev,
            "config": asdict(config) | {"sharding": sharding},
            "worlds": worlds,
        }
        for name, (model, method) in METHODS.items()
        for way, (sharding, worlds) in ways.items()
        if name == "full" or way != "moved"
    ]
    folder = tmp_path_factory.mktemp("worlds")
    helpers = Path(__file__).with_name("conftest.py")
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(helpers), str(folder), json.dumps(jobs)],
        env=os.environ | {"BATON_DEVICE": "cpu", "BATON_PEER_TIMEOUT": "60"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


def checkpoint(root, task, step=STEPS):
    return root / task / "train" / "checkpoints" / f"step-{step:06d}"


def weights(root, task, step=STEPS):
    file = f"{FOLDER}/{WEIGHTS}" if task.startswith("lora") else MODEL
    return load_tensors(checkpoint(root, task, step), file)


def curve(root, task):
    lines = read_lines(root / task / "train" / "metrics.jsonl")
    return [[line["step"], line.get("loss", 0), line.get("dev_loss", 0)] for line in lines]


def assert_same_within_rounding(root, task, other):
    # Shares of a sum are added in another order: some 1e-7 a step, times Adam's normalising.
    for ours, theirs in zip(curve(root, task), curve(root, other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = weights(root, task), weights(root, other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_model_trains_as_a_whole_one(root, method):
    assert_same_within_rounding(root, f"{method}-sharded", f"{method}-whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_the_bytes_of_one_that_was_not_interrupted(root, method):
    resumed, whole = (checkpoint(root, f"{method}-{way}") for way in ("resumed", "sharded"))
    files = sorted(p.relative_to(whole) for p in (whole / "shards").iterdir())
    assert [path.name for path in files] == [
        "00000-of-00002.safetensors",
        "00001-of-00002.safetensors",
    ]
    for file in [*files, Path("state.json")]:
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_and_with_more_processes(root):
    assert_same_within_rounding(root, "full-moved", "full-sharded")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_process_holds_a_share_of_weights_and_moments(root, method):
    [held, other] = [
        json.loads((root / f"{method}-sharded" / f"held-0-{rank}.json").read_text())
        for rank in range(2)
    ]
    trained = sum(t.numel() for t in weights(root, f"{method}-sharded").values())
    # Rows are shared out, so an odd number of them leaves one process a row more.
    assert held["weights"] + other["weights"] == held["all_weights"]
    assert held["weights"] <= 0.52 * held["all_weights"]
    for rank in (held, other):
        assert rank["moments"] == pytest.approx(trained, rel=0.05)


@pytest.mark.slow
def test_shards_hold_the_files_of_other_checkpoints(root):
    whole = checkpoint(root, "full-whole")
    for file in (MODEL, OPTIMIZER):
        ours, theirs = (
            load_tensors(checkpoint(root, f"full-{w}"), file) for w in ("sharded", "whole")
        )
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.items()
        }
        assert (whole / file).exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_whole_models_load_what_was_sharded(root, tiny, method):
    learner = tiny(*METHODS[method]).learner()
    learner.weights.load(checkpoint(root, f"{method}-sharded"))
    saved = weights(root, f"{method}-sharded")
    ours = learner.weights.tensors()
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in saved.items())


def state_of(module):
    """What of a module would be saved, with an optimizer that has done nothing."""
    return ShardedState(
        ranks=Ranks(0, 1, torch.device("cpu")),
        weights=FullWeights(module),
        optimizer=torch.optim.AdamW([torch.zeros(1)]),
        names={},
    )


def test_a_share_is_written_the_same_way_every_time(tmp_path):
    tensors = {f"file:{name}": torch.arange(6.0).view(2, 3) for name in "cab"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        state_of(torch.nn.ParameterDict(tensors)).save(tmp_path / name)
    [one, two] = sorted(tmp_path.rglob("*.safetensors"))
    assert one.read_bytes() == two.read_bytes()
    whole = load_tensors(tmp_path / "one", MODEL)
    assert {name: t.tolist() for name, t in whole.items()} == {
        name: t.tolist() for name, t in tensors.items()
    }


def test_a_share_that_cannot_be_written_is_an_error_of_the_store(tmp_path):
    (tmp_path / "shards").write_text("in the way")
    with pytest.raises(StoreError, match="writing a share of the checkpoint"):
        state_of(torch.nn.Linear(2, 2)).save(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    state_of(torch.nn.Linear(2, 2)).save(tmp_path)
    with pytest.raises(DamagedError, match="bias"):
        state_of(torch.nn.Linear(2, 2, bias=False)).load(tmp_path)
