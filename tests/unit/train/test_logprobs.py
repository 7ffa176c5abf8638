"""Log-probabilities of labels, by chunks and with gradients, beside plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from baton.train import logprobs
from baton.train.batch import collate
from baton.train.logprobs import TokenLogprobs, linear_logprobs

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_value_and_gradients_are_those_of_a_plain_softmax(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_TOKENS", chunk)
    rng = torch.Generator().manual_seed(0)
    hidden, weight, scale = (torch.randn(size, generator=rng) for size in ((10, 8), (30, 8), (10,)))
    labels = torch.randint(0, 30, (10,), generator=rng)
    results = []
    for plain in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            out = (h @ w.T / temperature).log_softmax(1).gather(1, labels[:, None])[:, 0]
        else:
            out = linear_logprobs(
                h, w, labels, compute_dtype=torch.float32, temperature=temperature
            )
        (out.exp() * scale).sum().backward()  # not linear, as no loss of a ratio is
        results.append((out.detach(), h.grad, w.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_packed_model_gives_what_it_gives_each_sample_alone(
    name: str, method: str, tiny: Any, drawn: Any, tmp_path: Any
) -> None:
    model = tiny(name, method)
    learner = model.learner()
    samples = drawn(4, seed=2)
    packed = TokenLogprobs(learner.network, compute_dtype=torch.float32, temperature=0.8)(
        collate(samples, range(4), device=CPU)
    )
    plain = model.plain(learner, tmp_path)
    plain.eval()
    rows = []
    for tokens, prompt in samples.rows:
        with torch.no_grad():
            logits = plain(torch.tensor([tokens])).logits[0] / 0.8
        picked = logits.log_softmax(1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        rows.append(picked[max(prompt, 1) - 1 :].numpy())
    np.testing.assert_allclose(packed.detach().numpy(), np.concatenate(rows), atol=2e-5)
