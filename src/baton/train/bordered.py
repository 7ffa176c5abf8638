"""A frozen weight with an adapter on its border, so that one matrix product computes both.

    E = [W B]      [x | x A^T] [W | B]^T = x W^T + x A^T B^T      g [W | B] = [g W | g B]
        [A .]      [g | g B] [W]
                             [A] = g W + g B A

A thin product by itself reads or writes as much as a wide one, for almost no arithmetic. The border
is scratch space: whoever multiplies fills it first, since several adapters may share a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from baton.train import quantize
from baton.train.dropout import drop, drop_product
from baton.train.launchable import HAS_TRITON, can_launch

kernels: Any = None
if HAS_TRITON:
    from baton.train import bordered_kernels as kernels

# 128 bytes: rows then start where a GPU's memory transactions do, without which a product takes
# up to a fifth longer (rows of 2,080 against 2,112 values, on an H200).
_STEP = 64


def border_of(rank: int, device: torch.device) -> int:
    """Rows and columns that a border for so many ranks takes."""
    return -(-rank // _STEP) * _STEP if device.type == "cuda" else rank


def with_border(weights: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """Weights of one input one below the other, with an empty border for adapters of `rank`."""
    rows, columns = sum(len(w) for w in weights), weights[0].shape[1]
    room = border_of(rank, weights[0].device)
    wide = weights[0].new_zeros(rows + room, columns + room)
    torch.cat([w.detach() for w in weights], out=wide[:rows, :columns])
    return wide


@dataclass(frozen=True)
class Bordered:
    """A weight `(out, in)` with A and B on its border, filled up with zeros to `room` ranks.

    It lies in memory that the next adapter may use.
    """

    wide: torch.Tensor
    rows: int
    columns: int

    @classmethod
    def filled(cls, weight: Sequence[torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> Bordered:
        """Put `a`, `(rank, in)`, and `b`, `(out, rank)`, on the border of a weight.

        `weight` is one dense tensor, made by `with_border` or without a border, or the parts of
        an NF4 one.
        """
        (rank, columns), rows = a.shape, len(b)
        room = border_of(rank, b.device)
        held = weight[0].data if len(weight) == 1 else b.new_empty(0, 0)
        if len(held) >= rows + room and held.shape[1] >= columns + room:
            # Detached: what autograd has saved is W, which stays as it was.
            wide = held[: rows + room, : columns + room]
            wide[:rows, columns : columns + rank] = b
        else:
            wide = b.new_empty(rows + room, columns + room)
            parts = quantize.dense(weight, rows, columns, b.dtype), pad(b, (0, room - rank))
            # Several times as fast as to write into a part of the columns.
            torch.cat(parts, 1, out=wide[:rows])
        wide[rows : rows + rank, :columns] = a
        if rank < room:
            # So that what another adapter left in B's columns counts nothing.
            wide[rows + rank :, :columns] = 0
        return cls(wide, rows, columns)

    def thin(
        self, x: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0, first: int = 0
    ) -> torch.Tensor:
        """`drop(x) A^T`, `(tokens, room)`, zeros after its ranks; of rows from `first` on."""
        a = self.wide[self.rows :, : self.columns]
        return x @ a.T if seed is None else drop_product(x, a, seed, p, first)

    def outputs(self, x: torch.Tensor, thin: torch.Tensor) -> torch.Tensor:
        """`x W^T + thin B^T`, `(tokens, out)`."""
        return torch.cat((x, thin), 1) @ self.wide[: self.rows].T

    def outputs_of(self, held: torch.Tensor, out: torch.Tensor) -> None:
        """The same of `[x | thin]` where these lie side by side already, into `out`."""
        torch.mm(held, self.wide[: self.rows].T, out=out)

    def gradient_parts(self, grad: torch.Tensor) -> torch.Tensor:
        """`[g W | g B]`, `(tokens, in + room)`."""
        return grad @ self.wide[: self.rows]

    def gradient(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`g W + g B A`, `(tokens, in)`, and `g B`, `(tokens, room)`."""
        thin = grad @ self.wide[: self.rows, self.columns :]
        return torch.cat((grad, thin), 1) @ self.wide[:, : self.columns], thin


def input_gradient(
    beside: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, p: float
) -> torch.Tensor:
    """`g W + drop(g B @ a)`, `(tokens, in)`.

    Args:
        beside: `[g W | g B]`, `(tokens, in + room)`, as `gradient_parts` gives it.
        a: `(rank, in)`.
        seed, p: of the dropout through which the adapter read its input; None without.
    """
    if can_launch(beside):
        made: torch.Tensor = kernels.input_gradient(beside, a, seed, p)
        return made
    (rank, columns) = a.shape
    added = beside[:, columns : columns + rank] @ a
    return beside[:, :columns] + (added if seed is None else drop(added, seed, p))
