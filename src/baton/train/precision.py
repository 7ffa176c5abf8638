"""Mixed precision: float32 masters, 16-bit matrix products, and fp16's loss scaling."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from baton.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """How one run computes; `scaler` exists for fp16 only."""

    dtype: torch.dtype
    device: torch.device
    scaler: torch.amp.GradScaler | None

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """`auto` is bf16 where the GPU computes in it, else fp16; float32 on a CPU."""
        if name == "auto":
            if device.type != "cuda":
                name = "fp32"
            else:
                native = torch.cuda.is_bf16_supported(including_emulation=False)
                name = "bf16" if native else "fp16"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
        scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
        return cls(dtype, device, scaler)

    @property
    def is_half(self) -> bool:
        return bool(self.dtype != torch.float32)

    @property
    def skips_steps(self) -> bool:
        """Does an infinite gradient mean a smaller scale rather than an error?"""
        return self.scaler is not None

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if not self.is_half:
            return contextlib.nullcontext()
        casts: contextlib.AbstractContextManager[None] = torch.autocast(
            self.device.type, self.dtype
        )
        return casts

    def backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.nn.Parameter],
        clip_norm: float,
    ) -> torch.Tensor:
        """Clip and update. Returns the gradient norm before clipping, still on the device.

        A `clip_norm` of 0 clips nothing.
        """
        if self.scaler:
            self.scaler.unscale_(optimizer)
        limit = clip_norm or float("inf")
        norm: torch.Tensor = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if isinstance(norm, DTensor):
            # Of a sharded model: from every rank's share.
            norm = norm.full_tensor()
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        return norm.detach().float()

    def state(self) -> dict[str, float] | None:
        """What of the loss scaling a checkpoint must hold."""
        return dict(self.scaler.state_dict()) if self.scaler else None

    def load(self, state: dict[str, float] | None) -> None:
        if (state is None) != (self.scaler is None):
            raise ConfigError("train.precision changed between legs: submit it as a new run")
        if self.scaler and state:
            whole = ("growth_interval", "_growth_tracker")
            self.scaler.load_state_dict({k: int(v) if k in whole else v for k, v in state.items()})
