"""Triton kernels of causal attention within packed samples: forward and backward.

Samples of a few hundred tokens are smaller than the tiles of kernels made for long ones. Here the
rows of a tile are pairs of a token and a query head, of all the heads that share a key's: with
eight of them 128 rows are 16 tokens, of which the diagonal and a sample's end waste little, and
gradients of keys are summed over the heads where they are made. There is a program for each tile
that a sample has, in an order that starts the longest work first.

The blockwise softmax is that of FlashAttention-2 (Dao, 2023). Nothing is added atomically, so that
results are the same in every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: `rows` pairs of token and head, against `keys` tokens.

    With `peeled` tiles on the diagonal have a loop of their own, and others no masks. With `tma`
    what the loop reads comes by the GPU's copy engine (Hopper and later), where its layout allows.
    Fewer `registers` a thread than the compiler would take let more programs run at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    peeled: bool = True
    tma: bool = True
    registers: int | None = None


# Of those tried on an H200 the best for samples of 275 tokens on average, and within a tenth of the
# best for 4,096.
FORWARD = Tiles(rows=128, keys=64, warps=8, stages=2, registers=128)
QUERIES = Tiles(rows=64, keys=64, warps=4, stages=2)
KEYS = Tiles(rows=64, keys=64, warps=4, stages=2, peeled=False)


@triton.jit(do_not_specialize=["samples", "items"])
def _packed_plan(edges, plan, samples, items, TILE: tl.constexpr, REVERSED: tl.constexpr):
    """Where each program works: first and last token of its sample, first token of its tile.

    Tiles far into their sample come first, or with `REVERSED` those far from its end: they are
    the longest work. Entries left over are zeros.
    """
    mine = tl.program_id(0)
    each = tl.arange(0, 128)
    if mine == samples:
        total = 0
        for other in range(0, samples, 128):
            index = other + each
            length = tl.load(edges + index + 1, mask=index < samples, other=0)
            length -= tl.load(edges + index, mask=index < samples, other=0)
            total += tl.sum((length + TILE - 1) // TILE, 0)
        for begin in range(total, items, 128):
            for part in tl.static_range(3):
                index = begin + each
                tl.store(plan + 3 * index + part, 0 * index, mask=index < items)
        return
    start, stop = tl.load(edges + mine), tl.load(edges + mine + 1)
    count = (stop - start + TILE - 1) // TILE
    for begin in range(0, count, 16):
        number = begin + tl.arange(0, 16)
        place = tl.zeros((16,), tl.int32)
        for other in range(0, samples, 128):
            index = other + each
            length = tl.load(edges + index + 1, mask=index < samples, other=0)
            length -= tl.load(edges + index, mask=index < samples, other=0)
            left = ((length + TILE - 1) // TILE)[None, :] - number[:, None]
            equal = (left > 0) & (index < mine)[None, :]
            place += tl.sum(tl.maximum(left - 1, 0) + equal.to(tl.int32), 1)
        tile = count - 1 - number if REVERSED else number
        known = number < count
        tl.store(plan + 3 * place, start + 0 * number, mask=known)
        tl.store(plan + 3 * place + 1, stop + 0 * number, mask=known)
        tl.store(plan + 3 * place + 2, start + tile * TILE, mask=known)


@triton.jit
def _work(plan, heads):
    """This program's sample and tile, and its key/value head."""
    number, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    entry = plan + 3 * number
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), head


