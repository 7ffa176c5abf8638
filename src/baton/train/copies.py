"""16-bit copies of float32 weights: made by a few kernels a pass, some side by side as one.

Autocast makes them layer by layer, and casts the gradients back layer by layer: hundreds of kernels
that take less time than launching them does. Parameters stay what and where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Copies:
    """Copies of the linear layers' weights in one stack of layers.

    They are fresh in every pass that learns, of the kind that autocast computes in; in any other
    they are not used. Without autocast they are of the weights' own kind.
    """

    def __init__(self, stack: torch.nn.Module) -> None:
        self.readers: list[tuple[torch.nn.Module, str, list[torch.nn.Linear]]] = []
        stack.register_forward_pre_hook(self._renew)

    def add(self, reader: torch.nn.Module, name: str, layers: Sequence[torch.nn.Linear]) -> None:
        """Let `reader` find, as its attribute `name`, these weights one below the other."""
        self.readers.append((reader, name, list(layers)))

    def add_others(self, network: torch.nn.Module) -> None:
        """Let all linear layers in `network` that nobody reads yet compute with their copies."""
        known = {layer for _, _, layers in self.readers for layer in layers}
        for module in network.modules():
            if type(module) is torch.nn.Linear and module not in known:
                module.__class__ = CopiedLinear
                self.add(module, "copied", [module])

    def _renew(self, stack: torch.nn.Module, _: Any) -> None:
        if not torch.is_grad_enabled():
            return
        weights = [[layer.weight for layer in layers] for _, _, layers in self.readers]
        masters = [weight for group in weights for weight in group]
        kind, device = masters[0].dtype, masters[0].device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
        rows = [[len(weight) for weight in group] for group in weights]
        columns = [group[0].shape[1] for group in weights]
        made = _Copy.apply(kind, rows, columns, *masters)
        for (reader, name, _), copy in zip(self.readers, made, strict=True):
            setattr(reader, name, copy)


class CopiedLinear(torch.nn.Linear):  # type: ignore[misc]
    """A linear layer that learns by the copy of its weight."""

    copied: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.copied if torch.is_grad_enabled() else self.weight
        return torch.nn.functional.linear(x, weight, self.bias)


class _Copy(torch.autograd.Function):  # type: ignore[misc]
    """Stacked copies of weights, and float32 gradients from those of the copies."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: torch.dtype,
        rows: list[list[int]],
        columns: list[int],
        *masters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.rows, ctx.kind = rows, masters[0].dtype
        ctx.set_materialize_grads(False)
        copies = [
            masters[0].new_empty(sum(group), width, dtype=kind)
            for group, width in zip(rows, columns, strict=True)
        ]
        parts = [part for x, group in zip(copies, rows, strict=True) for part in x.split(group)]
        torch._foreach_copy_(parts, masters)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        made = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=ctx.kind) for grad in made]
        torch._foreach_copy_(wide, made)
        rest = iter(wide)
        found: list[torch.Tensor | None] = []
        for grad, group in zip(grads, ctx.rows, strict=True):
            found += [None] * len(group) if grad is None else next(rest).split(group)
        return None, None, None, *found
