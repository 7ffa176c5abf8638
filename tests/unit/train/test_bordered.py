"""Weights with adapters on their border: the products are those of both by themselves."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, needs_kernels

from baton.train import bordered
from baton.train.bordered import Bordered
from baton.train.dropout import drop


@pytest.mark.parametrize("has_border", [True, False])
def test_one_product_computes_weight_and_adapter(has_border):
    torch.manual_seed(0)
    one, other, a, b = (torch.randn(*s) for s in ((6, 5), (4, 5), (3, 5), (10, 3)))
    weight = torch.cat([one, other])
    held = bordered.with_border([one, other], 3) if has_border else weight.clone()
    made = Bordered.filled([held], a, b)
    x, grad = torch.randn(7, 5), torch.randn(7, 10)
    thin = made.thin(x)
    torch.testing.assert_close(thin, x @ a.T)
    both = x @ (weight + b @ a).T
    torch.testing.assert_close(made.outputs(x, thin), both)
    out = torch.empty(7, 10)
    made.outputs_of(torch.cat((x, thin), 1), out)
    torch.testing.assert_close(out, both)
    torch.testing.assert_close(made.gradient_parts(grad), torch.cat((grad @ weight, grad @ b), 1))
    of_input, of_thin = made.gradient(grad)
    torch.testing.assert_close(of_input, grad @ (weight + b @ a))
    torch.testing.assert_close(of_thin, grad @ b)
    assert torch.equal(held[:10, :5], weight)


def test_what_another_adapter_left_counts_nothing(monkeypatch):
    monkeypatch.setattr(bordered, "border_of", lambda rank, device: 8)
    torch.manual_seed(0)
    w, a, b = torch.randn(6, 5), torch.randn(3, 5), torch.randn(6, 3)
    weight = bordered.with_border([w], 8)
    Bordered.filled([weight], torch.full((8, 5), 9.0), torch.full((6, 8), 9.0))
    made = Bordered.filled([weight], a, b)
    x, grad = torch.randn(7, 5), torch.randn(7, 6)
    torch.testing.assert_close(made.thin(x), torch.cat((x @ a.T, torch.zeros(7, 5)), 1))
    torch.testing.assert_close(made.outputs(x, made.thin(x)), x @ (w + b @ a).T)
    torch.testing.assert_close(made.gradient(grad)[0], grad @ (w + b @ a))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_gradient_of_the_input(p):
    beside, a, seed = gradient(tokens=9, columns=11, rank=3, p=p)
    added = beside[:, 11:14] @ a
    expected = beside[:, :11] + (drop(added, seed, p) if p else added)
    torch.testing.assert_close(bordered.input_gradient(beside, a, seed, p), expected)


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "columns", "rank", "p"), [(70, 150, 4, 0.0), (65, 128, 48, 0.25), (33, 40, 90, 0.25)]
)
def test_kernel_computes_what_torch_computes(tokens, columns, rank, p):
    beside, a, seed = gradient(tokens=tokens, columns=columns, rank=rank, p=p)
    expected = bordered.input_gradient(beside.double(), a.double(), seed, p)
    there = None if seed is None else seed.to(DEVICE)
    got = bordered.kernels.input_gradient(beside.to(DEVICE), a.to(DEVICE), there, p)
    assert (got.cpu().double() - expected).norm() / expected.norm() < 1e-5


def gradient(*, tokens, columns, rank, p):
    torch.manual_seed(0)
    seed = torch.tensor([7], dtype=torch.int32) if p else None
    return torch.randn(tokens, columns + rank + 5), torch.randn(rank, columns), seed
