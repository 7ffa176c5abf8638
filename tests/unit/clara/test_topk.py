"""Choosing documents: the hard choice, its ties, and the gradient of the soft one."""

from __future__ import annotations

import pytest
import torch

from baton.errors import DataError
from baton.pipelines.clara.topk import cosine_scores, rank, select, soft_choices

T = 0.02


def drawn(count=7, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(width, generator=generator, dtype=torch.float64)
    documents = torch.randn(count, width, generator=generator)
    return query, documents


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize(("count", "k"), [(7, 3), (5, 5), (1, 1), (20, 5)])
def test_forward_is_a_gather_of_the_best_in_rank_order(count, k, upstream):
    query, documents = drawn(count)
    scores = cosine_scores(query, documents)
    best, chosen = select(scores, documents, k, temperature=T, upstream_mask=upstream)
    by_hand = sorted(range(count), key=lambda i: -float(scores[i]))[:k]
    assert chosen.tolist() == by_hand
    assert torch.equal(best, documents[by_hand])


def test_ties_go_to_the_lower_position():
    scores = torch.tensor([0.3, 0.9, 0.9, 0.1, 0.9, 0.3])
    assert rank(scores, 5).tolist() == [1, 2, 4, 0, 5]


def test_too_few_documents_are_said():
    with pytest.raises(DataError) as caught:
        rank(torch.tensor([0.1, 0.2]), 3)
    assert str(caught.value) == "2 documents are fewer than top_k (3)"


def test_scores_are_cosines_in_float32_whatever_comes_in():
    query, documents = drawn()
    expected = torch.nn.functional.cosine_similarity(query[None].float(), documents)
    assert torch.allclose(cosine_scores(query, documents), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        scores = cosine_scores(query.bfloat16(), documents.bfloat16())
    assert scores.dtype == torch.float32
    rounded = torch.nn.functional.cosine_similarity(
        query.bfloat16().float()[None], documents.bfloat16().float()
    )
    assert torch.allclose(scores, rounded, atol=1e-6)


@pytest.mark.parametrize("upstream", [False, True])
def test_the_gradient_is_that_of_the_soft_choice_taken_numerically(upstream):
    """d/ds of sum(w * soft @ D) by central differences, the taken documents held fixed."""
    count, width, k = 6, 5, 3
    generator = torch.Generator().manual_seed(3)
    documents = torch.randn(count, width, generator=generator)
    weights = torch.randn(k, width, generator=generator)
    scores = torch.tensor([0.10, 0.13, 0.08, 0.12, 0.05, 0.11], requires_grad=True)
    best, chosen = select(scores, documents, k, temperature=T, upstream_mask=upstream)
    (best * weights).sum().backward()

    def relaxed(values: torch.Tensor) -> float:
        total = 0.0
        taken: list[int] = []
        for slot in range(k):
            logits = values / T
            for i in taken:
                logits[i] += torch.log(torch.tensor(1e-8)).double() if upstream else -torch.inf
            p = torch.softmax(logits, 0)
            total += float((p[:, None] * documents.double()).sum(0) @ weights[slot].double())
            taken.append(int(chosen[slot]))
        return total

    for i in range(count):
        up, down = scores.detach().double(), scores.detach().double()
        up[i] += 1e-5
        down[i] -= 1e-5
        numeric = (relaxed(up) - relaxed(down)) / 2e-5
        assert float(scores.grad[i]) == pytest.approx(numeric, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize(
    ("gap", "is_back"), [(0.30, False), (0.36, False), (0.38, True), (0.9, True)]
)
def test_upstreams_mask_lets_a_taken_document_back_in_beyond_a_gap(gap, is_back):
    scores = torch.tensor([gap, 0.0])
    ours = soft_choices(scores, torch.tensor([0, 1]), temperature=T)
    theirs = soft_choices(scores, torch.tensor([0, 1]), temperature=T, upstream_mask=True)
    assert ours[1].tolist() == [0.0, 1.0]
    assert (theirs[1, 0] > 0.5) == is_back


def test_the_mask_keeps_gradients_finite_at_any_gap():
    scores = torch.tensor([1.0, -1.0, 0.5, -0.9], requires_grad=True)
    documents = torch.eye(4)
    best, _ = select(scores, documents, 4, temperature=T)
    (best * torch.arange(16.0).view(4, 4)).sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_documents_that_learn_get_the_gradient_of_the_gather():
    _, documents = drawn(4)
    documents.requires_grad_(True)
    best, chosen = select(torch.tensor([0.1, 0.4, 0.2, 0.3]), documents, 2, temperature=T)
    best.sum().backward()
    assert chosen.tolist() == [1, 3]
    assert documents.grad.sum(1).tolist() == [0.0, 12.0, 0.0, 12.0]
