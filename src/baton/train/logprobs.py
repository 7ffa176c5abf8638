"""How likely a causal model finds each labelled token, with gradient, without all its logits."""

from __future__ import annotations

from typing import Any

import torch

from baton.train.batch import PackedBatch
from baton.train.loss import LabelledPositions

# As for the loss: the most rows of logits that exist at once.
_CHUNK_TOKENS = 1024


class TokenLogprobs(LabelledPositions):
    """Log-probabilities of the labels of a packed micro-batch under a Hugging Face causal model.

    At a `temperature` T they are those of `softmax(logits / T)`, from which a sampler at T draws.
    """

    def __init__(
        self, model: torch.nn.Module, *, compute_dtype: torch.dtype, temperature: float = 1.0
    ) -> None:
        super().__init__(model, compute_dtype=compute_dtype)
        self.temperature = temperature

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """`(labelled,)` float32, in the order of `batch.labels`."""
        values, weight = self.outputs(batch)
        if weight is None:
            chosen = (values / self.temperature).log_softmax(-1).gather(1, batch.labels[:, None])
            return chosen[:, 0]
        return linear_logprobs(
            values,
            weight,
            batch.labels,
            compute_dtype=self.compute_dtype,
            temperature=self.temperature,
        )


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    compute_dtype: torch.dtype,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log of `softmax(hidden @ weight.T / temperature)` at `labels`, a chunk of logits at a time.

    Args:
        hidden: `(tokens, width)`.
        weight: `(vocabulary, width)`.
        labels: `(tokens,)` int64.
        compute_dtype: of the matrix products; the softmax is always float32.

    Returns:
        `(tokens,)` float32. The backward pass makes the logits again.
    """
    out: torch.Tensor = _LinearLogprobs.apply(hidden, weight, labels, compute_dtype, temperature)
    return out


class _LinearLogprobs(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        temperature: float,
    ) -> torch.Tensor:
        out = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(out)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            for start in range(0, len(labels), _CHUNK_TOKENS):
                span = slice(start, start + _CHUNK_TOKENS)
                logits = (h[span] @ w.T).float() / temperature
                normaliser[span] = logits.logsumexp(1)
                out[span] = logits.gather(1, labels[span, None])[:, 0] - normaliser[span]
        ctx.save_for_backward(hidden, weight, labels, normaliser)
        ctx.dtype, ctx.temperature = dtype, temperature
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, normaliser = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            for start in range(0, len(labels), _CHUNK_TOKENS):
                span = slice(start, start + _CHUNK_TOKENS)
                logits = (h[span] @ w.T).float() / ctx.temperature
                # d log p(label) / d logits = (one-hot - softmax) / temperature
                part = logits.sub_(normaliser[span, None]).exp_().neg_()
                part.scatter_add_(1, labels[span, None], torch.ones_like(part[:, :1]))
                part.mul_(grad[span, None] / ctx.temperature)
                if grad_h is not None:
                    grad_h[span] = (part.to(ctx.dtype) @ w).to(hidden.dtype)
                if grad_w is not None:
                    grad_w += part.T @ h[span].float()
        return grad_h, None if grad_w is None else grad_w.to(weight.dtype), None, None, None
