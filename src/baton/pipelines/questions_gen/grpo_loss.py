"""The loss of group relative policy optimisation.

Shao et al., "DeepSeekMath" (2024), equation 3, with the estimator of the divergence by Schulman
("Approximating KL Divergence", 2020). The ways to make one number of the losses of tokens are
TRL's, by its names: `bnpo` after Liu et al. (2025), `dr_grpo` after "Understanding R1-Zero-Like
Training" (2025), `dapo` after Yu et al. (2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from baton.pipelines.questions_gen.config import Aggregation

# Keeps a group of almost equal rewards from being blown up to advantages of one.
_STD_EPSILON = 1e-4


def advantages(rewards: Sequence[float], *, group: int) -> list[float]:
    """`(r - mean) / (std + 1e-4)` within each group, the standard deviation with ddof 1.

    Args:
        rewards: of all completions, those of a prompt side by side.
        group: completions a prompt, at least 2.
    """
    if len(rewards) % group or group < 2:
        raise ValueError(f"{len(rewards)} rewards are no groups of {group}")
    rows = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    mean, std = rows.mean(1, keepdim=True), rows.std(1, keepdim=True)
    values: list[float] = ((rows - mean) / (std + _STD_EPSILON)).flatten().tolist()
    return values


@dataclass(frozen=True)
class TokenLoss:
    """Losses and what is to be told of them, each `(tokens,)` float32; `kl` is None without beta.

    `clipped` is 1 where the ratio lies outside the range and on the side that stops the gradient.
    """

    loss: torch.Tensor
    kl: torch.Tensor | None
    clipped: torch.Tensor


def token_losses(
    logps: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantage: torch.Tensor,
    *,
    clip: float,
    beta: float,
    corrected: bool = False,
) -> TokenLoss:
    """`-min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta (e^d - d - 1)`, for every token.

    Args:
        logps: `(tokens,)` log-probabilities under the policy, with gradient.
        old: the same under the policy that drew the tokens.
        reference: the same under the policy that the stage began with; needed where beta > 0.
        advantage: of each token's completion.
        corrected: multiply the divergence by rho, which makes its gradient that of the reverse KL
            (DeepSeek-V3.2, 2025); as TRL does by default.
    """
    ratio = (logps - old).exp()
    kept = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.min(ratio * advantage, kept * advantage)
    kl = None
    if beta:
        if reference is None:
            raise ValueError("beta is not 0, so log-probabilities of the reference are needed")
        d = reference - logps
        kl = d.exp() - d - 1
        loss = loss + beta * (kl * ratio if corrected else kl)
    low = (ratio < 1 - clip) & (advantage < 0)
    high = (ratio > 1 + clip) & (advantage > 0)
    return TokenLoss(loss, None if kl is None else kl.detach(), (low | high).float())


def token_weights(
    lengths: Sequence[int],
    *,
    aggregation: Aggregation,
    max_new_tokens: int,
    bnpo_samples: int,
    batch_tokens: int,
    steps_a_batch: int = 1,
) -> list[float]:
    """What each token's loss of a completion is multiplied by; the sum of all is the step's loss.

    Args:
        lengths: tokens of each completion of the step; an empty one counts as a completion.
        bnpo_samples: completions of a micro-batch for `bnpo`, which divides by its own tokens.
        batch_tokens: of the whole batch that was drawn; `dapo` divides by its share of them.
        steps_a_batch: steps in which the batch is gone through once.
    """
    count = len(lengths)
    match aggregation:
        case "grpo":
            return [1 / (count * max(length, 1)) for length in lengths]
        case "dr_grpo":
            return [1 / (count * max_new_tokens)] * count
        case "dapo":
            return [steps_a_batch / max(batch_tokens, 1)] * count
        case "bnpo":
            parts = [lengths[i : i + bnpo_samples] for i in range(0, count, bnpo_samples)]
            return [1 / (len(parts) * max(sum(part), 1)) for part in parts for _ in part]


@dataclass(frozen=True)
class Drawn:
    """A packed micro-batch of completions, with what was known of each token when it was drawn.

    Attributes:
        packed: see `PackedBatch`; its labels are the completions.
        advantage, weight: `(labelled,)` float32.
        old: `(labelled,)` float32, or None where the policy is still the one that drew them.
        reference: `(labelled,)` float32, or None without beta.
    """

    packed: Any
    advantage: torch.Tensor
    weight: torch.Tensor
    old: torch.Tensor | None
    reference: torch.Tensor | None


class GrpoLoss:
    """The loss of a micro-batch, summed with its weights; remembers divergence and clipping."""

    def __init__(self, logprobs: Any, *, clip: float, beta: float, corrected: bool = False) -> None:
        self._logprobs = logprobs
        self._options: dict[str, Any] = {"clip": clip, "beta": beta, "corrected": corrected}
        self._sums: list[torch.Tensor] = []

    def __call__(self, batch: Drawn) -> torch.Tensor:
        """A float32 scalar with gradient."""
        logps = self._logprobs(batch.packed)
        old = logps.detach() if batch.old is None else batch.old
        found = token_losses(logps, old, batch.reference, batch.advantage, **self._options)
        kl = torch.zeros_like(found.clipped) if found.kl is None else found.kl
        tokens = torch.full_like(found.clipped, 1.0)
        self._sums.append(torch.stack([kl.sum(), found.clipped.sum(), tokens.sum()]))
        return (found.loss * batch.weight).sum()

    def take(self) -> list[float]:
        """Summed divergence, clipped tokens and tokens since the last call, on this rank."""
        if not self._sums:
            return [0.0, 0.0, 0.0]
        total = torch.stack(self._sums).double().sum(0)
        self._sums.clear()
        values: list[float] = total.tolist()
        return values
