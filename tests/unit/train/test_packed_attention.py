"""Attention within packed samples by our kernels, against the same written out in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from triton_device import DEVICE, needs_kernels

from baton.train import attention, packed

ODD = [1, 70, 16, 133, 1, 9]
SCALE = 0.2
# Triton's interpreter computes in float32; on a GPU the kernels are for 16 bits.
KIND = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
TOLERANCE = 2e-6 if DEVICE.type == "cpu" else 1e-2


def edges_of(lengths, *, pads=3):
    sums = [0, *itertools.accumulate(lengths)]
    return torch.tensor([*sums, *[sums[-1]] * pads], dtype=torch.int32, device=DEVICE)


def drawn(heads, shared, width, lengths):
    """Queries, keys and values, and a gradient of the output."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    sizes = (heads, shared, shared, heads)
    return [torch.randn(tokens, count, width).to(DEVICE, KIND) for count in sizes]


def written_out(q, k, v, lengths):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    pieces = []
    for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", a, b) * SCALE
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        pieces.append(torch.einsum("hij,jhd->ihd", weights, c))
    return torch.cat(pieces)


def outcome(q, k, v, grad, edges, **changed):
    """Output and gradients, with the tiles of each kernel changed so."""
    from baton.train import packed_kernels as kernels

    forward, queries, keys = (
        dataclasses.replace(tiles, **changed)
        for tiles in (kernels.FORWARD, kernels.QUERIES, kernels.KEYS)
    )
    out, lse = kernels.forward(q, k, v, edges, scale=SCALE, tiles=forward)
    grad_q, delta = kernels.grad_of_queries(
        grad, q, k, v, edges, out, lse, scale=SCALE, tiles=queries
    )
    return (
        out,
        grad_q,
        *kernels.grad_of_keys(grad, q, k, v, edges, lse, delta, scale=SCALE, tiles=keys),
    )


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "shared", "width", "lengths", "changed"),
    [
        (8, 1, 64, ODD, {}),
        (2, 2, 64, ODD, {}),
        (4, 2, 128, ODD, {"peeled": False}),
        (7, 1, 128, [200, 3], {}),
        (14, 2, 64, ODD, {"tma": False}),
        (6, 2, 64, [*[1] * 19, 5], {"tma": False, "peeled": False}),
    ],
)
def test_output_and_every_gradient(heads, shared, width, lengths, changed):
    given = drawn(heads, shared, width, lengths)
    *inputs, grad = (x.cpu().double() for x in given)
    wide = [x.requires_grad_() for x in inputs]
    expected = written_out(*wide, lengths)
    expected.backward(grad)
    found = outcome(*given, edges_of(lengths), **changed)
    for got, wanted in zip(found, (expected, *(x.grad for x in wide)), strict=True):
        difference = (got.cpu().double() - wanted).norm() / wanted.norm()
        assert difference < TOLERANCE


@needs_kernels
def test_two_runs_are_the_same_to_the_bit():
    given = drawn(14, 2, 64, ODD)
    first, second = (outcome(*given, edges_of(ODD)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernels
@pytest.mark.parametrize("tma", [True, False])
def test_inputs_may_lie_side_by_side_in_one_tensor(tma):
    q, k, v, grad = drawn(4, 2, 64, ODD)
    joined = torch.cat([q, k, v], 1)
    apart = outcome(q, k, v, grad, edges_of(ODD), tma=tma)
    together = outcome(*joined.split([4, 2, 2], 1), grad, edges_of(ODD), tma=tma)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@needs_kernels
@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_plan_has_each_tile_once_and_the_longest_work_first(is_reversed):
    from baton.train.packed_kernels import plan_of

    lengths = [1, 70, 16, 0, 133, 9, *[5] * 130]
    plan = plan_of(edges_of(lengths), sum(lengths), 16, is_reversed=is_reversed).tolist()
    ends = list(itertools.accumulate(lengths))
    expected = [
        [end - length, end, first]
        for end, length in zip(ends, lengths, strict=True)
        for first in range(end - length, end, 16)
    ]
    work = [entry for entry in plan if entry[1]]
    assert sorted(work) == sorted(expected)
    assert plan[len(work) :] == [[0, 0, 0]] * (len(plan) - len(work))
    tiles = [
        -(-(stop - first) // 16) if is_reversed else (first - start) // 16
        for start, stop, first in work
    ]
    assert tiles == sorted(tiles, reverse=True)


@needs_kernels
def test_the_operator_gives_the_kernels_gradients():
    q, k, v, grad = drawn(4, 2, 64, ODD)
    expected = outcome(q, k, v, grad, edges_of(ODD))
    # As linear layers leave them, and as transformers hands them over.
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    out = packed.attend(*inputs, edges_of(ODD), SCALE)
    out.backward(grad)
    for got, wanted in zip((out, *(x.grad for x in inputs)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@needs_kernels
def test_compiled_layers_take_any_number_of_tokens():
    torch.library.opcheck(
        packed._attend, (*drawn(4, 2, 64, [5, 9])[:3], edges_of([5, 9]), SCALE),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_what_the_kernels_do_not_know_is_left_to_others():
    # On a CPU there is nothing for Triton to launch on.
    query, key = torch.empty(8, 4, 64, dtype=torch.bfloat16), torch.empty(8, 2, 64)
    assert not packed.can_attend(query, key)
    assert not packed.can_attend(query.float(), key)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_model_is_handed_the_same_by_either_kernel():
    q, k, v, _ = (x[None].transpose(1, 2) for x in drawn(14, 2, 64, ODD))
    module = torch.nn.Identity()
    by_pieces, _ = attention.packed_attention(module, q, k, v, None, packed_lengths=tuple(ODD))
    by_edges, _ = attention.packed_attention(
        module, q, k, v, None, cu_seq_lens_q=edges_of(ODD), max_length_q=max(ODD)
    )
    torch.testing.assert_close(by_edges, by_pieces, rtol=0, atol=0.03)


def test_a_compiler_asks_once_whether_there_are_kernels():
    def chosen(q, k):
        return q + 1 if packed.can_attend(q, k) else q

    query, key = (torch.zeros(8, n, 64, dtype=torch.bfloat16) for n in (4, 2))
    found = torch.compile(chosen, backend="eager", fullgraph=True)(query, key)
    assert torch.equal(found, query)
