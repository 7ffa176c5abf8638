"""The learning rate at a step, in closed form, and the optimizer it drives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers.optimization import Adafactor

from baton.train.config import TrainConfig

_ONE_CYCLE_DIVISOR = 25.0


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step: nothing to save, nothing to restore.

    Warm-up is linear from 0 and reaches `peak` at step `warmup_steps`; step 0 of a run with
    warm-up therefore uses a rate of 0, as in transformers' schedules. `one_cycle` rises along a
    cosine from a 25th of the peak, as torch's OneCycleLR does by default, and reaches its floor
    at the last step (Smith and Topin, 2018).
    """

    kind: str
    peak: float
    warmup_steps: int
    total_steps: int
    min_ratio: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> Schedule:
        warmup = config.warmup_steps
        if warmup is None:
            warmup = math.ceil(config.warmup_ratio * total_steps)
        return cls(config.schedule, config.learning_rate, warmup, total_steps, config.min_lr_ratio)

    def at(self, step: int) -> float:
        """The rate that the update of `step` (0-based) uses."""
        if self.kind == "one_cycle":
            return self._one_cycle(step)
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        left = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / left)
        share = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * share)

    def _one_cycle(self, step: int) -> float:
        start, end = self.peak / _ONE_CYCLE_DIVISOR, self.peak * self.min_ratio
        if step < self.warmup_steps:
            return _along_cosine(start, self.peak, step / self.warmup_steps)
        left = max(1, self.total_steps - 1 - self.warmup_steps)
        return _along_cosine(self.peak, end, min(1.0, (step - self.warmup_steps) / left))


def _along_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW or Adafactor over named parameters; no weight decay on biases and norms (vectors).

    AdamW is fused where the device has it: one kernel a step instead of a dozen a tensor.
    Adafactor (Shazeer and Stern, 2018) is used with `relative_step` and `scale_parameter` off:
    the rate of the schedule is the rate of the update. torch's own Adafactor caps the rate at
    1/sqrt(step) and scales it by the weights, so that a schedule has little to say.
    """
    named = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adafactor":
        return Adafactor(
            groups, lr=config.learning_rate, scale_parameter=False, relative_step=False
        )
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
