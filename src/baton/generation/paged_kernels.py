"""The Triton kernel of attention from one new token a sequence to its pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.generation.pages import PAGE

_LEAST_ROWS = 16  # of a matrix product on tensor cores


@triton.jit
def _decode(
    query,
    keys,
    values,
    table,
    context,
    out,
    scale,
    window,
    query_row,
    query_head,
    table_row,
    kv_heads,
    width,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One sequence and one head of keys: all query heads that share it, page after page."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    token = tl.arange(0, PAGE)
    length = tl.load(context + row)
    place = row * query_row + (head * GROUP + member[:, None]) * query_head + column[None, :]
    real = (member[:, None] < GROUP) & (column[None, :] < width)
    q = tl.load(query + place, mask=real, other=0.0)
    first = tl.maximum(length - window, 0)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for block in range(first // PAGE, tl.cdiv(length, PAGE)):
        page = tl.load(table + row * table_row + block).to(tl.int64)
        position = block * PAGE + token
        seen = (position >= first) & (position < length)
        cell = ((page * PAGE + token) * kv_heads + head) * width
        inside = seen[:, None] & (column[None, :] < width)
        k = tl.load(keys + cell[:, None] + column[None, :], mask=inside, other=0.0)
        v = tl.load(values + cell[:, None] + column[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp(most - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = higher
    answer = (sums / total[:, None]).to(out.dtype.element_ty)
    heads = kv_heads * GROUP
    place = (row * heads + head * GROUP + member[:, None]) * width + column[None, :]
    tl.store(out + place, answer, mask=real)


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    context: torch.Tensor,
    *,
    scale: float,
    window: int,
) -> torch.Tensor:
    """See `paged_attention.decode`; `window` of 0 is none."""
    rows, heads, width = query.shape
    kv_heads = keys.shape[1]
    out = torch.empty(rows, heads, width, dtype=query.dtype, device=query.device)
    group = heads // kv_heads
    _decode[(rows, kv_heads)](
        query,
        keys,
        values,
        table,
        context,
        out,
        scale,
        window or 2**30,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        kv_heads,
        width,
        GROUP=group,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        WIDTH=max(_LEAST_ROWS, triton.next_power_of_2(width)),
        PAGE=PAGE,
        num_warps=4,
    )
    return out
