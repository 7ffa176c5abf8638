"""The policy that a stage began with, in the place of the one that it became."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Reference:
    """A copy of what is trained of a model, taken when this is made; adapters are small."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._begin = [p.detach().clone() for p in self._trained]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put the copy in place; every bit of what was there is back afterwards."""
        now = [p.detach().clone() for p in self._trained]
        self._put(self._begin)
        try:
            yield
        finally:
            self._put(now)

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._trained, values, strict=True):
                parameter.copy_(value)
