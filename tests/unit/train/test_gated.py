"""The gated MLP in one operator: against the same written out, and its kernels against torch."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, needs_kernels

from baton.train import gated
from baton.train.dropout import drop

SEEDS = torch.tensor([11, 12])


def parts(tokens, size, width, rank, down_rank, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {
        "x": (tokens, size),
        "halves": (2 * width, size),
        "a": (2 * rank, size),
        "b": (2 * width, rank),
        "weight": (size, width),
        "down_a": (down_rank, width),
        "down_b": (size, down_rank),
    }
    return {name: torch.randn(*shape, dtype=dtype) * 0.3 for name, shape in shapes.items()}


def written_out(x, halves, a, b, weight, down_a, down_b, *, seeds, p):
    def read(value, number):
        return value if seeds is None else drop(value, seeds[number : number + 1], p)

    thin, width, rank = read(x, 0) @ a.T, len(b) // 2, b.shape[1]
    both = x @ halves.T
    first = both[:, :width] + thin[:, :rank] @ b[:width].T
    second = both[:, width:] + thin[:, rank:] @ b[width:].T
    product = torch.nn.functional.silu(first) * second
    return product @ weight.T + read(product, 1) @ down_a.T @ down_b.T


@pytest.mark.parametrize(("seeds", "p"), [(None, 0.0), (SEEDS, 0.3)])
def test_output_and_every_gradient(seeds, p):
    learnt = ("x", "a", "b", "down_a", "down_b")
    values = parts(tokens=7, size=6, width=10, rank=2, down_rank=3)
    grad = torch.randn(7, 6, dtype=torch.float64)
    found = []
    for kind in ("ours", "theirs"):
        given = {n: v.clone().requires_grad_(n in learnt) for n, v in values.items()}
        if kind == "ours":
            lists = {n: [given[n]] for n in ("halves", "weight")}
            out, *_ = gated.gated_mlp(**{**given, **lists}, seeds=seeds, p=p)
        else:
            out = written_out(**given, seeds=seeds, p=p)
        out.backward(grad)
        found.append([out.detach(), *(given[name].grad for name in learnt)])
    for name, ours, theirs in zip(("out", *learnt), *found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=name)


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "width", "rank", "down_rank", "p"),
    [(70, 150, 4, 20, 0.0), (130, 64, 16, 16, 0.25), (33, 200, 40, 70, 0.25)],
)
def test_kernels_compute_what_torch_computes(tokens, width, rank, down_rank, p):
    from baton.train import gated_kernels

    torch.manual_seed(0)
    both = torch.randn(tokens, 2 * width)
    thin, b = torch.randn(tokens, 2 * rank), torch.randn(2 * width, rank)
    grad, grad_thin = torch.randn(tokens, width), torch.randn(tokens, down_rank)
    down_a = torch.randn(down_rank, width)
    seed = torch.tensor([12345], dtype=torch.int32) if p else None
    forward, backward = (both, thin, b), (grad, grad_thin, down_a, both, thin, b)
    wide = [[x.double() for x in given] for given in (forward, backward)]
    expected = [*gated.gate(*wide[0], seed, p), *gated.gate_backward(*wide[1], seed, p)]
    on = [[x.to(DEVICE) for x in given] for given in (forward, backward)]
    there = None if seed is None else seed.to(DEVICE)
    got = [*gated_kernels.forward(*on[0], there, p), *gated_kernels.backward(*on[1], there, p)]
    assert len(got) == len(expected) == 5
    for ours, theirs in zip(got, expected, strict=True):
        difference = (ours.cpu().double() - theirs).norm() / theirs.norm()
        assert difference < 1e-5
