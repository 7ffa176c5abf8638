"""Attention with a bias and dropout, block by block, against the same written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from triton_device import DEVICE, needs_kernels

from baton.train.biased import fuse

SEED = 12345


def kept_weights(shape, rate):
    """Which weights the kernels keep, from the same hash in numpy."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint32)
    with np.errstate(over="ignore"):
        x = x * np.uint32(0x9E3779B1) + np.uint32(SEED)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
    return torch.from_numpy(x >= np.uint32(int(rate * 2**32))).reshape(shape)


def written_out(q, k, v, bias, mask, *, scale, causal, rate):
    scores = q @ k.transpose(-1, -2) * scale + bias
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    weights = scores.softmax(-1)
    if rate:
        weights = weights * kept_weights(weights.shape, rate) / (1 - rate)
    return (weights @ v).transpose(1, 2)


@needs_kernels
@pytest.mark.parametrize(
    ("sizes", "causal", "masked", "rate"),
    [
        ((3, 2, 70, 70, 32), True, False, 0.1),
        ((2, 3, 40, 100, 16), False, True, 0.2),
        ((2, 3, 64, 64, 16), False, False, 0.0),
    ],
)
def test_forward_and_every_gradient(sizes, causal, masked, rate):
    from baton.train import biased_kernels

    batch, heads, n, m, width = sizes
    torch.manual_seed(0)
    # As linear layers leave them: heads side by side in a token's row.
    inputs = [torch.randn(batch, length, heads, width).transpose(1, 2) for length in (n, m, m)]
    bias = torch.randn(1, heads, n, m)
    mask = None
    if masked:
        mask = (torch.arange(m) < torch.tensor([[m], [33]])).to(torch.uint8)
    grad = torch.randn(batch, n, heads, width)
    wide = [x.double().requires_grad_() for x in (*inputs, bias)]
    expected = written_out(*wide, mask, scale=0.3, causal=causal, rate=rate)
    expected.backward(grad.double())

    q, k, v, moved_bias = (x.to(DEVICE) for x in (*inputs, bias))
    seed = torch.tensor([SEED], device=DEVICE)
    moved_mask = None if mask is None else mask.to(DEVICE)
    options = {"scale": 0.3, "causal": causal, "dropout": rate}
    given = (q, k, v, moved_bias, moved_mask, seed)
    out, normal = biased_kernels.forward(*given, **options)
    *found, grad_bias = biased_kernels.backward(
        grad.to(DEVICE), *given, out, normal, **options, needs_bias=True
    )
    pairs = [
        (out, expected),
        *((g.transpose(1, 2), w.grad) for g, w in zip(found, wide[:3], strict=True)),
    ]
    for got, wanted in (*pairs, (grad_bias, wide[3].grad)):
        difference = (got.cpu().double() - wanted).norm() / wanted.norm()
        # float32 on a CPU; on a GPU products are tf32.
        assert difference < (1e-5 if DEVICE.type == "cpu" else 3e-3)


def test_a_fused_model_evaluates_as_before():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
    network = T5ForConditionalGeneration(T5Config(vocab_size=100, **sizes)).eval()
    ids = torch.randint(3, 100, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]}
    with torch.no_grad():
        before = network(**given).logits
        fuse(network)
        after = network(**given).logits
    assert torch.equal(after, before)
    parts = (network, network.encoder, network.decoder)
    assert {part.config._attn_implementation for part in parts} == {"baton_biased"}


@needs_kernels
def test_a_fused_model_learns_as_before():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
    config = T5Config(vocab_size=100, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    network = T5ForConditionalGeneration(config).to(DEVICE).train()
    ids = torch.randint(3, 100, (2, 9), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0

    def outcome():
        network.zero_grad()
        loss = network(input_ids=ids, attention_mask=mask, labels=ids[:, :7].contiguous()).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in network.named_parameters()}

    loss, gradients = outcome()
    fuse(network)
    fused_loss, fused = outcome()
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
