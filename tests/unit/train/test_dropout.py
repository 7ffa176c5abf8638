"""Dropout by a hash: its share, its seeds, and the same mask from torch and from Triton."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, needs_kernels

from baton.train.dropout import HashDropout, drop, kept

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
