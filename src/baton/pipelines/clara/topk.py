"""Choosing the best k documents so that the choice can be learnt from what comes of it."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from baton.errors import DataError

# What the published code adds before the logarithm: -18.4, not minus infinity.
_UPSTREAM_EPSILON = 1e-8


def cosine_scores(query: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Cosines in float32: `(documents,)` from `(width,)` and `(documents, width)`."""
    with torch.autocast(query.device.type, enabled=False):
        return normalize(documents.float(), dim=-1) @ normalize(query.float(), dim=-1)


def rank(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the `k` best of `(documents,)` scores, best first; ties to the lower position.

    Raises:
        DataError: there are fewer documents than `k`.
    """
    if len(scores) < k:
        raise DataError(f"{len(scores)} documents are fewer than top_k ({k})")
    return torch.sort(scores.detach(), descending=True, stable=True).indices[:k]


def soft_choices(
    scores: torch.Tensor, chosen: torch.Tensor, *, temperature: float, upstream_mask: bool = False
) -> torch.Tensor:
    """For each slot the softmax over the documents that no earlier slot took: `(k, documents)`.

    With `upstream_mask` a document that is taken is made unlikely only, as in the published code:
    beyond a gap of 18.4 temperatures (0.368 at 0.02) it has weight again.
    """
    k, count = len(chosen), len(scores)
    one_hot = torch.zeros(k, count, device=scores.device).scatter_(1, chosen[:, None], 1.0)
    taken = one_hot.cumsum(0) - one_hot
    epsilon = _UPSTREAM_EPSILON if upstream_mask else 0.0
    return torch.softmax(scores.float() / temperature + (1.0 - taken + epsilon).log(), dim=-1)


def select(
    scores: torch.Tensor,
    documents: torch.Tensor,
    k: int,
    *,
    temperature: float,
    upstream_mask: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best documents in rank order, with the gradient of a soft choice (straight through).

    Args:
        scores: `(documents,)`.
        documents: `(documents, width)`.

    Returns:
        `(k, width)`, equal to a gather of the documents, and their positions `(k,)`.

    Raises:
        DataError: there are fewer documents than `k`.
    """
    chosen = rank(scores, k)
    with torch.autocast(scores.device.type, enabled=False):
        soft = soft_choices(scores, chosen, temperature=temperature, upstream_mask=upstream_mask)
        # Nothing in the forward pass, the soft choice's gradient in the backward pass.
        relaxed = (soft - soft.detach()) @ documents.detach().float()
        hard = documents.index_select(0, chosen)
        return hard + relaxed.to(hard.dtype), chosen
