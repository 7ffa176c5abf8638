"""Two processes over gloo: they agree, their gradients add up, and training is that of one."""

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
from safetensors.torch import load_file

from baton.train.config import TrainConfig
from baton.train.ranks import Ranks

CPU = torch.device("cpu")

# What each of the two processes does; its findings go to a file.
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
    from baton.train import ranks as module
    from baton.train.config import AdapterConfig, TrainConfig
    from baton.train.ranks import Ranks

    # Importing takes most of the time, so the second process is a fork made after it.
    child = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if child == 0 else "0"
    root, model = Path(sys.argv[2]), Path(sys.argv[3])
    ranks = Ranks.join()
    me = ranks.rank
    found = {"rank": me, "size": ranks.size}
    found["agree"] = [ranks.agree(me == 1, False, True), ranks.agree(False), ranks.agree(me == 0)]
    found["broadcast"] = [
        ranks.broadcast({"step": 7, "text": "长"} if me == 0 else None),
        ranks.broadcast(None),
        ranks.broadcast([] if me == 0 else "not mine"),
    ]
    found["sum"] = ranks.sum([1.5 + me, 1e-300, 2.0**53])
    module._BUCKET_ELEMENTS = 10
    shapes = [(3, 2), (4,), (30,), (), (2, 2)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.append(torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    for number, parameter in enumerate(parameters):
        if (me, number) != (1, 1) and number != 4:
            generator = torch.Generator().manual_seed(10 * me + number)
            parameter.grad = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
    ranks.sum_gradients(parameters)
    found["gradients"] = [parameter.grad.tolist() for parameter in parameters]

    for job in json.loads(sys.argv[4]):
        train = helpers.Samples([tuple(row) for row in job["train"]])
        dev = helpers.Samples([tuple(row) for row in job["dev"]])
        run = helpers.Run(root / job["name"], helpers.Tiny(model, AdapterConfig(method="full")))
        loop = run.loop(TrainConfig(**job["config"]), train, dev, ranks=ranks)
        found[job["name"]] = loop.run().value
    (root / f"{me}.json").write_text(json.dumps(found))
    ranks.leave()
    if child:
        assert os.waitpid(child, 0)[1] == 0
    """
)


@pytest.fixture(scope="module")
def jobs(drawn, settings):
    """Trainings to be done by two processes and by one."""
    even, odd = drawn(12, seed=4, low=4, high=30), drawn(5, seed=5)
    plain = settings(max_steps=4, batch_samples=5, eval_every_steps=2, learning_rate=1e-3)
    single = settings(max_steps=3, batch_samples=1, tokens_per_micro_batch=8, learning_rate=1e-3)
    return [
        {"name": "uneven", "train": even.rows, "dev": odd.rows, "config": asdict(plain)},
        {"name": "one_sample", "train": even.rows, "dev": odd.rows[:1], "config": asdict(single)},
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny, jobs):
    """What two processes found, and the folder they worked in."""
    root = tmp_path_factory.mktemp("pair")
    for job in jobs:
        (root / job["name"]).mkdir()
    helpers = Path(__file__).with_name("conftest.py")
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "BATON_DEVICE": "cpu",
        "BATON_RENDEZVOUS": f"file://{root}/rendezvous",
        "BATON_PEER_TIMEOUT": "60",
    }
    arguments = [str(helpers), str(root), str(tiny("llama").folder), json.dumps(jobs)]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root, [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_a_flag_of_any_rank_is_seen_by_all(pair):
    for found in pair[1]:
        assert found["agree"] == [[True, False, True], [False], [True]]


@pytest.mark.slow
def test_the_first_rank_speaks_for_all(pair):
    for found in pair[1]:
        assert found["broadcast"] == [{"step": 7, "text": "长"}, None, []]


@pytest.mark.slow
def test_sums_are_in_float64_over_ranks(pair):
    for found in pair[1]:
        assert found["sum"] == [4.0, 2e-300, 2.0**54]


@pytest.mark.slow
def test_every_gradient_becomes_its_sum_and_a_missing_one_counts_as_zero(pair):
    def drawn(rank, number, shape, dtype=torch.float32):
        if (rank, number) == (1, 1) or number == 4:
            return torch.zeros(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(10 * rank + number)
        return torch.randn(shape, generator=generator, dtype=dtype)

    shapes = [(3, 2), (4,), (30,), (), (2, 2)]
    expected = [drawn(0, i, shape) + drawn(1, i, shape) for i, shape in enumerate(shapes)]
    expected.append(drawn(0, 5, (3,), torch.float64) + drawn(1, 5, (3,), torch.float64))
    for found in pair[1]:
        assert found["gradients"] == [value.tolist() for value in expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uneven", "one_sample"])
def test_two_processes_train_like_one(name, pair, jobs, task, samples):
    root, found = pair
    job = next(job for job in jobs if job["name"] == name)
    alone = task("llama")
    config = TrainConfig(**job["config"])
    train, dev = (samples([tuple(row) for row in job[key]]) for key in ("train", "dev"))
    assert alone.loop(config, train, dev).run().value == found[0][name] == found[1][name]

    def lines(folder):
        path = folder / "train" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    ours, theirs = lines(alone.root), lines(root / name)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    assert any("dev_loss" in line for line in ours)
    for our, their in zip(ours, theirs, strict=True):
        assert their == pytest.approx(our, rel=1e-5 if "grad_norm" in our else 1e-6)
    last = f"train/checkpoints/step-{config.max_steps:06d}/model.safetensors"
    one, two = load_file(alone.root / last), load_file(root / name / last)
    for key, value in one.items():
        assert torch.allclose(two[key], value, rtol=1e-4, atol=1e-5), key


def test_one_process_needs_no_group():
    ranks = Ranks(0, 1, CPU)
    assert ranks.agree(True, False) == (True, False)
    assert ranks.broadcast("x") == "x"
    assert ranks.sum([0.1, 0.2]) == [0.1, 0.2]
    parameter = torch.nn.Parameter(torch.ones(2))
    ranks.sum_gradients([parameter])
    assert parameter.grad is None
    ranks.leave()
