"""Triton kernels of attention with an additive bias and dropout: forward and backward.

The blockwise softmax is that of FlashAttention-2 (Dao, 2023); the bias's gradient is a sum over
the batch, taken a part of the batch at a time and in the same order always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from baton.train.dropout_kernels import is_kept

_BLOCK = 64
_PARTS = 8  # of the batch, each a program's share of the bias's gradient
_LOG2E = math.log2(math.e)


@triton.jit
def _scores(
    q,
    k,
    bias,
    mask,
    head,
    batch,
    row,
    column,
    n,
    m,
    scale,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores of a block in base 2, minus infinity where nothing is to be seen."""
    inside = (row[:, None] < n) & (column[None, :] < m)
    place = (head * n + row[:, None]) * m + column[None, :]
    added = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    scores = (tl.dot(q, tl.trans(k)) * scale + added) * 1.4426950408889634
    if CAUSAL:
        inside = inside & (row[:, None] >= column[None, :])
    if MASKED:
        seen = tl.load(mask + batch * m + column, mask=column < m, other=0)
        inside = inside & (seen[None, :] != 0)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def _tile(pointer, batch, head, index, size, stride_b, stride_h, stride_n, WIDTH: tl.constexpr):
    """`(index, WIDTH)` of a `(batch, heads, size, WIDTH)` tensor; zeros outside."""
    column = tl.arange(0, WIDTH)
    start = batch.to(tl.int64) * stride_b + head * stride_h
    place = start + index[:, None] * stride_n + column[None, :]
    return tl.load(pointer + place, mask=index[:, None] < size, other=0.0)


@triton.jit
def _put(pointer, tile, batch, head, index, size, heads, WIDTH: tl.constexpr):
    """Store to a contiguous `(batch, size, heads, WIDTH)` tensor."""
    column = tl.arange(0, WIDTH)
    place = ((batch.to(tl.int64) * size + index[:, None]) * heads + head) * WIDTH + column[None, :]
    tl.store(pointer + place, tile.to(pointer.dtype.element_ty), mask=index[:, None] < size)


