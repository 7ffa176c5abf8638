"""The sequences that are being written, on the device: one row each, the busy ones in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from baton.generation.pages import PAGE


@dataclass
class Rows:
    """What a decoding step reads and writes; every tensor has a row for each sequence.

    Attributes:
        token: int64, the newest token, which the next step feeds to the model.
        position: int64, where that token stands.
        said: int64, how many new tokens there are.
        done: bool; a row that is done does nothing more until it is taken away.
        seed: int64, see `draw.choose`.
        table: `(rows, pages)` int32, the pages of the sequence.
        answer: `(rows, most)` int64, the new tokens.
        seen: `(rows, vocabulary)` bool, tokens of prompt and answer; of no width if unused.
    """

    token: torch.Tensor
    position: torch.Tensor
    said: torch.Tensor
    done: torch.Tensor
    seed: torch.Tensor
    table: torch.Tensor
    answer: torch.Tensor
    seen: torch.Tensor

    @classmethod
    def empty(
        cls, count: int, *, pages: int, most: int, vocabulary: int, device: torch.device
    ) -> Rows:
        """`count` rows for answers of at most `most` tokens on at most `pages` pages."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            token=zeros(count),
            position=zeros(count),
            said=zeros(count),
            done=torch.ones(count, dtype=torch.bool, device=device),
            seed=zeros(count),
            table=zeros(count, pages, dtype=torch.int32),
            answer=zeros(count, most),
            seen=zeros(count, vocabulary, dtype=torch.bool),
        )

    def between(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, as views."""
        return Rows(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    def keep(self, kept: Sequence[int]) -> None:
        """Move these rows to the front, in their order, and call the others done."""
        rows = torch.tensor(kept, dtype=torch.int64, device=self.token.device)
        for field in fields(self):
            tensor = getattr(self, field.name)
            tensor[: len(kept)] = tensor[rows]
        self.done[len(kept) :] = True

    def slots(self) -> torch.Tensor:
        """Where the newest token's key and value go: `(rows,)` int64; on page 0 if done."""
        pages = self.table.gather(1, (self.position // PAGE)[:, None]).squeeze(1)
        return torch.where(self.done, 0, pages.long() * PAGE + self.position % PAGE)

    def context(self) -> torch.Tensor:
        """Tokens of each sequence, the newest included: `(rows,)` int32."""
        return torch.where(self.done, 1, self.position + 1).int()

    def advance(self, chosen: torch.Tensor, ends: torch.Tensor) -> None:
        """Take `chosen`, `(rows,)` int64, as the next tokens; a row may be done by it."""
        goes_on = ~self.done
        most = self.answer.shape[1]
        place = self.said.clamp(max=most - 1)[:, None]
        before = self.answer.gather(1, place)
        self.answer.scatter_(1, place, torch.where(goes_on[:, None], chosen[:, None], before))
        if self.seen.shape[1]:
            self.seen.scatter_(1, chosen[:, None], True)
        self.said += goes_on
        self.position += goes_on
        self.token.copy_(torch.where(goes_on, chosen, self.token))
        self.done |= (chosen[:, None] == ends).any(dim=1) | (self.said >= most)
