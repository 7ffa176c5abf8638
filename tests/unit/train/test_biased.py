"""Attention with a bias and dropout, block by block, against the same written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from triton_device import DEVICE, needs_kernels

from baton.train.biased import attend, fuse
from baton.train.dropout import new_seed
from baton.train.seq2seq import compile_blocks

SIZES = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
BLOCK = 64


def drawn_seed():
    """The seed that the next `attend` after `torch.manual_seed(0)` draws."""
    torch.manual_seed(0)
    seed = int(new_seed(1, DEVICE))
    torch.manual_seed(0)
    return seed


def kept_weights(shape, rate, seed):
    """Which weights the kernels keep, from the same hash in numpy."""
    *rows, columns = shape
    golden = np.uint32(0x9E3779B1)
    x = np.arange(int(np.prod(rows)), dtype=np.uint32)
    with np.errstate(over="ignore"):
        x = x * golden + np.uint32(seed)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
        x = x[:, None] + np.arange(columns, dtype=np.uint32) * golden
        x ^= x >> np.uint32(15)
        x *= x
    return torch.from_numpy(x >= np.uint32(int(rate * 2**32))).reshape(shape)


def whole_blocks(length):
    return -(-length // BLOCK) * BLOCK


def dense(bias, n, m):
    """`(heads, n, m)` of a bias by distance."""
    distance = torch.arange(m)[None] - torch.arange(n)[:, None]
    return bias[:, distance + whole_blocks(n) - 1]


def written_out(q, k, v, bias, mask, *, scale, causal, rate, seed):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + dense(bias, *scores.shape[-2:])
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    if rate:
        weights = weights * kept_weights(weights.shape, rate, seed) / (1 - rate)
    return (weights @ v).transpose(1, 2)


@needs_kernels
@pytest.mark.parametrize(
    ("sizes", "causal", "masked", "biased", "rate", "packing"),
    [
        # Sizes are of batch, heads, n, m, width.
        ((3, 2, 70, 70, 32), True, False, True, 0.1, (3,)),
        ((2, 3, 40, 100, 16), False, True, False, 0.2, (1, 2)),
        ((19, 1, 64, 128, 16), False, False, True, 0.0, (1, 1, 1)),
        # More keys than a program of the backward pass sums up.
        ((2, 1, 40, 290, 16), False, True, True, 0.1, (1, 2)),
        ((2, 1, 290, 290, 16), True, False, True, 0.1, (3,)),
        ((70, 1, 100, 30, 16), False, False, False, 0.0, (1, 2)),
        ((2, 2, 30, 100, 64), True, False, True, 0.5, (1, 1, 1)),
        ((1, 2, 128, 128, 128), True, False, True, 0.1, (3,)),
    ],
)
def test_attention_and_every_gradient(sizes, causal, masked, biased, rate, packing):
    batch, heads, n, m, width = sizes
    torch.manual_seed(0)
    inputs = [torch.randn(batch, length, heads, width) for length in (n, m, m)]
    bias = torch.randn(heads, whole_blocks(n) + whole_blocks(m)) if biased else None
    mask = None
    if masked:
        mask = torch.arange(m) < torch.tensor([[m], [33]])
    grad = torch.randn(batch, n, heads, width)
    wide = [x.double().requires_grad_() for x in inputs]
    wide_bias = bias.double().requires_grad_() if biased else None
    options = {"scale": 0.3, "causal": causal}
    expected = written_out(*wide, wide_bias, mask, **options, rate=rate, seed=drawn_seed())
    expected.backward(grad.double())

    packed = [torch.stack(part, 2) for part in split(inputs, packing)]
    packed = [x.to(DEVICE).requires_grad_() for x in packed]
    moved_bias = bias.to(DEVICE).requires_grad_() if biased else None
    moved_mask = mask.to(DEVICE) if masked else None
    drawn_seed()
    found = attend(packed, moved_bias, moved_mask, **options, dropout=rate)
    found.backward(grad.to(DEVICE))
    grads = [part for x in packed for part in x.grad.unbind(2)]
    pairs = [(found, expected), *zip(grads, [x.grad for x in wide], strict=True)]
    if biased:
        pairs.append((moved_bias.grad, wide_bias.grad))
    for got, wanted in pairs:
        difference = (got.cpu().double() - wanted).norm() / wanted.norm()
        # float32 on a CPU; on a GPU products are tf32.
        assert difference < (1e-5 if DEVICE.type == "cpu" else 3e-3)


def split(tensors, sizes):
    rest = iter(tensors)
    return [[next(rest) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_weights_are_dropped_at_the_rate_and_each_by_itself(rate):
    kept = kept_weights((4, 3, 200, 200), rate, 12345).float()
    tolerance = 4 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < tolerance
    for row_or_column in (kept.mean(-1), kept.mean(-2)):
        spread = float(row_or_column.std())
        assert spread == pytest.approx((rate * (1 - rate) / 200) ** 0.5, rel=0.1)
    other = kept_weights(kept.shape, rate, 12346).float()
    for moved in (kept.roll(1, -1), kept.roll(1, -2), kept.roll(1, 1), kept.roll(1, 0), other):
        both = torch.stack([kept.flatten(), moved.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


@needs_kernels
def test_a_row_that_sees_nothing_is_zeros_and_learns_nothing():
    packed = torch.randn(2, 5, 3, 1, 16, device=DEVICE, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    out = attend([packed], None, mask, scale=1.0, causal=False, dropout=0.0)
    out.sum().backward()
    assert not out[1].any()
    assert not packed.grad[1].any()
    assert packed.grad[0].isfinite().all()


def model(**more):
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, decoder_start_token_id=0, **SIZES, **more)
    return T5ForConditionalGeneration(config)


def test_a_fused_model_evaluates_as_before():
    network = model().eval()
    ids = torch.randint(3, 100, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        before = network(**given, decoder_input_ids=ids[:, :7]).logits
        said = network.generate(**given, max_new_tokens=5)
        fuse(network)
        assert torch.equal(network(**given, decoder_input_ids=ids[:, :7]).logits, before)
        assert torch.equal(network.generate(**given, max_new_tokens=5), said)


def outcome(network, ids, mask):
    network.zero_grad()
    loss = network(input_ids=ids, attention_mask=mask, labels=ids[:, :7].contiguous()).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in network.named_parameters()}


@needs_kernels
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_a_fused_model_learns_as_before(masked, feed_forward):
    network = model(dropout_rate=0.0, feed_forward_proj=feed_forward).to(DEVICE).train()
    ids = torch.randint(3, 100, (2, 9), device=DEVICE)
    mask = torch.ones_like(ids)
    if masked:
        mask[1, 5:] = 0
    loss, gradients = outcome(network, ids, mask)
    names = list(network.state_dict())
    fuse(network)
    assert list(network.state_dict()) == names
    fused_loss, fused = outcome(network, ids, mask)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


@needs_kernels
def test_compiled_blocks_of_a_fused_model_learn_as_before():
    network = model(dropout_rate=0.0).to(DEVICE).train()
    ids = torch.randint(3, 100, (2, 9), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    loss, gradients = outcome(network, ids, mask)
    fuse(network)
    compile_blocks(network, backend="aot_eager", dynamic=False)
    compiled_loss, compiled = outcome(network, ids, mask)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)


@needs_kernels
def test_a_fused_model_learns_the_same_from_the_same_seed():
    network = model().to(DEVICE).train()
    fuse(network)
    ids = torch.randint(3, 100, (2, 70), device=DEVICE)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(outcome(network, ids, torch.ones_like(ids)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(g, found[1][1][name]) for name, g in found[0][1].items())
    assert not torch.equal(found[0][0], found[2][0])
