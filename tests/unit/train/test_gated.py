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


def as_given(values):
    """The parts as the operator takes them: weights in lists, B on a diagonal."""
    given = {n: [v] if n in ("halves", "weight") else v for n, v in values.items()}
    return given | {"b": torch.block_diag(*values["b"].chunk(2))}


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
            out, *_ = gated.gated_mlp(**as_given(given), seeds=seeds, p=p)
        else:
            out = written_out(**given, seeds=seeds, p=p)
        out.backward(grad)
        found.append([out.detach(), *(given[name].grad for name in learnt)])
    for name, ours, theirs in zip(("out", *learnt), *found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=name)


def test_rows_are_worked_off_in_parts(monkeypatch):
    values = parts(tokens=23, size=6, width=10, rank=2, down_rank=3)
    given = as_given(values)
    expected = gated.gated_mlp(**given, seeds=SEEDS, p=0.3)
    monkeypatch.setattr(gated, "_FORWARD", (2, 11))
    for ours, theirs in zip(gated.gated_mlp(**given, seeds=SEEDS, p=0.3), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    found = []
    for rows in (5, 100):
        monkeypatch.setattr(gated, "_BACKWARD", (4, rows))
        learnt = {n: given[n].clone().requires_grad_() for n in ("x", "a", "b", "down_a")}
        out, *_ = gated.gated_mlp(**{**given, **learnt}, seeds=SEEDS, p=0.3)
        out.square().sum().backward()
        found.append([v.grad for v in learnt.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_a_second_backward_pass_is_an_error_and_no_wrong_gradient():
    values = parts(tokens=7, size=6, width=10, rank=2, down_rank=3)
    given = as_given(values)
    given["a"] = values["a"].requires_grad_()
    out, *_ = gated.gated_mlp(**given, seeds=None, p=0.0)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "width", "rank", "down_rank", "p", "first"),
    [(70, 150, 4, 20, 0.0, 0), (130, 64, 16, 16, 0.25, 40), (33, 200, 40, 70, 0.25, 0)],
)
def test_kernels_compute_what_torch_computes(tokens, width, rank, down_rank, p, first):
    torch.manual_seed(0)
    both, thin = torch.randn(tokens, 2 * width), torch.randn(tokens, 2 * rank)
    beside, down_a = torch.randn(tokens, width + 80), torch.randn(down_rank, width)
    seed = torch.tensor([12345], dtype=torch.int32) if p else None
    values = [both, thin, beside, down_a]
    expected = outcome(gated, [x.double() for x in values], seed, p, first)
    there = None if seed is None else seed.to(DEVICE)
    got = outcome(gated.kernels, [x.to(DEVICE) for x in values], there, p, first)
    assert got.keys() == expected.keys()
    for name, ours in got.items():
        difference = (ours.cpu().double() - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, name


def outcome(module, values, seed, p, first):
    """What a module's functions make of the activation and of its gradients."""
    both, thin, beside, down_a = values
    width, down_rank = down_a.shape[1], down_a.shape[0]
    forward, backward = (
        (module.gate, module.gate_backward)
        if module is gated
        else (module.forward, module.backward)
    )
    out = torch.empty_like(beside)[:, :width]
    forward(both, out)
    grad, grad_thin = beside[:, :width], beside[:, width : width + down_rank]
    changed = both.clone()
    grad_a, grad_b = backward(grad, grad_thin, down_a, changed, thin, seed, p, first)
    return {"out": out, "both": changed, "a": grad_a, "b": grad_b}
