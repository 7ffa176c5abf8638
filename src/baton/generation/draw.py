"""The next token of each sequence: the likeliest, or drawn; a draw follows from seed and place."""

from __future__ import annotations

import torch

from baton.eval.config import Sampling


def choose(
    logits: torch.Tensor,
    sampling: Sampling | None,
    seeds: torch.Tensor,
    places: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next tokens, `(sequences,)` int64.

    Filters apply in the order of transformers: repetition penalty, temperature, top-k, top-p.

    Args:
        logits: `(sequences, vocabulary)`.
        sampling: None for the likeliest token.
        seeds: `(sequences,)` int64. What is drawn depends on a sequence's own seed and place
            only, not on which others are in the batch.
        places: `(sequences,)` int64: which token of the answer this is.
        seen: `(sequences, vocabulary)` bool: tokens of prompt and answer, for the penalty.
    """
    if sampling is None:
        return logits.argmax(dim=-1)
    scores = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = torch.where(
            seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores
        )
    scores = scores / sampling.temperature
    tokens = None
    if sampling.top_k or sampling.top_p < 1:
        size = scores.shape[-1]
        scores, tokens = scores.topk(min(sampling.top_k or size, size), dim=-1)
    chances = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        before = chances.cumsum(dim=-1) - chances
        # The likeliest stays even at top-p 0.
        before[:, 0] = -1.0
        chances = chances.masked_fill(before >= sampling.top_p, 0.0)
    sums = chances.cumsum(dim=-1)
    drawn = uniform(seeds, places)[:, None] * sums[:, -1:]
    index = (sums <= drawn).sum(dim=-1, keepdim=True)
    # Rounding may carry a draw past the last token with a chance.
    index = torch.minimum(index, (chances > 0).long().cumsum(-1).argmax(-1, keepdim=True))
    return (index if tokens is None else tokens.gather(-1, index)).squeeze(-1)


def uniform(seeds: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float32, each a hash of its seed and place (splitmix64's finaliser)."""
    word = _mixed(_mixed(seeds) + places)
    return ((word >> 40) & 0xFFFFFF).float() / (1 << 24)


def _mixed(word: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit words in which every bit depends on every other."""
    word = word + _signed(0x9E3779B97F4A7C15)
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return word ^ ((word >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
