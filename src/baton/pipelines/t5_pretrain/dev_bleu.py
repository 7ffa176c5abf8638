"""Character BLEU of greedy answers to the first validation pairs, taken during training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.eval.bleu import char_statistics, corpus_bleu
from baton.eval.config import GenerateConfig
from baton.eval.generate import generate_responses
from baton.pipelines.t5_pretrain.data import Pair
from baton.record import dump_json
from baton.stage import Leg
from baton.train.layers import plain_layers
from baton.train.ranks import Ranks
from baton.tuning.best import TRAIN

NAME = "dev_bleu"


@dataclass(frozen=True, kw_only=True)
class DevBleu:
    """A `DevScore`. What a batch contributes is kept, so that a handover costs one batch.

    Attributes:
        prompts: tokens of each pair's prompt, as the encoder takes them.
        config: how answers are generated, and how many at once.
    """

    leg: Leg
    ranks: Ranks
    network: Any
    tokenizer: Any
    pairs: Sequence[Pair]
    prompts: Sequence[Sequence[int]]
    config: GenerateConfig

    def take(self, step: int) -> dict[str, float] | None:
        """Corpus BLEU-4 over characters, 0..100, with the standard brevity penalty."""
        size, ranks = self.config.batch_size, self.ranks
        batches = range(0, len(self.pairs), size)
        prefix = f"{TRAIN}/shards/{NAME}-{step:06d}-"
        kept = {name for name in self._names() if name.startswith(prefix)}
        missing = [start for start in batches if self._shard(prefix, start) not in kept]
        mine = missing[ranks.rank :: ranks.size]
        # Every rank asks equally often, whatever is left for it to do.
        for number in range(-(-len(missing) // ranks.size)):
            # Each leg does a little, or legs that are stopped at once would stand still here.
            if ranks.agree(self.leg.stop.is_set and number > 0)[0]:
                return None
            if number < len(mine) and not self._answer(prefix, mine[number]):
                break
        if ranks.agree(self.leg.stop.is_urgent)[0]:
            return None
        bleu = self._total(prefix, batches) if self.leg.is_first else None
        return {NAME: float(ranks.broadcast(bleu))}

    def _answer(self, prefix: str, start: int) -> bool:
        """Answer one batch and keep what it adds; False if there was no time for it."""
        span = slice(start, start + self.config.batch_size)
        with plain_layers(self.network):
            answers = generate_responses(
                self.network,
                self.tokenizer,
                self.prompts[span],
                self.config,
                should_stop=lambda: self.leg.stop.is_urgent,
            )
        if answers is None:
            return False
        references = [pair.response for pair in self.pairs[span]]
        sums = char_statistics(answers.texts, references).sum(axis=0)
        self.leg.store.write(self._shard(prefix, start), dump_json(sums.tolist()))
        return True

    def _total(self, prefix: str, batches: Sequence[int]) -> float:
        names = [self._shard(prefix, start) for start in batches]
        rows = [json.loads(self.leg.store.read(name)) for name in names]
        for name in names:
            self.leg.store.delete(name)
        return corpus_bleu(np.array(rows, dtype=np.int64))

    def _names(self) -> Sequence[str]:
        return list(self.leg.store.names(f"{TRAIN}/shards"))

    def _shard(self, prefix: str, start: int) -> str:
        return f"{prefix}{start:06d}.json"
