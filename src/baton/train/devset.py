"""The dev loss at a step, taken in pieces that outlive the leg that took them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.record import dump_json
from baton.stage import Leg
from baton.train.batch import TokenSource
from baton.train.batching import Batching, shortest
from baton.train.cursor import Indices
from baton.train.ranks import Ranks

# A kill without a word costs at most so much of an evaluation.
_KEEP_EVERY_SECONDS = 60.0


@dataclass(kw_only=True)
class DevSet:
    """Evaluates `source` with `loss`, the summed loss of the samples of one micro-batch.

    An evaluation may take longer than a leg lasts. What is done when a handover cuts it off is
    kept below `<folder>/shards`, and the next leg goes on from there to the same sum.

    `together`: a rank computes whenever any other does, because each has a share of the model.
    """

    leg: Leg
    ranks: Ranks
    folder: str
    source: TokenSource
    batching: Batching
    loss: Callable[[Indices], torch.Tensor]
    together: bool = False

    def mean_loss(self, step: int, *, budget: int) -> float | None:
        """Mean loss per labelled token at `step`, or None when asked to stop before the end.

        `budget` is the tokens of a micro-batch. Every rank must call this.
        """
        indices = np.arange(len(self.source))
        shares = self.batching.cut(self.source, indices, ranks=self.ranks.size, budget=budget)
        mine = shares[self.ranks.rank]
        who = f"{self.ranks.rank}of{self.ranks.size}"
        prefix = f"{self.folder}/shards/dev-{step:06d}-{budget}-{who}-"
        first, total = self._kept(prefix)
        done, kept_at = first, time.monotonic()
        # Ranks may have kept different numbers; all must ask each other equally often.
        begin = min(self.ranks.gather(first)) if self.together else 0
        for number in range(begin, max(map(len, shares))):
            # Each leg does a little, or legs that are stopped at once would stand still here.
            if self.ranks.agree(self.leg.stop.is_set and done > first)[0]:
                self._keep(prefix, done, total)
                return None
            if done <= number < len(mine):
                total += float(self.loss(indices[mine[number]]))
                done = number + 1
                if time.monotonic() - kept_at > _KEEP_EVERY_SECONDS:
                    self._keep(prefix, done, total)
                    kept_at = time.monotonic()
            elif self.together:
                self.loss(shortest(self.source, indices))
        labelled = int(self.source.labelled(indices).sum())
        mean = self.ranks.sum([total])[0] / labelled
        self._forget(prefix)
        return mean

    def _kept(self, prefix: str) -> tuple[int, float]:
        """Micro-batches done by earlier legs, and their summed loss."""
        names = self._names(prefix)
        if not names:
            return 0, 0.0
        kept = json.loads(self.leg.store.read(names[-1]))
        return int(kept["done"]), float(kept["total"])

    def _keep(self, prefix: str, done: int, total: float) -> None:
        if done:
            self.leg.store.write(
                f"{prefix}{done:06d}.json", dump_json({"done": done, "total": total})
            )

    def _forget(self, prefix: str) -> None:
        for name in self._names(prefix):
            self.leg.store.delete(name)

    def _names(self, prefix: str) -> Sequence[str]:
        every = self.leg.store.names(f"{self.folder}/shards")
        return sorted(name for name in every if name.startswith(prefix))
