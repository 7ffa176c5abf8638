"""Triton kernels of attention with T5's position bias and dropout: forward and backward.

The blockwise softmax is that of FlashAttention-2 (Dao, 2023). The bias depends on the distance of
key and query only, so it comes as the values on the diagonals. In the backward pass one kernel
makes gradients of keys and values, and leaves those of the scores in 16 bits; from these another
makes gradients of queries, and on the way the sums over its share of the batch, of which a third
takes the diagonals. Nothing is added atomically, so that results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from baton.train.dropout_kernels import threshold_of

BLOCK = 64
_PARTS = 64  # of the batch, each a program's share of the queries' gradients
_SUMMED_PARTS = 16  # and of the bias's
_MOST_SUMS = 320  # columns of a block of rows that a program can add to, in registers


@triton.jit
def _tile(pointer, batch, head, index, size, by_batch, by_head, by_token, WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """`(index, WIDTH)` of one head of one sample; zeros after its last token."""
    start = pointer + batch.to(tl.int64) * by_batch + head * by_head
    place = start + index[:, None] * by_token + tl.arange(0, WIDTH)[None, :]
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=index[:, None] < size, other=0.0)


@triton.jit
def _put(pointer, tile, batch, head, index, size, by_batch, by_head, by_token, WIDTH: tl.constexpr):
    start = pointer + batch.to(tl.int64) * by_batch + head * by_head
    place = start + index[:, None] * by_token + tl.arange(0, WIDTH)[None, :]
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=index[:, None] < size)


@triton.jit
def _row_words(seed, pair, n, row):
    """A hash of 32 bits for each row of the scores (Wellons' lowbias32)."""
    x = (pair * n + row).to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(words, column, threshold):
    """Which weights stay: the row's word does most of the work, which is an instruction a value."""
    x = words[:, None] + (column.to(tl.uint32) * 0x9E3779B1)[None, :]
    x = x ^ (x >> 15)
    return x * x >= threshold


@triton.jit
def _scores(
    query, key, bias, mask, batch, head, row, column, m, last, spread, scale, BIASED: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Scores of a block in base 2, minus infinity where nothing is to be seen."""
    scores = tl.dot(query, tl.trans(key)) * (scale * 1.4426950408889634)
    if BIASED:
        place = column[None, :] - row[:, None] + last
        if ASSEMBLER:
            # A plain load is laid out for neighbours in memory and then moved to where the scores
            # are: it takes as long again as all the rest of the forward pass.
            added = tl.inline_asm_elementwise(
                "ld.global.nc.f32 $0, [$1];", "=f,l", [bias + head * spread + place],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            added = tl.load(bias + head * spread + place)
        scores += added * 1.4426950408889634
    if MASKED:
        seen = tl.load(mask + batch * m + column, mask=column < m, other=0)
        scores += tl.where(seen != 0, 0.0, float("-inf"))[None, :]
    elif not EVEN:
        scores += tl.where(column < m, 0.0, float("-inf"))[None, :]
    if CAUSAL:
        scores = tl.where(row[:, None] >= column[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _biased_forward(
    q, k, v, bias, mask, seed, out, lse, heads, n, m, last, spread, scale, threshold, grow,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, DROPS: tl.constexpr, EVEN: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    pair, number = tl.program_id(0) // tl.cdiv(n, BLOCK), tl.program_id(0) % tl.cdiv(n, BLOCK)
    batch, head = pair // heads, pair % heads
    row = number * BLOCK + tl.arange(0, BLOCK)
    query = _tile(q, batch, head, row, n, qb, qh, qn, WIDTH, EVEN)
    words = _row_words(tl.load(seed), pair, n, row)
    # Not minus infinity: a row may see nothing of a block, and nothing at all if it is none.
    most = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    stop = tl.minimum(m, (number + 1) * BLOCK) if CAUSAL else m
    for start in range(0, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH, EVEN)
        value = _tile(v, batch, head, column, m, vb, vh, vn, WIDTH, EVEN)
        scores = _scores(
            query, key, bias, mask, batch, head, row, column, m, last, spread, scale,
            BIASED, CAUSAL, MASKED, EVEN, ASSEMBLER,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - higher)
        weight = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if DROPS:
            weight = tl.where(_kept(words, column, threshold), weight, 0.0)
        sums = tl.dot(weight.to(value.dtype), value, sums * shrink[:, None])
        most = higher
    total = tl.maximum(total, 1e-30)
    _put(out, sums * (grow / total)[:, None], batch, head, row, n, ob, oh, on, WIDTH)
    tl.store(lse + pair * n + row, most + tl.log2(total), mask=row < n)


@triton.jit
def _biased_keys(
    q, k, v, bias, mask, seed, grad, out, lse, grad_k, grad_v, slopes,
    heads, n, m, last, spread, scale, threshold, grow,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, DROPS: tl.constexpr, EVEN: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and of the scores, but for causal blocks that see nothing."""
    pair, number = tl.program_id(0) // tl.cdiv(m, BLOCK), tl.program_id(0) % tl.cdiv(m, BLOCK)
    batch, head = pair // heads, pair % heads
    drawn = tl.load(seed)
    column = number * BLOCK + tl.arange(0, BLOCK)
    key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH, EVEN)
    value = _tile(v, batch, head, column, m, vb, vh, vn, WIDTH, EVEN)
    sums_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    sums_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    first = number * BLOCK if CAUSAL else 0
    for start in range(first, n, BLOCK):
        row = start + tl.arange(0, BLOCK)
        query = _tile(q, batch, head, row, n, qb, qh, qn, WIDTH, EVEN)
        slope_out = _tile(grad, batch, head, row, n, ob, oh, on, WIDTH, EVEN)
        made = _tile(out, batch, head, row, n, ob, oh, on, WIDTH, EVEN)
        delta = tl.sum(slope_out.to(tl.float32) * made.to(tl.float32), 1)
        # After the last row weights are to be zeros.
        normal = tl.load(lse + pair * n + row, mask=row < n, other=float("inf"))
        scores = _scores(
            query, key, bias, mask, batch, head, row, column, m, last, spread, scale,
            BIASED, CAUSAL, MASKED, EVEN, ASSEMBLER,
        )  # fmt: skip
        weight = tl.exp2(scores - normal[:, None])
        grown = tl.dot(slope_out, tl.trans(value))
        dropped = weight
        if DROPS:
            kept = _kept(_row_words(drawn, pair, n, row), column, threshold)
            dropped = tl.where(kept, weight, 0.0)
            grown = tl.where(kept, grown, 0.0)
        slope = (weight * (grown * grow - delta[:, None])).to(key.dtype)
        sums_v = tl.dot(tl.trans(dropped.to(slope_out.dtype)), slope_out, sums_v)
        sums_k = tl.dot(tl.trans(slope), query, sums_k)
        place = slopes + pair.to(tl.int64) * n * m + row[:, None] * m + column[None, :]
        if EVEN:
            tl.store(place, slope)
        else:
            tl.store(place, slope, mask=(row[:, None] < n) & (column[None, :] < m))
    _put(grad_k, sums_k * scale, batch, head, column, m, kb, kh, kn, WIDTH)
    _put(grad_v, sums_v * grow, batch, head, column, m, vb, vh, vn, WIDTH)


@triton.jit
def _slopes_of(slopes, pair, row, column, start, n, m, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """A block of the scores' gradients, whose first column is `start`."""
    place = slopes + pair.to(tl.int64) * n * m + row[:, None] * m + column[None, :]
    # Blocks start at multiples of their size: all of these rows are to see the first column, or
    # none is to, and then nobody wrote here.
    seen = (start <= row)[:, None]
    if EVEN and CAUSAL:
        return tl.load(place, mask=seen, other=0.0)
    if EVEN:
        return tl.load(place)
    inside = (row[:, None] < n) & (column[None, :] < m)
    if CAUSAL:
        inside = inside & seen
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _biased_queries(
    k, slopes, grad_q, parts, batches, share, heads, n, m, scale, kb, kh, kn, qb, qh, qn,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SUMS: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of queries from those of the scores, and the latter's sums over the batch.

    Both of one head's block of rows and over a share of the batch. `BLOCKS` of keys, or any
    number if it is 0, and then no sums.
    """
    first = tl.program_id(0) * BLOCK
    row = first + tl.arange(0, BLOCK)
    head, part = tl.program_id(1), tl.program_id(2)
    sums = (tl.zeros((BLOCK, BLOCK), tl.float32),) * BLOCKS
    for turn in range(tl.minimum(batches - part * share, share)):
        batch = part * share + turn
        pair = batch * heads + head
        sums_q = tl.zeros((BLOCK, WIDTH), tl.float32)
        if BLOCKS == 0:
            stop = tl.minimum(m, first + BLOCK) if CAUSAL else m
            for start in range(0, stop, BLOCK):
                column = start + tl.arange(0, BLOCK)
                slope = _slopes_of(slopes, pair, row, column, start, n, m, CAUSAL, EVEN)
                key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH, EVEN)
                sums_q = tl.dot(slope, key, sums_q)
        else:
            for j in tl.static_range(BLOCKS):
                column = j * BLOCK + tl.arange(0, BLOCK)
                slope = _slopes_of(slopes, pair, row, column, j * BLOCK, n, m, CAUSAL, EVEN)
                key = _tile(k, batch, head, column, m, kb, kh, kn, WIDTH, EVEN)
                sums_q = tl.dot(slope, key, sums_q)
                if SUMS:
                    more = sums[j] + slope.to(tl.float32)
                    sums = sums[:j] + (more,) + sums[j + 1 :]  # noqa: RUF005, Triton has no other
        _put(grad_q, sums_q * scale, batch, head, row, n, qb, qh, qn, WIDTH)
    for j in tl.static_range(BLOCKS if SUMS else 0):
        column = j * BLOCK + tl.arange(0, BLOCK)
        place = ((part * heads + head).to(tl.int64) * n + row[:, None]) * m + column[None, :]
        tl.store(parts + place, sums[j], mask=(row[:, None] < n) & (column[None, :] < m))


@triton.jit
def _biased_diagonals(
    parts, out, count, heads, n, m, last, spread, CAUSAL: tl.constexpr, ROWS: tl.constexpr,
    DIAGONALS: tl.constexpr,
):  # fmt: skip
    """Sums along the diagonals of `(count, heads, n, m)`, over all of `count`."""
    head = tl.program_id(1)
    diagonal = tl.program_id(0) * DIAGONALS + tl.arange(0, DIAGONALS)
    sums = tl.zeros((ROWS, DIAGONALS), tl.float32)
    for start in range(0, count * n, ROWS):
        index = start + tl.arange(0, ROWS)
        part, row = (index // n).to(tl.int64), index % n
        column = diagonal[None, :] + row[:, None] - last
        inside = (index < count * n)[:, None] & (column >= 0) & (column < m)
        if CAUSAL:
            inside = inside & (column <= row[:, None])
        place = ((part * heads + head) * n + row)[:, None] * m + column
        sums += tl.load(parts + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + head * spread + diagonal, tl.sum(sums, 0), mask=diagonal < spread)


def forward(
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `biased._attend`; everything is contiguous."""
    q, k, v = parts_of(packed)
    batch, n, heads, width = q.shape
    out = q.new_empty(batch, n, heads, width)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    _biased_forward[(triton.cdiv(n, BLOCK) * batch * heads,)](
        q, k, v, bias, mask, seed, out, lse, *_sizes(q, k, bias, scale, dropout),
        *_strides(q, k, v, out), **_constants(q, k, bias, mask, causal, dropout),
        num_warps=4, num_stages=3 if width <= 64 else 2,
    )  # fmt: skip
    return out, lse


def backward(
    grad: torch.Tensor,
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
    needs_bias: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients like `packed`, and of `bias`, which is empty unless it is needed.

    `grad` and `out` are `(batch, n, heads, width)`; everything is contiguous. Makes one more
    tensor of `batch * heads * n * m` values of `q`'s kind meanwhile.
    """
    q, k, v = parts_of(packed)
    grads = [torch.empty_like(x) for x in packed]
    grad_q, grad_k, grad_v = parts_of(grads)
    batch, n, heads, width = q.shape
    m = k.shape[1]
    rows, blocks = triton.cdiv(n, BLOCK), triton.cdiv(m, BLOCK)
    slopes = q.new_empty(batch, heads, n, m)
    constants = _constants(q, k, bias, mask, causal, dropout)
    _biased_keys[(blocks * batch * heads,)](
        q, k, v, bias, mask, seed, grad, out, lse, grad_k, grad_v, slopes,
        *_sizes(q, k, bias, scale, dropout), *_strides(q, k, v, out), **constants,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    is_few = blocks * BLOCK + width <= _MOST_SUMS
    has_sums = needs_bias and is_few
    share = triton.cdiv(batch, _SUMMED_PARTS if has_sums else _PARTS)
    parts = triton.cdiv(batch, share)
    sums = slopes
    if has_sums:
        sums = torch.empty(parts, heads, n, m, dtype=torch.float32, device=q.device)
    _biased_queries[(rows, heads, parts)](
        k, slopes, grad_q, sums, batch, share, heads, n, m, scale, *_strides(k, q),
        WIDTH=width, BLOCK=BLOCK, BLOCKS=blocks if is_few else 0, SUMS=has_sums, CAUSAL=causal,
        EVEN=constants["EVEN"], num_warps=4, num_stages=2,
    )  # fmt: skip
    if bias is None or not needs_bias:
        return grads, grad.new_empty(0, dtype=torch.float32)
    grad_bias = torch.empty_like(bias)
    sizes, many = _sizes(q, k, bias, scale, dropout)[:5], 16
    _biased_diagonals[(triton.cdiv(bias.shape[1], many), heads)](
        sums, grad_bias, len(sums), *sizes, CAUSAL=causal, ROWS=256, DIAGONALS=many
    )
    return grads, grad_bias


def parts_of(packed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values, each `(batch, tokens, heads, width)`."""
    return [part for tensor in packed for part in tensor.unbind(2)]


def _sizes(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float, dropout: float
) -> list[float]:
    """With where the bias's distance of 0 is, and the distances of a head."""
    n, m, spread = q.shape[1], k.shape[1], 0 if bias is None else bias.shape[1]
    last = triton.cdiv(n, BLOCK) * BLOCK - 1
    return [q.shape[2], n, m, last, spread, scale, threshold_of(dropout), 1 / (1 - dropout)]


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of sample, head and token."""
    return [x.stride(dim) for x in tensors for dim in (0, 2, 1)]


def _constants(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    dropout: float,
) -> dict[str, Any]:
    return {
        "WIDTH": q.shape[3],
        "BLOCK": BLOCK,
        "BIASED": bias is not None,
        "CAUSAL": causal,
        "MASKED": mask is not None,
        "DROPS": dropout > 0,
        "EVEN": q.shape[1] % BLOCK == 0 and k.shape[1] % BLOCK == 0,
        # Triton's interpreter runs on a CPU, and cannot.
        "ASSEMBLER": q.is_cuda,
    }
