"""Mixed precision on the CPU: it trains, and its scale comes back."""

from __future__ import annotations

import pytest
import torch

from baton.errors import ConfigError
from baton.stage import Outcome
from baton.train.metrics import read_lines
from baton.train.precision import Precision

CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_float32_without_scaling():
    precision = Precision.choose("auto", CPU)
    assert (precision.dtype, precision.scaler, precision.is_half) == (torch.float32, None, False)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_multiplies_in_16_bits_and_only_fp16_scales(name, dtype):
    precision = Precision.choose(name, CPU)
    assert (precision.scaler is not None) == precision.skips_steps == (name == "fp16")
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_loss_goes_down(name, method, task, settings, drawn):
    run = task("llama", method)
    source = drawn(4)
    config = settings(
        max_steps=20, precision=name, warmup_steps=2, learning_rate=5e-3, eval_every_steps=1000
    )
    loop = run.loop(config, source)
    assert loop.run() is Outcome.FINISHED
    losses = [line["loss"] for line in read_lines(run.root / "train" / "metrics.jsonl")]
    assert len(losses) == 20
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 for p in loop.parameters)


def test_an_infinite_gradient_skips_the_step_and_halves_the_scale():
    precision = Precision.choose("fp16", CPU)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = precision.state()["scale"]
    precision.backward((weight * float("inf")).sum())
    norm = precision.step(optimizer, [weight], 1.0)
    assert weight.tolist() == [1, 1, 1]
    assert not torch.isfinite(norm)
    assert precision.state()["scale"] == before / 2


def test_gradients_are_unscaled_before_they_are_clipped():
    precision = Precision.choose("fp16", CPU)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.backward((weight * torch.tensor([3.0, 4.0])).sum())
    norm = precision.step(optimizer, [weight], 1.0)
    assert norm.item() == pytest.approx(5)
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-4)


def test_the_state_of_the_scaler_comes_back():
    first = Precision.choose("fp16", CPU)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for factor in (1.0, float("inf"), 1.0, 1.0):
        first.backward((weight * factor).sum())
        first.step(optimizer, [weight], 1.0)
        optimizer.zero_grad()
    second = Precision.choose("fp16", CPU)
    second.load(first.state())
    assert second.state() == first.state()
    assert second.state()["_growth_tracker"] == 2


@pytest.mark.parametrize(("saved", "now"), [("fp16", "fp32"), ("bf16", "fp16")])
def test_another_precision_on_resuming_is_refused(saved, now):
    with pytest.raises(ConfigError) as caught:
        Precision.choose(now, CPU).load(Precision.choose(saved, CPU).state())
    assert str(caught.value) == "train.precision changed between legs: submit it as a new run"
