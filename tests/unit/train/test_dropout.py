"""Dropout by a hash: its share, its seeds, and the same mask from torch and from Triton."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, needs_kernels

from baton.train.dropout import HashDropout, drop, drop_product, kept

RATE = 0.1


def seeded(number):
    return torch.tensor([number])


def test_hash_dropout_takes_its_share_and_another_with_every_seed():
    dropout, x = HashDropout(0.1), torch.rand(400, 500) + 1
    torch.manual_seed(1)
    one, other = dropout(x), dropout(x)
    for y in (one, other):
        kept = y > 0
        assert abs(float(kept.float().mean()) - 0.9) < 4 * (0.09 / x.numel()) ** 0.5
        torch.testing.assert_close(y[kept], x[kept] / 0.9)
    flat = torch.stack([(one > 0).flatten().float(), (other > 0).flatten().float()])
    assert abs(float(torch.corrcoef(flat)[0, 1])) < 0.01
    neighbours = torch.stack([flat[0][:-1], flat[0][1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01
    torch.manual_seed(1)
    assert torch.equal(dropout(x), one)
    assert dropout.eval()(x) is x


def test_a_drop_takes_its_share_and_another_with_every_seed():
    x = torch.rand(400, 500) + 1
    one, other = drop(x, seeded(1), RATE), drop(x, seeded(2), RATE)
    for y in (one, other):
        stays = y > 0
        assert abs(float(stays.float().mean()) - 0.9) < 4 * (0.09 / x.numel()) ** 0.5
        torch.testing.assert_close(y[stays], x[stays] / 0.9)
    flat = torch.stack([(one > 0).flatten().float(), (other > 0).flatten().float()])
    assert abs(float(torch.corrcoef(flat)[0, 1])) < 0.01
    assert torch.equal(drop(x, seeded(1), RATE), one)
    assert torch.equal(one > 0, kept(x.shape, seeded(1), RATE))


@needs_kernels
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_kernel_drops_what_torch_drops(rate):
    from baton.train import dropout_kernels

    x = torch.rand(37, 211) + 1
    for number in (0, 2**31 - 2):
        expected = torch.where(kept(x.shape, seeded(number), rate), x / (1 - rate), 0.0)
        seed = seeded(number).to(torch.int32).to(DEVICE)
        got = dropout_kernels.drop(x.to(DEVICE), seed, rate).cpu()
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got, expected)


def test_a_product_of_what_is_dropped_goes_on_where_rows_before_it_ended():
    x, a = torch.randn(20, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    expected = drop(x, seeded(5), RATE) @ a.T
    torch.testing.assert_close(drop_product(x, a, seeded(5), RATE), expected)
    torch.testing.assert_close(drop_product(x[7:], a, seeded(5), RATE, 7), expected[7:])


@needs_kernels
@pytest.mark.parametrize(("tokens", "width", "rank"), [(37, 211, 3), (130, 64, 40), (65, 100, 130)])
def test_the_kernel_multiplies_what_torch_drops(tokens, width, rank):
    from baton.train import dropout_kernels

    torch.manual_seed(0)
    x, a, number = torch.randn(tokens, width + 9), torch.randn(rank, width + 5), seeded(3)
    expected = drop_product(x[:, :width].double(), a[:, :width].double(), number, RATE, 11)
    there = [x.to(DEVICE)[:, :width], a.to(DEVICE)[:, :width], number.to(torch.int32).to(DEVICE)]
    got = dropout_kernels.drop_product(*there, RATE, 11).cpu().double()
    assert (got - expected).norm() / expected.norm() < 1e-5
