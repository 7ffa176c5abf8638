"""Learning rates and AdamW against transformers and plain torch."""

from __future__ import annotations

import pytest
import torch
import transformers

from baton.train.config import TrainConfig
from baton.train.optim import Schedule, build_optimizer, set_learning_rate
from baton.train.precision import Precision

PEAK = 3e-4


def by_transformers(make, steps, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = make(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 1), (0, 10), (1, 3), (3, 30), (10, 10), (7, 100)]
)
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_every_step_has_the_rate_that_transformers_gives_it(kind, warmup, total):
    steps = {"num_training_steps": total} if kind != "constant" else {}
    make = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
        "constant": transformers.get_constant_schedule_with_warmup,
    }[kind]
    expected = by_transformers(make, total, num_warmup_steps=warmup, **steps)
    schedule = Schedule(kind, PEAK, warmup, total)
    assert [schedule.at(step) for step in range(total)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("warmup", "total"), [(1, 4), (4, 20), (30, 100), (1024, 5000)])
def test_one_cycle_is_that_of_torch_with_the_warm_up_in_steps(warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK,
        total_steps=total,
        pct_start=(warmup + 1) / total,
        cycle_momentum=False,
    )
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < total:
            theirs.step()
    # torch ends at a 25 * 10,000th of the peak.
    schedule = Schedule("one_cycle", PEAK, warmup, total, 4e-6)
    assert [schedule.at(step) for step in range(total)] == pytest.approx(expected, rel=1e-9)


def test_a_floor_is_that_of_transformers_cosine_with_min_lr():
    make = transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup
    expected = by_transformers(make, 20, num_warmup_steps=4, num_training_steps=20, min_lr_rate=0.1)
    schedule = Schedule("cosine", PEAK, 4, 20, 0.1)
    assert [schedule.at(step) for step in range(20)] == pytest.approx(expected, abs=1e-15)


def test_three_steps_with_one_of_warmup_use_the_rates_of_the_clara_run():
    config = TrainConfig(learning_rate=1e-4, warmup_steps=1, min_lr_ratio=0.1)
    schedule = Schedule.of(config, 3)
    assert [schedule.at(step) for step in range(3)] == pytest.approx([0, 1e-4, 5.5e-5])


@pytest.mark.parametrize("total", [1, 5, 11, 100, 1875])
def test_a_warmup_ratio_is_rounded_up_as_in_transformers(total):
    config = TrainConfig(warmup_ratio=0.1)
    expected = transformers.TrainingArguments(output_dir="x", warmup_steps=0.1).get_warmup_steps(
        total
    )
    assert Schedule.of(config, total).warmup_steps == expected
    assert Schedule.of(TrainConfig(warmup_ratio=0.1, warmup_steps=3), total).warmup_steps == 3


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 11)
    )


def test_only_matrices_decay():
    model = network()
    optimizer = build_optimizer(model.named_parameters(), TrainConfig(weight_decay=0.1))
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    named = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert named == {"0.weight": 0.1, "1.weight": 0, "1.bias": 0, "2.weight": 0.1, "2.bias": 0}


def test_frozen_weights_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), TrainConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_updates_are_those_of_plain_adamw_with_clipping(clip):
    config = TrainConfig(weight_decay=0.1, betas=(0.9, 0.95), learning_rate=1e-2)
    ours, theirs = network(), network()
    precision = Precision.choose("fp32", torch.device("cpu"))
    optimizer = build_optimizer(ours.named_parameters(), config)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(6):
        rate = 1e-2 / (step + 1)
        ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            logits = model(ids[:, :-1])
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).backward()
        squares = sum(p.grad.double().pow(2).sum() for p in theirs.parameters())
        set_learning_rate(optimizer, rate)
        norm = precision.step(optimizer, list(ours.parameters()), clip)
        optimizer.zero_grad()
        assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-5)
        for group in plain.param_groups:
            group["lr"] = rate
        if clip:
            for p in theirs.parameters():
                p.grad.mul_(min(1.0, clip / (squares.sqrt().item() + 1e-6)))
        plain.step()
        plain.zero_grad()
        for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(our, their, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_adafactor_is_that_of_transformers_at_the_rate_it_is_given(rate):
    config = TrainConfig(optimizer="adafactor", learning_rate=1.0, weight_decay=0.1)
    ours, theirs = network(), network()
    optimizer = build_optimizer(ours.named_parameters(), config)
    plain = transformers.Adafactor(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=rate,
        scale_parameter=False,
        relative_step=False,
    )
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        for model in (ours, theirs):
            logits = model(ids[:, :-1])
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).backward()
        set_learning_rate(optimizer, rate)
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(our, their)


def test_the_first_update_of_adafactor_grows_with_the_rate():
    moved = []
    for rate in (1e-4, 1e-3, 1.0):
        model = network()
        before = model[2].weight.detach().clone()
        optimizer = build_optimizer(model.named_parameters(), TrainConfig(optimizer="adafactor"))
        model(torch.tensor([[1, 2, 3]])).square().sum().backward()
        set_learning_rate(optimizer, rate)
        optimizer.step()
        moved.append((model[2].weight - before).norm().item())
    assert moved[1] / moved[0] == pytest.approx(10, rel=1e-2)
    assert moved[2] / moved[0] == pytest.approx(10_000, rel=1e-2)
