"""Completions drawn on the way: what a step of GRPO trains on, kept so that any leg can go on.

A batch is a function of (seed, step), the weights and the batches before it. It is written to
`<stage>/rollouts/` before the first update on it, whole, with the log-probabilities that later
updates need; a leg that starts between two updates reads it, one that starts before it draws it
again, and finds the same.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from baton.errors import DamagedError, DataError
from baton.pipelines.questions_gen.config import GrpoConfig
from baton.pipelines.questions_gen.grpo_loss import Drawn, GrpoLoss, advantages, token_weights
from baton.pipelines.questions_gen.problem import read_problem
from baton.pipelines.questions_gen.prompts import KINDS, Request
from baton.pipelines.questions_gen.scoring import Scored, Scorer
from baton.record import dump_json
from baton.stage import Leg
from baton.train.batch import PackedBatch, TokenSource
from baton.train.batching import Packed
from baton.train.cursor import Cursor, Indices
from baton.train.loop import mix_seed
from baton.train.ranks import Ranks

_FIGURES = ("reward", "keyword", "independent")
_PROMPTS, _KINDS = 1, 2


@dataclass(kw_only=True)
class Batch:
    """One batch of completions, those of a prompt side by side; float arrays are `(tokens,)`."""

    step: int
    prompts: list[list[int]]
    asked: list[str]
    completions: list[list[int]]
    texts: list[str]
    scored: list[dict[str, Any]]
    advantages: list[float]
    old: list[np.ndarray[Any, Any]] | None = None
    reference: list[np.ndarray[Any, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "prompts": self.prompts,
            "asked": self.asked,
            "completions": self.completions,
            "texts": self.texts,
            "scored": self.scored,
            "advantages": self.advantages,
            "old": _packed(self.old),
            "reference": _packed(self.reference),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Batch:
        arrays = {name: _unpacked(values[name]) for name in ("old", "reference")}
        return cls(**{**values, **arrays})


def _packed(arrays: list[np.ndarray[Any, Any]] | None) -> list[str] | None:
    """Every bit of the numbers, in a third of the space of digits."""
    if arrays is None:
        return None
    return [base64.b64encode(array.astype("<f4").tobytes()).decode() for array in arrays]


def _unpacked(texts: list[str] | None) -> list[np.ndarray[Any, Any]] | None:
    if texts is None:
        return None
    return [np.frombuffer(base64.b64decode(text), dtype="<f4").copy() for text in texts]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What draws completions and says how likely they are.

    Attributes:
        sample: `(prompts, count, seeds)` to completions, None where there was no time; see
            `Sampler.draw`.
        encode: requests to prompt tokens; None for one that does not fit.
        decode: completions to texts, without special tokens.
        logprobs: of the labels of samples under the weights as they are, an array for each.
        reference: the same under the weights that the stage began with.
    """

    sample: Callable[[list[list[int]], int, list[int]], list[list[int]] | None]
    encode: Callable[[Sequence[Request]], list[list[int] | None]]
    decode: Callable[[list[list[int]]], list[str]]
    logprobs: Callable[[TokenSource, Indices], list[np.ndarray[Any, Any]]]
    reference: Callable[[TokenSource, Indices], list[np.ndarray[Any, Any]]]


