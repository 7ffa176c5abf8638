"""What a run says of itself: losses watched for NaN, logged lines, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from baton.errors import NonFiniteError
from baton.stage import Leg
from baton.train.metrics import Metrics
from baton.train.ranks import Ranks
from baton.train.speed import Speed
from baton.train.state import TrainState


@dataclass(kw_only=True)
class Journal:
    """Keeps the losses of the last steps on the device until somebody has to know them.

    Reading a loss makes a GPU wait, so it happens at logged steps, evaluations and saves
    only. A loss that is not a number is therefore noticed late, but always before a
    checkpoint could hold it.

    Attributes:
        samples_of: sample indices of a step, to name in an error.
        allow_infinite_norm: fp16 skips such a step and lowers its scale.
    """

    leg: Leg
    ranks: Ranks
    metrics: Metrics
    samples_of: Callable[[int], list[int]]
    allow_infinite_norm: bool
    speed: Speed = field(default_factory=Speed)
    _unread: list[tuple[int, torch.Tensor, torch.Tensor, Mapping[str, float]]] = field(
        default_factory=list
    )

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        norm: torch.Tensor,
        figures: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Note the loss of this rank's share and the gradient norm of a finished step.

        `figures` are logged beside them, as means over the same steps.
        """
        self._unread.append((step, loss, norm, figures))

    def read(self, state: TrainState) -> None:
        """Move the noted losses into the state's window; every rank must call this.

        Raises:
            NonFiniteError: one of them is not a number; names the step and its samples.
        """
        if not self._unread:
            return
        rows = torch.stack(
            [torch.stack((loss, norm)) for _, loss, norm, _ in self._unread]
        ).tolist()
        losses = self.ranks.sum([loss for loss, _ in rows])
        for (step, _, _, figures), loss, (_, norm) in zip(self._unread, losses, rows, strict=True):
            finite_norm = math.isfinite(norm)
            if not math.isfinite(loss) or not (finite_norm or self.allow_infinite_norm):
                raise NonFiniteError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}, on training"
                    f" samples {self.samples_of(step - 1)}; the last checkpoint is from before it."
                    " Lower train.learning_rate, use precision: bf16 or fp32, or look at those"
                    " samples"
                )
            # JSON has no infinity: a step that fp16 skipped has no norm to average.
            state.window.append([loss, norm if finite_norm else 0.0])
            for name, value in figures.items():
                state.figures.setdefault(name, []).append(value)
        self._unread.clear()

    def log(self, state: TrainState, *, learning_rate: float, epoch: float, total: int) -> None:
        """Write the line of a logged step: means since the last one."""
        self.read(state)
        losses, norms = zip(*state.window, strict=True)
        figures = {name: math.fsum(v) / len(v) for name, v in state.figures.items()}
        state.window.clear()
        state.figures.clear()
        values = {
            "loss": math.fsum(losses) / len(losses),
            "grad_norm": math.fsum(norms) / len(norms),
            "learning_rate": learning_rate,
            "epoch": epoch,
            "samples": state.samples,
            "tokens": state.tokens,
            **figures,
        }
        speed = self.speed.recent()
        if self.leg.is_first:
            self.metrics.write(state.step, values, {"tokens_per_s": speed})
        self.leg.report(loss=values["loss"], tokens_per_s=speed)
        self.leg.log(
            "step",
            step=f"{state.step}/{total}",
            loss=values["loss"],
            lr=learning_rate,
            grad_norm=values["grad_norm"],
            tokens_per_s=round(speed),
            **figures,
        )

    def evaluated(self, state: TrainState, loss: float, scores: Mapping[str, float]) -> None:
        """Write the dev loss of a finished evaluation, and the scores of its answers."""
        values: dict[str, Any] = {"dev_loss": loss, **scores}
        if self.leg.is_first:
            self.metrics.write(state.step, values, {})
        self.leg.log("evaluated", step=state.step, **values)
        self.leg.report(**values)

    def report(self, state: TrainState, total: int, **values: Any) -> None:
        """Say how far the run is."""
        left = self.speed.seconds_per_step() * (total - state.step)
        self.leg.report(step=state.step, total=total, eta_seconds=round(left, 1), **values)
