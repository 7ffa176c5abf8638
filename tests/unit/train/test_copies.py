"""Copies of weights that a pass computes with: same outputs, same gradients, in the masters."""

from __future__ import annotations

import copy

import pytest
import torch

from baton.train.copies import Copies


class Stack(torch.nn.Module):
    """Two layers that read one input, and one that reads their product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Linear(16, 24, bias=False) for _ in range(2))
        self.out = torch.nn.Linear(24, 8)
        self.unused = torch.nn.Linear(8, 8)

    def forward(self, x):
        if hasattr(self, "both") and torch.is_grad_enabled():
            one, other = torch.nn.functional.linear(x, self.both).chunk(2, -1)
        else:
            one, other = self.a(x), self.b(x)
        return self.out(one * other)


def copied(stack):
    copies = Copies(stack)
    copies.add(stack, "both", [stack.a, stack.b])
    copies.add_others(stack)
    return stack


def outcome(stack, x, half):
    x = x.clone().requires_grad_()
    stack.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = stack(x)
    out.float().square().sum().backward()
    return out.detach(), x.grad, {n: p.grad for n, p in stack.named_parameters()}


@pytest.mark.parametrize("half", [False, True])
def test_copies_compute_and_learn_what_the_weights_would(half):
    plain, x = Stack(), torch.randn(5, 16)
    stack = copied(copy.deepcopy(plain))
    assert list(stack.state_dict()) == list(plain.state_dict())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {}
    for _ in range(2):
        want, want_x, gradients = outcome(plain, x, half)
        got, got_x, found = outcome(stack, x, half)
        torch.testing.assert_close(got, want, **tolerance)
        torch.testing.assert_close(got_x, want_x, **tolerance)
        for name, gradient in gradients.items():
            if gradient is None:
                assert found[name] is None
                continue
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], gradient, msg=name, **tolerance)
        with torch.no_grad():
            for parameter, other in zip(plain.parameters(), stack.parameters(), strict=True):
                parameter.mul_(1.1)
                other.mul_(1.1)


def test_gradients_of_several_passes_add_up():
    plain, x = Stack(), torch.randn(5, 16)
    stack = copied(copy.deepcopy(plain))
    for network in (plain, stack):
        for part in (x[:2], x[2:]):
            network(part).square().sum().backward()
    torch.testing.assert_close(stack.b.weight.grad, plain.b.weight.grad)
    torch.testing.assert_close(stack.out.bias.grad, plain.out.bias.grad)


def test_without_gradients_the_weights_themselves_are_read():
    plain, x = Stack(), torch.randn(5, 16)
    stack = copied(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(stack(x), plain(x))