@triton.jit
def _keys_from(
    source, begin, limit, head, stride_t, stride_h,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`(SIZE, WIDTH)` keys or values of a head from token `begin`.

    Zeros from `limit` on if it is masked. TMA gives the next sample's, of weight zero.
    """
    if TMA:
        tile = source.load([begin, head * WIDTH])
    else:
        index = tl.arange(0, SIZE)
        pointer = source + tl.cast(begin, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h
        pointer += index[:, None] * stride_t + tl.arange(0, WIDTH)[None, :]
        if MASKED:
            tile = tl.load(pointer, mask=(begin + index < limit)[:, None], other=0.0)
        else:
            tile = tl.load(pointer)
    return tile


@triton.jit
def _rows_from(
    source, token, limit, head, stride_t, stride_h, ROWS: tl.constexpr, SIDE: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`(ROWS, WIDTH)` pairs of token and head from token `token`, `SIDE` of each token.

    Zeros from token `limit` on and where there are fewer heads; TMA gives what is there.
    """
    if TMA:
        tile = source.load([token, head * GROUP, 0]).reshape(ROWS, WIDTH)
    else:
        row = tl.arange(0, ROWS)
        pointer = source + tl.cast(token, tl.int64) * stride_t
        pointer += tl.cast(head, tl.int64) * GROUP * stride_h
        pointer += (row // SIDE * stride_t + row % SIDE * stride_h)[:, None]
        pointer += tl.arange(0, WIDTH)[None, :]
        known = _known(token, limit, ROWS, SIDE, GROUP)
        tile = tl.load(pointer, mask=known[:, None], other=0.0)
    return tile


@triton.jit
def _known(token, limit, ROWS: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr):
    """Which rows are pairs of a token before `limit` and a head."""
    row = tl.arange(0, ROWS)
    known = row < tl.minimum(limit - token, ROWS // SIDE) * SIDE
    if SIDE != GROUP:
        known = known & (row % SIDE < GROUP)
    return known


@triton.jit
def _attended(
    query, k, v, begin, first, last, head, scale, most, total, sums, k_t, k_h, v_t, v_h,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A step of the blockwise softmax: over `KEYS` keys from token `begin`."""
    key = _keys_from(k, begin, last, head, k_t, k_h, KEYS, WIDTH, MASKED, TMA)
    scores = tl.dot(query, tl.trans(key))
    if MASKED:
        token = first + tl.arange(0, ROWS) // GROUP
        column = begin + tl.arange(0, KEYS)
        scores = tl.where(token[:, None] >= column[None, :], scores, float("-inf"))
    # Every row sees the first key of its sample, so the largest score is never infinite.
    higher = tl.maximum(most, tl.max(scores, 1) * scale)
    weight = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(most - higher)
    total = total * shrink + tl.sum(weight, 1)
    sums = sums * shrink[:, None]
    value = _keys_from(v, begin, last, head, v_t, v_h, KEYS, WIDTH, MASKED, TMA)
    return higher, total, tl.dot(weight.to(query.dtype), value, sums)


@triton.jit(do_not_specialize=["tokens"])
def _packed_forward(
    q, k, v, plan, out, lse, tokens, heads, scale, q_t, q_h, k_t, k_h, v_t, v_h,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PEELED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    start, stop, first, head = _work(plan, heads)
    if first >= stop:
        return
    last = tl.minimum(first + ROWS // GROUP, stop)
    row = tl.arange(0, ROWS)
    known = _known(first, last, ROWS, GROUP, GROUP)
    query = _rows_from(q, first, last, head, q_t, q_h, ROWS, GROUP, GROUP, WIDTH, False)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    middle = start
    if PEELED:
        middle += (first + 1 - start) // KEYS * KEYS
        for begin in range(start, middle, KEYS):
            most, total, sums = _attended(
                query, k, v, begin, first, last, head, scale, most, total, sums,
                k_t, k_h, v_t, v_h, GROUP, WIDTH, ROWS, KEYS, False, TMA,
            )  # fmt: skip
    for begin in range(middle, last, KEYS):
        most, total, sums = _attended(
            query, k, v, begin, first, last, head, scale, most, total, sums,
            k_t, k_h, v_t, v_h, GROUP, WIDTH, ROWS, KEYS, True, TMA,
        )  # fmt: skip
    base = tl.cast(first, tl.int64) * heads + head
    place = (base + row // GROUP * heads) * GROUP + row % GROUP
    tl.store(
        out + place[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :],
        (sums / total[:, None]).to(out.dtype.element_ty),
        mask=known[:, None],
    )
    base = (tl.cast(head, tl.int64) * tokens + first) * GROUP
    tl.store(lse + base + row, most + tl.log2(total), mask=known)


@triton.jit
def _query_slopes(
    query, grad, k, v, begin, first, last, head, scale, normal, product, sums, k_t, k_h, v_t, v_h,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What `KEYS` keys from token `begin` add to the gradients of queries."""
    key = _keys_from(k, begin, last, head, k_t, k_h, KEYS, WIDTH, MASKED, TMA)
    value = _keys_from(v, begin, last, head, v_t, v_h, KEYS, WIDTH, MASKED, TMA)
    weight = tl.exp2(tl.dot(query, tl.trans(key)) * scale - normal[:, None])
    if MASKED:
        token = first + tl.arange(0, ROWS) // GROUP
        column = begin + tl.arange(0, KEYS)
        weight = tl.where(token[:, None] >= column[None, :], weight, 0.0)
    slope = weight * (tl.dot(grad, tl.trans(value)) - product[:, None])
    return tl.dot(slope.to(key.dtype), key, sums)


@triton.jit(do_not_specialize=["tokens"])
def _packed_queries(
    q, k, v, plan, out, grad, lse, delta, grad_q, tokens, heads, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PEELED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and on the way each row's product of output and gradient."""
    start, stop, first, head = _work(plan, heads)
    if first >= stop:
        return
    last = tl.minimum(first + ROWS // GROUP, stop)
    row = tl.arange(0, ROWS)
    known = _known(first, last, ROWS, GROUP, GROUP)
    query = _rows_from(q, first, last, head, q_t, q_h, ROWS, GROUP, GROUP, WIDTH, False)
    slope = _rows_from(grad, first, last, head, g_t, g_h, ROWS, GROUP, GROUP, WIDTH, False)
    o_t = heads * GROUP * WIDTH
    output = _rows_from(out, first, last, head, o_t, WIDTH, ROWS, GROUP, GROUP, WIDTH, False)
    product = tl.sum(slope.to(tl.float32) * output.to(tl.float32), 1)
    base = (tl.cast(head, tl.int64) * tokens + first) * GROUP
    tl.store(delta + base + row, product, mask=known)
    normal = tl.load(lse + base + row, mask=known, other=float("inf"))
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    middle = start
    if PEELED:
        middle += (first + 1 - start) // KEYS * KEYS
        for begin in range(start, middle, KEYS):
            sums = _query_slopes(
                query, slope, k, v, begin, first, last, head, scale * 1.4426950408889634,
                normal, product, sums, k_t, k_h, v_t, v_h,
                GROUP, WIDTH, ROWS, KEYS, False, TMA,
            )  # fmt: skip
    for begin in range(middle, last, KEYS):
        sums = _query_slopes(
            query, slope, k, v, begin, first, last, head, scale * 1.4426950408889634,
            normal, product, sums, k_t, k_h, v_t, v_h,
            GROUP, WIDTH, ROWS, KEYS, True, TMA,
        )  # fmt: skip
    base = tl.cast(first, tl.int64) * heads + head
    place = (base + row // GROUP * heads) * GROUP + row % GROUP
    tl.store(
        grad_q + place[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :],
        (sums * scale).to(grad_q.dtype.element_ty),
        mask=known[:, None],
    )


@triton.jit
def _key_slopes(
    key, value, q, grad, lse, delta, token, first, stop, head, tokens, scale, sums_k, sums_v,
    q_t, q_h, g_t, g_h,
    GROUP: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What `ROWS` queries from token `token` add to the gradients of keys and values."""
    row = tl.arange(0, ROWS)
    query = _rows_from(q, token, stop, head, q_t, q_h, ROWS, SIDE, GROUP, WIDTH, TMA)
    slope = _rows_from(grad, token, stop, head, g_t, g_h, ROWS, SIDE, GROUP, WIDTH, TMA)
    place = (tl.cast(head, tl.int64) * tokens + token) * GROUP + row // SIDE * GROUP + row % SIDE
    known = _known(token, stop, ROWS, SIDE, GROUP)
    # A row that is none has no weight.
    normal = tl.load(lse + place, mask=known, other=float("inf"))
    product = tl.load(delta + place, mask=known, other=0.0)
    weight = tl.exp2(tl.dot(key, tl.trans(query)) * scale - normal[None, :])
    if MASKED:
        column = first + tl.arange(0, KEYS)
        weight = tl.where((token + row // SIDE)[None, :] >= column[:, None], weight, 0.0)
    sums_v = tl.dot(weight.to(slope.dtype), slope, sums_v)
    grown = weight * (tl.dot(value, tl.trans(slope)) - product[None, :])
    return tl.dot(grown.to(query.dtype), query, sums_k), sums_v


@triton.jit(do_not_specialize=["tokens"])
def _packed_keys(
    q, k, v, plan, grad, lse, delta, grad_k, grad_v, tokens, heads, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h,
    GROUP: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PEELED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, summed over the heads that share them."""
    _, stop, first, head = _work(plan, heads)
    if first >= stop:
        return
    each: tl.constexpr = ROWS // SIDE
    key = _keys_from(k, first, stop, head, k_t, k_h, KEYS, WIDTH, True, False)
    value = _keys_from(v, first, stop, head, v_t, v_h, KEYS, WIDTH, True, False)
    sums_k = tl.zeros((KEYS, WIDTH), tl.float32)
    sums_v = tl.zeros((KEYS, WIDTH), tl.float32)
    middle = stop
    if PEELED:
        # From here on every token comes after all of these keys.
        middle = tl.minimum(first + (KEYS - 1 + each - 1) // each * each, stop)
    for token in range(first, middle, each):
        sums_k, sums_v = _key_slopes(
            key, value, q, grad, lse, delta, token, first, stop, head, tokens,
            scale * 1.4426950408889634, sums_k, sums_v, q_t, q_h, g_t, g_h,
            GROUP, SIDE, WIDTH, ROWS, KEYS, True, TMA,
        )  # fmt: skip
    if PEELED:
        for token in range(middle, stop, each):
            sums_k, sums_v = _key_slopes(
                key, value, q, grad, lse, delta, token, first, stop, head, tokens,
                scale * 1.4426950408889634, sums_k, sums_v, q_t, q_h, g_t, g_h,
                GROUP, SIDE, WIDTH, ROWS, KEYS, False, TMA,
            )  # fmt: skip
    index = tl.arange(0, KEYS)
    base = (tl.cast(first, tl.int64) * heads + head) * WIDTH
    place = base + index[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    known = (first + index < stop)[:, None]
    kind: tl.constexpr = grad_k.dtype.element_ty
    tl.store(grad_k + place, (sums_k * scale).to(kind), mask=known)
    tl.store(grad_v + place, sums_v.to(kind), mask=known)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    edges: torch.Tensor,
    *,
    scale: float,
    tiles: Tiles = FORWARD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `packed.attend`."""
    (tokens, all_heads, width), heads = q.shape, k.shape[1]
    group = all_heads // heads
    plan = plan_of(edges, tokens, tiles.rows // group)
    out = q.new_empty(tokens, all_heads, width)
    lse = torch.empty(heads, tokens, group, dtype=torch.float32, device=q.device)
    sources, tma = _keys_by_tma(k, v, tiles)
    _packed_forward[(len(plan) * heads,)](
        q, *sources, plan, out, lse, tokens, heads, scale * _LOG2E, *_strides(q, k, v),
        **_constants(group, width, tiles, tma),
    )  # fmt: skip
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    edges: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `q`, `k` and `v`, each contiguous."""
    grad_q, delta = grad_of_queries(grad, q, k, v, edges, out, lse, scale=scale)
    return grad_q, *grad_of_keys(grad, q, k, v, edges, lse, delta, scale=scale)


def grad_of_queries(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    edges: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    tiles: Tiles = QUERIES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `q`, and what that of keys needs: rows' products of `out` and `grad`."""
    (tokens, all_heads, width), heads = q.shape, k.shape[1]
    group = all_heads // heads
    plan = plan_of(edges, tokens, tiles.rows // group)
    grad_q, delta = q.new_empty(tokens, all_heads, width), torch.empty_like(lse)
    sources, tma = _keys_by_tma(k, v, tiles)
    _packed_queries[(len(plan) * heads,)](
        q, *sources, plan, out, grad, lse, delta, grad_q, tokens, heads, scale,
        *_strides(q, k, v, grad), **_constants(group, width, tiles, tma),
    )  # fmt: skip
    return grad_q, delta


def grad_of_keys(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    edges: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    *,
    scale: float,
    tiles: Tiles = KEYS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `k` and `v`."""
    (tokens, all_heads, width), heads = q.shape, k.shape[1]
    group = all_heads // heads
    plan = plan_of(edges, tokens, tiles.keys, is_reversed=True)
    grad_k, grad_v = (k.new_empty(tokens, heads, width) for _ in range(2))
    query, slope, side, tma = q, grad, group, False
    if tiles.tma and _fits_tma(q) and _fits_tma(grad):
        # A box has sides that are powers of two: of seven heads it takes eight, one for nothing.
        side, tma = triton.next_power_of_2(group), True
        box = [tiles.rows // side, side, width]
        query, slope = (TensorDescriptor.from_tensor(x, box) for x in (q, grad))
    _packed_keys[(len(plan) * heads,)](
        query, k, v, plan, slope, lse, delta, grad_k, grad_v, tokens, heads, scale,
        *_strides(q, k, v, grad), SIDE=side, **_constants(group, width, tiles, tma),
    )  # fmt: skip
    return grad_k, grad_v


def plan_of(
    edges: torch.Tensor, tokens: int, tile: int, *, is_reversed: bool = False
) -> torch.Tensor:
    """`(programs, 3)` int32, an entry for each tile of `tile` tokens that a sample has.

    There are as many entries as samples of such lengths may need, some of which are empty.
    """
    samples = len(edges) - 1
    plan = edges.new_empty(triton.cdiv(tokens, tile) + samples, 3)
    _packed_plan[(samples + 1,)](
        edges, plan, samples, len(plan), TILE=tile, REVERSED=is_reversed, num_warps=4
    )
    return plan


def _keys_by_tma(k: torch.Tensor, v: torch.Tensor, tiles: Tiles) -> tuple[tuple[Any, ...], bool]:
    if not tiles.tma or not all(_fits_tma(x) and x.stride(1) == x.shape[2] for x in (k, v)):
        return (k, v), False
    tokens, heads, width = k.shape
    flat = (x.as_strided((tokens, heads * width), (x.stride(0), 1)) for x in (k, v))
    return tuple(TensorDescriptor.from_tensor(x, [tiles.keys, width]) for x in flat), True


def _fits_tma(x: torch.Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(s * x.itemsize % 16 == 0 for s in x.stride()[:-1])


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _constants(group: int, width: int, tiles: Tiles, tma: bool) -> dict[str, int | None]:
    return {
        "GROUP": group,
        "WIDTH": width,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "PEELED": tiles.peeled,
        "TMA": tma,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": tiles.registers,
    }
