"""Cross-entropy of a causal language model on its labelled tokens only."""

from __future__ import annotations

from typing import Any

import torch

from baton.train.batch import PackedBatch
from baton.train.launchable import HAS_TRITON, can_launch

kernels: Any = None
if HAS_TRITON:
    from baton.train import loss_kernels as kernels

# So many logits exist at once: 0.5 GB in float32, 880 rows of a vocabulary of 152k.
_CHUNK_LOGITS = 1 << 27
_LEAST_CHUNK = 1024
# Tensor cores take rows of a multiple of 8 only; the largest tiles are 128 wide.
_WIDTHS = 128
# In fp16 a softmax probability of 1e-6 is a denormal; scaled by this it is not.
_FP16_SCALE = 1024.0
# Attributes by which configurations say that logits are more than one matrix product.
_HEAD_EXTRAS = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "output_multiplier_scale",
)


class LabelledPositions:
    """A Hugging Face causal model, asked about the labelled positions of packs only.

    Attributes:
        head: the model's head where its logits are one product with its weight, else None: a
            bias, soft-capping or an adapter on it make it more than that.
    """

    def __init__(self, model: torch.nn.Module, *, compute_dtype: torch.dtype) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        head = model.get_output_embeddings()
        self.head: torch.nn.Module | None = head if _is_plain(model, head) else None

    def outputs(
        self, batch: PackedBatch, embeddings: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states `(labelled, width)` and the head's weight; or logits, float32, and None.

        `embeddings`, `(1, tokens, width)`, stand for those of `batch.input_ids` where given.
        """
        inputs: dict[str, Any] = dict(
            **(
                {"input_ids": batch.input_ids}
                if embeddings is None
                else {"inputs_embeds": embeddings}
            ),
            position_ids=batch.position_ids,
            use_cache=False,
            **batch.attention(),
        )
        if self.head is None:
            return self.model(**inputs, logits_to_keep=batch.predicts).logits[0].float(), None
        hidden = self.model.base_model(**inputs).last_hidden_state[0]
        return hidden.index_select(0, batch.predicts), self.head.weight


class CausalLoss(LabelledPositions):
    """The summed loss of a packed micro-batch under a Hugging Face causal model.

    The head runs on the hidden states of labelled positions only, a chunk at a time, and its
    gradient is taken on the way, so the whole matrix of logits never exists. Models whose
    head is more than one matrix go through their own head, on the same positions.
    """

    def __call__(self, batch: PackedBatch, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of the loss over labelled tokens: a float32 scalar with gradient.

        `embeddings` as for `outputs`.
        """
        values, weight = self.outputs(batch, embeddings)
        if weight is None:
            return torch.nn.functional.cross_entropy(values, batch.labels, reduction="sum")
        return linear_cross_entropy(values, weight, batch.labels, compute_dtype=self.compute_dtype)


def _is_plain(model: torch.nn.Module, head: torch.nn.Module) -> bool:
    """Are the logits of this model one product with the weight of its head?"""
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


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocabulary: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy, and `scale` times its gradient; may overwrite `logits`.

    Args:
        logits: `(tokens, columns)`, contiguous; those after the first `vocabulary` are pads.
        labels: `(tokens,)` int64.
    """
    if can_launch(logits):
        made: tuple[torch.Tensor, torch.Tensor] = kernels.cross_entropy(
            logits, labels, vocabulary, scale
        )
        return made
    logits[:, vocabulary:] = -torch.inf
    wide, label = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, None]
    normaliser = wide.logsumexp(dim=1, keepdim=True)
    loss = (normaliser - wide.gather(1, label)).sum()
    # d loss / d logits = softmax - one-hot
    column = torch.arange(logits.shape[1], device=logits.device)
    grad = wide.sub_(normaliser).exp_().sub_((column == label).to(logits.dtype))
    return loss, grad.mul_(scale).to(logits.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in float32: a sum over a chunk of scaled values leaves fp16's range."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.float32 if a.dtype == torch.float16 else a.dtype
    return (a.to(wide) @ b.to(wide)).float()


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
            vocabulary = w.shape[0]
            if w.device.type == "cuda" and vocabulary % 8:
                w = torch.nn.functional.pad(w, (0, 0, 0, -vocabulary % _WIDTHS))
            need_h, need_w = ctx.needs_input_grad[:2]
            scale = _FP16_SCALE if dtype == torch.float16 else 1.0
            grad_h = torch.empty_like(h, dtype=torch.float32) if need_h else None
            grad_w = torch.zeros_like(w, dtype=torch.float32) if need_w else None
            total = torch.zeros((), dtype=torch.float32, device=h.device)
            chunk = max(_LEAST_CHUNK, _CHUNK_LOGITS // len(w))
            for start in range(0, len(labels), chunk):
                span = slice(start, start + chunk)
                logits, label = h[span] @ w.T, labels[span]
                if grad_h is None and grad_w is None:
                    total += torch.nn.functional.cross_entropy(
                        logits[:, :vocabulary].float(), label, reduction="sum"
                    )
                    continue
                part, grad = cross_entropy(logits, label, vocabulary, scale)
                total += part
                if grad_h is not None:
                    grad_h[span] = (grad @ w).float() / scale
                if grad_w is not None:
                    grad_w += _product(grad.T, h[span]) / scale
        ctx.save_for_backward(grad_h, None if grad_w is None else grad_w[:vocabulary])
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
