"""Attention to pages: as over the sequence end to end, by either way of computing it."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, needs_kernels

from baton.generation import paged_attention
from baton.generation.pages import PAGE

LENGTHS = (1, PAGE, PAGE + 1, 200, 6 * PAGE)


def sequences(heads, kv_heads, width):
    """Random keys and values of sequences, and the same scattered over pages, with NaN between."""
    torch.manual_seed(0)
    pages = torch.randperm(40)[: sum(-(-n // PAGE) for n in LENGTHS)] + 1
    shape = (41 * PAGE, kv_heads, width)
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    table = torch.zeros(len(LENGTHS), 6, dtype=torch.int32)
    whole, used = [], 0
    for row, length in enumerate(LENGTHS):
        count = -(-length // PAGE)
        table[row, :count] = pages[used : used + count]
        used += count
        key, value = torch.randn(2, length, kv_heads, width)
        slots = table[row].repeat_interleave(PAGE).long() * PAGE + torch.arange(6 * PAGE) % PAGE
        keys[slots[:length]], values[slots[:length]] = key, value
        whole.append((key, value))
    query = torch.randn(heads, len(LENGTHS), width).transpose(0, 1)
    return query, keys, values, table, whole


def end_to_end(query, whole, *, scale, window):
    rows = []
    for q, (key, value) in zip(query.double(), whole, strict=True):
        first = max(0, len(key) - window) if window else 0
        group = q.shape[0] // key.shape[1]
        k, v = (x[first:].double().repeat_interleave(group, dim=1) for x in (key, value))
        weights = (torch.einsum("hw,nhw->hn", q, k) * scale).softmax(-1)
        rows.append(torch.einsum("hn,nhw->hw", weights, v))
    return torch.stack(rows)


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window"),
    [(16, 2, 128, 0), (4, 4, 80, 0), (14, 2, 64, 50), (28, 4, 128, 0)],
)


@SHAPES
def test_by_sdpa(heads, kv_heads, width, window):
    query, keys, values, table, whole = sequences(heads, kv_heads, width)
    context = torch.tensor(LENGTHS, dtype=torch.int32)
    # SDPA multiplies what it masks by zero, so the pool begins with zeros, not with NaN.
    pool = (query, keys.nan_to_num(), values.nan_to_num(), table, context)
    found = paged_attention.decode(*pool, scale=0.1, window=window)
    expected = end_to_end(query, whole, scale=0.1, window=window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@needs_kernels
@SHAPES
def test_by_the_kernel(heads, kv_heads, width, window):
    from baton.generation.paged_kernels import decode

    query, keys, values, table, whole = sequences(heads, kv_heads, width)
    context = torch.tensor(LENGTHS, dtype=torch.int32)
    pool = (x.to(DEVICE) for x in (query, keys, values, table, context))
    found = decode(*pool, scale=0.1, window=window).cpu()
    expected = end_to_end(query, whole, scale=0.1, window=window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
