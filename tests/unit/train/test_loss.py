"""The chunked loss against torch's own, and which heads take it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from triton_device import DEVICE, needs_kernels

from baton.train import attention
from baton.train.batch import collate
from baton.train.loss import CausalLoss, cross_entropy, linear_cross_entropy

CPU = torch.device("cpu")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def problem(tokens, *, width=16, vocabulary=33, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden, weight, labels


def reference(hidden, weight, labels, factor=1.0):
    """Value and gradients in float64, by torch."""
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="sum")
    (loss * factor).backward()
    return loss.item(), h.grad, w.grad


def error(ours, theirs):
    return ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 1023, 1024, 1025, 2049])
def test_value_and_gradients_are_those_of_torch(tokens, dtype):
    hidden, weight, labels = problem(tokens, dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, labels, compute_dtype=dtype)
    (loss / tokens).backward()
    value, grad_hidden, grad_weight = reference(hidden, weight, labels, 1 / tokens)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert loss.item() == pytest.approx(value, rel=DTYPES[dtype])
    assert error(hidden.grad, grad_hidden) < DTYPES[dtype]
    assert error(weight.grad, grad_weight) < DTYPES[dtype]
    assert hidden.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_masters_keep_float32_gradients_under_autocast(dtype):
    hidden, weight, labels = problem(50)
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, labels, compute_dtype=dtype)
    loss.backward()
    value, grad_hidden, grad_weight = reference(hidden, weight, labels)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=1e-2)
    assert error(hidden.grad, grad_hidden) < 2e-2
    assert error(weight.grad, grad_weight) < 2e-2


def test_the_gradient_is_that_of_finite_differences():
    hidden, weight, labels = problem(5, width=3, vocabulary=4)

    def loss(h, w):
        return linear_cross_entropy(h, w, labels, compute_dtype=torch.float32)

    loss(hidden, weight).backward()
    step = 1e-2
    for tensor, gradient in ((hidden, hidden.grad), (weight, weight.grad)):
        for place in range(tensor.numel()):
            with torch.no_grad():
                at = tensor.view(-1)
                was = at[place].item()
                at[place] = was + step
                above = loss(hidden, weight).item()
                at[place] = was - step
                below = loss(hidden, weight).item()
                at[place] = was
            assert gradient.view(-1)[place].item() == pytest.approx(
                (above - below) / (2 * step), abs=2e-3
            )


def test_a_frozen_head_gets_no_gradient_and_frozen_hidden_states_neither():
    hidden, weight, labels = problem(4)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, compute_dtype=torch.float32).backward()
    assert weight.grad is None
    assert error(hidden.grad, reference(hidden, weight, labels)[1]) < 1e-5
    hidden, weight, labels = problem(4)
    hidden.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, compute_dtype=torch.float32).backward()
    assert hidden.grad is None
    assert error(weight.grad, reference(hidden, weight, labels)[2]) < 1e-5


def test_huge_logits_neither_overflow_nor_turn_into_nan():
    hidden, weight, labels = problem(6)
    with torch.no_grad():
        hidden.mul_(1e4)
    loss = linear_cross_entropy(hidden, weight, labels, compute_dtype=torch.float32)
    loss.backward()
    assert loss.item() == pytest.approx(reference(hidden, weight, labels)[0], rel=1e-5)
    assert torch.isfinite(hidden.grad).all()


def test_small_gradients_survive_fp16():
    # Probabilities near 1e-7 round to nothing in fp16 unless they are scaled first.
    hidden = torch.zeros(1, 2, dtype=torch.float16)
    hidden[0, 0] = 16.0
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float16)
    hidden.requires_grad_()
    labels = torch.tensor([0])
    linear_cross_entropy(hidden, weight, labels, compute_dtype=torch.float16).backward()
    expected = reference(hidden, weight, labels)[1]
    assert expected[0, 1] == pytest.approx(1.1e-7, rel=0.1)
    assert hidden.grad[0, 1].item() == pytest.approx(expected[0, 1].item(), rel=0.5)


def test_no_labels_is_no_loss_and_no_gradient():
    hidden, weight, labels = problem(0)
    loss = linear_cross_entropy(hidden, weight, labels, compute_dtype=torch.float32)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().sum() == 0


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("kind", "values", "plain"),
    [
        ("llama", {}, True),
        ("phi", {}, False),  # a bias on its head
        ("granite", {"logits_scaling": 2.0}, False),
        ("granite", {"logits_scaling": 1.0}, True),
        ("cohere", {"logit_scale": 0.25}, False),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 3.0}, False),
    ],
)
def test_a_head_that_is_more_than_a_matrix_is_asked_itself(kind, values, plain, drawn):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | values))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    loss = CausalLoss(model, compute_dtype=torch.float32)
    assert (loss.head is not None) == plain
    source = drawn(3)
    got = loss(collate(source, range(3), device=CPU))
    got.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_attn_implementation("eager")
    total = torch.zeros(())
    for tokens, prompt in source.rows:
        ids = torch.tensor(tokens)[None]
        labels = ids.clone()
        labels[:, :prompt] = -100
        total = total + model(input_ids=ids, labels=labels).loss * (len(tokens) - max(prompt, 1))
    total.backward()
    assert got.item() == pytest.approx(total.item(), rel=1e-5)
    for our, parameter in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(
            our, parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max()
        )


def test_an_adapter_on_the_head_is_trained(tiny, drawn, tmp_path):
    model = tiny("llama", "lora", targets=["q_proj", "lm_head"])
    learner = model.learner()
    loss = CausalLoss(learner.network, compute_dtype=torch.float32)
    loss(collate(drawn(2), range(2), device=CPU)).backward()
    heads = [p for n, p in learner.model.named_parameters() if "lm_head" in n and p.requires_grad]
    assert len(heads) == 2
    assert all(p.grad.abs().sum() > 0 for p in heads)


@needs_kernels
@pytest.mark.parametrize(("rows", "vocabulary", "columns"), [(5, 9000, 9000), (3, 4096, 4224)])
def test_the_kernel_computes_what_torch_computes(rows, vocabulary, columns):
    from baton.train import loss_kernels

    torch.manual_seed(0)
    logits = torch.randn(rows, columns) * 5
    labels = torch.randint(vocabulary, (rows,))
    expected, gradient = cross_entropy(logits.double(), labels, vocabulary, 4.0)
    there = logits.to(DEVICE)
    loss, got = loss_kernels.cross_entropy(there, labels.to(DEVICE), vocabulary, 4.0)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.cpu().double(), gradient, rtol=1e-5, atol=1e-8)
    assert (got[:, vocabulary:] == 0).all()