@triton.jit
def _biased_forward(
    q, k, v, bias, mask, seed, out, lse, heads, n, m, scale, threshold, grow,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    batch, head = pair // heads, pair % heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query = _tile(q, batch, head, row, n, qb, qh, qn, WIDTH)
    number = tl.load(seed)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    stop = tl.minimum(m, (tl.program_id(0) + 1) * BLOCK) if CAUSAL else m
    for start in range(0, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH)
        value = _tile(v, batch, head, column, m, vb, vh, vn, WIDTH)
        scores = _scores(
            query, key, bias, mask, head, batch, row, column, n, m, scale, CAUSAL, MASKED
        )
        # A row may see nothing of this block, and nothing at all if it is none.
        higher = tl.maximum(tl.maximum(most, tl.max(scores, 1)), -1e30)
        shrink = tl.exp2(most - higher)
        weight = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if DROPS:
            index = (pair * n + row[:, None]) * m + column[None, :]
            weight = tl.where(is_kept(index, number, threshold), weight * grow, 0.0)
        sums = sums * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        most = higher
    total = tl.maximum(total, 1e-30)
    _put(out, sums / total[:, None], batch, head, row, n, heads, WIDTH)
    tl.store(lse + pair * n + row, most + tl.log2(total), mask=row < n)


@triton.jit
def _slopes(
    query, key, value, grad, bias, mask, head, batch, pair, row, column, n, m, scale, normal,
    delta, number, threshold, grow, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """The block's weights after dropout, and the gradient of its scores."""
    scores = _scores(query, key, bias, mask, head, batch, row, column, n, m, scale, CAUSAL, MASKED)
    weight = tl.exp2(scores - normal[:, None])
    grown = tl.dot(grad, tl.trans(value))
    dropped = weight
    if DROPS:
        index = (pair * n + row[:, None]) * m + column[None, :]
        kept = is_kept(index, number, threshold)
        dropped = tl.where(kept, weight * grow, 0.0)
        grown = tl.where(kept, grown * grow, 0.0)
    return dropped, weight * (grown - delta[:, None])


@triton.jit
def _biased_keys(
    q, k, v, bias, mask, seed, grad, lse, delta, grad_k, grad_v, heads, n, m, scale, threshold,
    grow, qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    batch, head = pair // heads, pair % heads
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH)
    value = _tile(v, batch, head, column, m, vb, vh, vn, WIDTH)
    number = tl.load(seed)
    sums_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    sums_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    first = tl.program_id(0) * BLOCK if CAUSAL else 0
    for start in range(first, n, BLOCK):
        row = start + tl.arange(0, BLOCK)
        query = _tile(q, batch, head, row, n, qb, qh, qn, WIDTH)
        out = _tile(grad, batch, head, row, n, gb, gh, gn, WIDTH)
        normal = tl.load(lse + pair * n + row, mask=row < n, other=0.0)
        product = tl.load(delta + pair * n + row, mask=row < n, other=0.0)
        dropped, slope = _slopes(
            query, key, value, out, bias, mask, head, batch, pair, row, column, n, m, scale,
            normal, product, number, threshold, grow, CAUSAL, MASKED, DROPS,
        )  # fmt: skip
        sums_v += tl.dot(tl.trans(dropped.to(out.dtype)), out)
        sums_k += tl.dot(tl.trans(slope.to(query.dtype)), query)
    _put(grad_k, sums_k * scale, batch, head, column, m, heads, WIDTH)
    _put(grad_v, sums_v, batch, head, column, m, heads, WIDTH)


@triton.jit
def _biased_queries(
    q, k, v, bias, mask, seed, grad, lse, delta, grad_q, heads, n, m, scale, threshold, grow,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    batch, head = pair // heads, pair % heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query = _tile(q, batch, head, row, n, qb, qh, qn, WIDTH)
    out = _tile(grad, batch, head, row, n, gb, gh, gn, WIDTH)
    normal = tl.load(lse + pair * n + row, mask=row < n, other=0.0)
    product = tl.load(delta + pair * n + row, mask=row < n, other=0.0)
    number = tl.load(seed)
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    stop = tl.minimum(m, (tl.program_id(0) + 1) * BLOCK) if CAUSAL else m
    for start in range(0, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH)
        value = _tile(v, batch, head, column, m, vb, vh, vn, WIDTH)
        _, slope = _slopes(
            query, key, value, out, bias, mask, head, batch, pair, row, column, n, m, scale,
            normal, product, number, threshold, grow, CAUSAL, MASKED, DROPS,
        )  # fmt: skip
        sums += tl.dot(slope.to(key.dtype), key)
    _put(grad_q, sums * scale, batch, head, row, n, heads, WIDTH)


@triton.jit
def _biased_bias(
    q, k, v, bias, mask, seed, grad, lse, delta, parts, batches, share, heads, n, m, scale,
    threshold, grow, qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """One block of one head's bias, over a share of the batch."""
    across = tl.cdiv(m, BLOCK)
    down = tl.program_id(0) // across
    row = down * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    head, part = tl.program_id(1), tl.program_id(2)
    number = tl.load(seed)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    turns = tl.minimum(batches - part * share, share)
    if CAUSAL:
        # Above the diagonal nothing is seen, so nothing is summed.
        turns = tl.where(tl.program_id(0) % across > down, 0, turns)
    for turn in range(turns):
        batch = part * share + turn
        pair = batch * heads + head
        query = _tile(q, batch, head, row, n, qb, qh, qn, WIDTH)
        out = _tile(grad, batch, head, row, n, gb, gh, gn, WIDTH)
        key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH)
        value = _tile(v, batch, head, column, m, vb, vh, vn, WIDTH)
        normal = tl.load(lse + pair * n + row, mask=row < n, other=0.0)
        product = tl.load(delta + pair * n + row, mask=row < n, other=0.0)
        _, slope = _slopes(
            query, key, value, out, bias, mask, head, batch, pair, row, column, n, m, scale,
            normal, product, number, threshold, grow, CAUSAL, MASKED, DROPS,
        )  # fmt: skip
        sums += slope
    place = ((part * heads + head).to(tl.int64) * n + row[:, None]) * m + column[None, :]
    tl.store(parts + place, sums, mask=(row[:, None] < n) & (column[None, :] < m))


@triton.jit
def _biased_products(grad, out, delta, heads, n, gb, gh, gn, ob, oh, on,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each query the product of its output and that output's gradient."""
    pair = tl.program_id(1)
    batch, head = pair // heads, pair % heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    one = _tile(grad, batch, head, row, n, gb, gh, gn, WIDTH).to(tl.float32)
    other = _tile(out, batch, head, row, n, ob, oh, on, WIDTH).to(tl.float32)
    tl.store(delta + pair * n + row, tl.sum(one * other, 1), mask=row < n)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `biased._attend`."""
    batch, heads, n, width = q.shape
    m = k.shape[2]
    out = q.new_empty(batch, n, heads, width)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    _biased_forward[(triton.cdiv(n, _BLOCK), batch * heads)](
        q, k, v, bias, mask, seed, out, lse, heads, n, m, scale, *_rates(dropout),
        *_strides(q, k, v), **_constants(width, mask, causal, dropout),
    )  # fmt: skip
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `q`, `k`, `v`, each laid out as `(batch, tokens, heads, width)`, and `bias`.

    `grad` and `out` are `(batch, n, heads, width)`; the bias's is empty unless it is needed.
    """
    batch, heads, n, width = q.shape
    m = k.shape[2]
    by_head, delta = grad.transpose(1, 2), torch.empty_like(lse)
    rows, columns = triton.cdiv(n, _BLOCK), triton.cdiv(m, _BLOCK)
    _biased_products[(rows, batch * heads)](
        by_head, out, delta, heads, n, *_strides(by_head, out.transpose(1, 2)),
        WIDTH=width, BLOCK=_BLOCK,
    )  # fmt: skip
    grads = [x.new_empty(batch, x.shape[2], heads, width) for x in (q, k, v)]
    shared = (q, k, v, bias, mask, seed, by_head, lse, delta)
    sizes = (heads, n, m, scale, *_rates(dropout), *_strides(q, k, v, by_head))
    constants = _constants(width, mask, causal, dropout)
    _biased_keys[(columns, batch * heads)](*shared, grads[1], grads[2], *sizes, **constants)
    _biased_queries[(rows, batch * heads)](*shared, grads[0], *sizes, **constants)
    if not needs_bias:
        return grads[0], grads[1], grads[2], bias.new_empty(0)
    parts = min(_PARTS, batch)
    sums = torch.empty(parts, heads, n, m, dtype=torch.float32, device=q.device)
    _biased_bias[(rows * columns, heads, parts)](
        *shared, sums, batch, triton.cdiv(batch, parts), *sizes, **constants
    )
    return grads[0], grads[1], grads[2], sums.sum(0)[None].to(bias.dtype)


def _rates(dropout: float) -> tuple[int, float]:
    """Below which hash a weight is dropped, and by how much the others grow."""
    return int(dropout * 2**32), 1 / (1 - dropout)


def _strides(*tensors: torch.Tensor) -> Sequence[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _constants(
    width: int, mask: torch.Tensor | None, causal: bool, dropout: float
) -> dict[str, int | bool]:
    return {
        "WIDTH": width,
        "BLOCK": _BLOCK,
        "CAUSAL": causal,
        "MASKED": mask is not None,
        "DROPS": dropout > 0,
        "num_warps": 4,
    }