@dataclass(kw_only=True)
class Rollouts:
    """A `TokenSource` of the batch at hand, its `Maker`, and the batching that goes with both."""

    leg: Leg
    ranks: Ranks
    folder: str
    config: GrpoConfig
    requests: Sequence[Request]
    policy: Policy
    scorer: Scorer
    loss: GrpoLoss
    packed: Packed

    def __post_init__(self) -> None:
        self._batch: Batch | None = None
        self._weights: dict[int, float] = {}
        # Problems worth varying, the best first, with their rewards.
        self._best: list[tuple[float, str]] = []

    # --- the samples of the batch at hand ---------------------------------------------------

    def __len__(self) -> int:
        return self.config.completions

    @property
    def batch(self) -> Batch:
        assert self._batch is not None, "made before anything is asked of it"
        return self._batch

    def lengths(self, indices: Indices) -> Indices:
        rows = [len(self._prompt(i)) + len(self.batch.completions[i]) for i in indices.tolist()]
        return np.array(rows, dtype=np.int64)

    def labelled(self, indices: Indices) -> Indices:
        rows = [len(self.batch.completions[i]) for i in indices.tolist()]
        return np.array(rows, dtype=np.int64)

    def sample(self, index: int) -> tuple[Indices, int]:
        prompt = self._prompt(index)
        return np.array([*prompt, *self.batch.completions[index]], dtype=np.int64), len(prompt)

    def _prompt(self, index: int) -> list[int]:
        return self.batch.prompts[index // self.config.group]

    # --- batching ---------------------------------------------------------------------------

    def cut(
        self, source: TokenSource, indices: Indices, *, ranks: int, budget: int
    ) -> list[list[list[int]]]:
        return self.packed.cut(source, indices, ranks=ranks, budget=budget)

    def collate(self, source: TokenSource, indices: Indices, *, budget: int) -> Drawn:
        packed: PackedBatch = self.packed.collate(source, indices, budget=budget)
        batch, rows = self.batch, indices.tolist()
        counts = torch.tensor([len(batch.completions[i]) for i in rows])

        def moved(values: torch.Tensor) -> torch.Tensor:
            return values.to(packed.labels.device, non_blocking=True)

        def spread(values: Sequence[float]) -> torch.Tensor:
            each = torch.tensor(values, dtype=torch.float32)
            return moved(each.repeat_interleave(counts))

        def joined(arrays: list[np.ndarray[Any, Any]] | None) -> torch.Tensor | None:
            if arrays is None:
                return None
            return moved(torch.from_numpy(np.concatenate([arrays[i] for i in rows])))

        return Drawn(
            packed=packed,
            advantage=spread([batch.advantages[i] for i in rows]),
            weight=spread([self._weights[i] for i in rows]),
            old=joined(batch.old),
            reference=joined(batch.reference),
        )

    def least(self, source: TokenSource, indices: Indices) -> int:
        return self.packed.least(source, indices)

    # --- making them ------------------------------------------------------------------------

    def make(self, step: int, indices: Indices) -> bool:
        """See `Maker`."""
        config = self.config
        start = step - step % config.updates
        if self._batch is None:
            self._look_back(step, start)
        if self._batch is None or self._batch.step != start:
            batch = self._draw(start)
            if batch is None:
                return False
            self._take(batch)
        labelled = int(self.labelled(indices).sum())
        weights = token_weights(
            self.labelled(indices).tolist(),
            aggregation=config.loss,
            max_new_tokens=config.max_new_tokens,
            bnpo_samples=config.bnpo_samples,
            batch_tokens=sum(map(len, self.batch.completions)),
            steps_a_batch=config.completions // config.samples_a_step,
        )
        # The loop divides by the labels of the step, as it does for every other loss.
        self._weights = {
            i: weight * labelled for i, weight in zip(indices.tolist(), weights, strict=True)
        }
        return True

    def figures(self) -> dict[str, float]:
        """See `Maker`: rewards of the batch, divergence and clipping of the step."""
        kl, clipped, tokens = self.ranks.sum(self.loss.take())
        batch = self.batch
        means = {
            name: float(np.mean([scored[name] for scored in batch.scored])) for name in _FIGURES
        }
        repeated = [scored["judged"]["repetition"] for scored in batch.scored]
        right = [scored["judged"]["verdict"] == "right" for scored in batch.scored]
        return means | {
            "right": float(np.mean(right)),
            "repetition": float(np.mean(repeated)),
            "normalised": float(np.mean([scored["normalised"] for scored in batch.scored])),
            "completion_tokens": float(np.mean([len(row) for row in batch.completions])),
            "kl": kl / max(tokens, 1.0),
            "clipped": clipped / max(tokens, 1.0),
        }

    def _look_back(self, step: int, start: int) -> None:
        """Take up what earlier legs drew before `step`; what they drew after it is dropped."""
        batches: list[dict[str, Any]] = []
        if self.leg.is_first:
            for name in self._names():
                if self._step_of(name) > step:
                    self.leg.store.delete(name)
            batches = [json.loads(self.leg.store.read(name)) for name in self._names()]
        batches = self.ranks.broadcast(batches)
        steps = [int(values["step"]) for values in batches]
        needed = list(range(0, start, self.config.updates))
        if start < step:
            needed.append(start)
        missing = sorted(set(needed) - set(steps))
        if missing:
            raise DamagedError(
                f"{self.leg.task.name}: the completions drawn at step {missing[0]} are gone from"
                f" {self.folder}/rollouts; remove {self.folder}/checkpoints and submit again to do"
                " the stage anew"
            )
        for values in batches:
            self._take(Batch.from_json(values))

    def _take(self, batch: Batch) -> None:
        """Make a batch the one at hand, and what later ones are compared with."""
        self._batch = batch
        rewards = [float(scored["reward"]) for scored in batch.scored]
        self.scorer.remember(batch.texts, rewards)
        found = {text: reward for reward, text in self._best}
        for text, scored in zip(batch.texts, batch.scored, strict=True):
            # By the score that keywords cannot win, or the worst habits would be fed back.
            if read_problem(text) is not None:
                found[text] = float(scored["independent"])
        ordered = sorted(((r, t) for t, r in found.items()), key=lambda pair: (-pair[0], pair[1]))
        self._best = ordered[: self.config.best_problems]

    def _draw(self, start: int) -> Batch | None:
        """Draw, score and keep the batch that begins at step `start`."""
        config, ranks = self.config, self.ranks
        prompts, asked = self._prompts(start)
        seeds = [mix_seed(config.seed, config.sampling.seed, start, i) for i in range(len(self))]
        mine = range(ranks.rank, len(prompts), ranks.size)
        group = config.group
        drawn = self.policy.sample(
            [prompts[i] for i in mine],
            group,
            [seed for i in mine for seed in seeds[i * group : (i + 1) * group]],
        )
        if ranks.agree(drawn is None)[0] or drawn is None:
            return None
        shares = ranks.gather(drawn)
        completions = [
            row
            for i in range(len(prompts))
            for row in shares[i % ranks.size][i // ranks.size * group :][:group]
        ]
        texts = self.policy.decode(completions)
        batch = Batch(
            step=start,
            prompts=prompts,
            asked=asked,
            completions=completions,
            texts=texts,
            scored=[],
            advantages=[],
        )
        scored: list[Scored] | None = None
        if self.leg.is_first:
            scored = self.scorer.score(texts[i : i + group] for i in range(0, len(texts), group))
        batch.scored = ranks.broadcast(scored and [row.to_json() for row in scored])
        batch.advantages = advantages([row["normalised"] for row in batch.scored], group=group)
        self._weigh(batch)
        if self.leg.is_first:
            self.leg.check_fence()
            self.leg.store.write(self._name(start), dump_json(batch.to_json()))
        return batch

    def _weigh(self, batch: Batch) -> None:
        """Note how likely the completions are now, where later updates will have to know."""
        before, self._batch = self._batch, batch
        config = self.config
        if config.updates > 1:
            batch.old = self._everywhere(self.policy.logprobs)
        if config.beta:
            batch.reference = self._everywhere(self.policy.reference)
        self._batch = before

    def _everywhere(
        self, logprobs: Callable[[TokenSource, Indices], list[np.ndarray[Any, Any]]]
    ) -> list[np.ndarray[Any, Any]]:
        """Each rank's share of the completions, put together."""
        ranks = self.ranks
        mine = np.arange(ranks.rank, len(self), ranks.size)
        shares = ranks.gather(logprobs(self, mine))
        return [shares[i % ranks.size][i // ranks.size] for i in range(len(self))]

    def _prompts(self, start: int) -> tuple[list[list[int]], list[str]]:
        """The prompts of a batch, first the variations, and what each asks for."""
        config = self.config
        number = start // config.updates
        rng = np.random.Generator(np.random.PCG64([config.seed, _KINDS, number]))
        varied = round(config.variation_share * config.prompts) if self._best else 0
        wanted: list[Request] = []
        for _ in range(varied):
            _, text = self._best[int(rng.integers(len(self._best)))]
            kind = KINDS[int(rng.integers(len(KINDS)))]
            wanted.append(Request("", "", kind, read_problem(text)))
        cursor = Cursor(len(self.requests), config.prompts, mix_seed(config.seed, _PROMPTS))
        drawn = [self.requests[i] for i in cursor.at(number)]
        wanted += drawn[varied:]
        encoded = self.policy.encode(wanted)
        # A variation of a problem that fills the context makes room for an ordinary prompt.
        for place in range(varied):
            if encoded[place] is None:
                wanted[place] = drawn[place]
                [encoded[place]] = self.policy.encode([drawn[place]])
        prompts = [tokens for tokens in encoded if tokens is not None]
        if len(prompts) < len(wanted):
            raise DataError(
                f"data.max_length leaves no room for a prompt and {config.max_new_tokens} new"
                " tokens; raise it, or lower grpo.max_new_tokens"
            )
        return prompts, [request.text() for request in wanted]

    def _names(self) -> list[str]:
        return sorted(self.leg.store.names(f"{self.folder}/rollouts"))

    def _name(self, step: int) -> str:
        return f"{self.folder}/rollouts/{step:06d}.json"

    def _step_of(self, name: str) -> int:
        return int(name.rpartition("/")[2].removesuffix(".json"))
