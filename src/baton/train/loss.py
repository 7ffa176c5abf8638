"""Cross-entropy of a causal language model on its labelled tokens only."""

from __future__ import annotations

from typing import Any

import torch

from baton.train.batch import IGNORE, PackedBatch

# 1,024 rows of a 152k vocabulary are 0.6 GB of fp32 logits: the most that exists at once.
_CHUNK_TOKENS = 1024
# In fp16 a softmax probability of 1e-6 is a denormal; scaled by this it is not.
_FP16_SCALE = 1024.0
# Attributes by which configurations say that logits are more than one matrix product.
_HEAD_EXTRAS = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "output_multiplier_scale",
)


class CausalLoss:
    """The summed loss of a packed micro-batch under a Hugging Face causal model.

    The head runs on the hidden states of labelled positions only, a chunk at a time, and its
    gradient is taken on the way, so the whole matrix of logits never exists. Models whose
    head is more than one matrix (a bias, soft-capping, an adapter on it) go through their own
    head, on the same positions.
    """

    def __init__(self, model: torch.nn.Module, *, compute_dtype: torch.dtype) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        head = model.get_output_embeddings()
        self.head: torch.nn.Module | None = head if _is_plain(model, head) else None

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Sum of the loss over labelled tokens: a float32 scalar with gradient."""
        positions = (batch.labels != IGNORE).nonzero().squeeze(1)
        labels = batch.labels.index_select(0, positions)
        inputs = dict(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **batch.edges(),
        )
        if self.head is None:
            logits = self.model(**inputs, logits_to_keep=positions).logits[0].float()
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        hidden = self.model.base_model(**inputs).last_hidden_state[0]
        return linear_cross_entropy(
            hidden.index_select(0, positions),
            self.head.weight,
            labels,
            compute_dtype=self.compute_dtype,
        )


def _is_plain(model: torch.nn.Module, head: torch.nn.Module) -> bool:
    config = model.config.get_text_config()
    extras = [getattr(config, name, None) for name in _HEAD_EXTRAS]
    return (
        type(head) is torch.nn.Linear
        and head.bias is None
        and all(extra in (None, 1, 1.0) for extra in extras)
        and model.base_model is not model
    )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Summed cross-entropy of `softmax(hidden @ weight.T)` against `labels`.

    Args:
        hidden: `(tokens, width)`.
        weight: `(vocabulary, width)`.
        labels: `(tokens,)` int64, none of them ignored.
        compute_dtype: of the matrix products; the softmax is always float32.
    """
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, compute_dtype)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            need_h, need_w = ctx.needs_input_grad[:2]
            scale = _FP16_SCALE if dtype == torch.float16 else 1.0
            grad_h = torch.empty_like(h, dtype=torch.float32) if need_h else None
            grad_w = torch.zeros_like(w, dtype=torch.float32) if need_w else None
            total = torch.zeros((), dtype=torch.float32, device=h.device)
            for start in range(0, len(labels), _CHUNK_TOKENS):
                span = slice(start, start + _CHUNK_TOKENS)
                logits = (h[span] @ w.T).float()
                label = labels[span, None]
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                total += (normaliser - logits.gather(1, label)).sum()
                if grad_h is None and grad_w is None:
                    continue
                # d loss / d logits = softmax - one-hot
                grad = logits.sub_(normaliser).exp_()
                grad.scatter_add_(1, label, torch.full_like(label, -1.0, dtype=grad.dtype))
                grad = grad.mul_(scale).to(dtype)
                if grad_h is not None:
                    grad_h[span] = (grad @ w).float() / scale
                if grad_w is not None:
                    # A sum over a chunk of scaled values leaves fp16's range.
                    wide = torch.float32 if dtype == torch.float16 else dtype
                    grad_w += (grad.T.to(wide) @ h[span].to(wide)).float() / scale
        ctx.save_for_backward(grad_h, grad_w)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_h is not None:
            grad_h = (grad_h * grad_output).to(hidden_dtype)
        if grad_w is not None:
            grad_w = (grad_w * grad_output).to(weight_dtype)
        return grad_h, grad_w, None, None
