"""Draws follow the chances that temperature, top-k and top-p leave."""

from __future__ import annotations

import pytest
import torch

from baton.eval.config import Sampling
from baton.generation.draw import choose, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def shares(sampling, count=40_000, seen=None):
    logits = LOGITS.expand(count, -1)
    places = torch.zeros(count, dtype=torch.int64)
    drawn = choose(logits, sampling, torch.arange(count), places, seen)
    return torch.bincount(drawn, minlength=len(LOGITS)) / count


def check(sampling, expected, seen=None):
    expected = torch.as_tensor(expected)
    expected = expected / expected.sum()
    found = shares(sampling, seen=seen)
    # Four standard deviations of 40,000 draws.
    assert torch.all((found - expected).abs() <= 4 * (expected * (1 - expected) / 40_000).sqrt())


def test_temperature_alone():
    check(Sampling(temperature=0.7, top_p=1.0, top_k=0), (LOGITS / 0.7).softmax(0))


def test_top_k_keeps_so_many():
    check(Sampling(temperature=1.0, top_p=1.0, top_k=2), LOGITS.softmax(0) * (LOGITS >= 1))


def test_top_p_keeps_the_fewest_that_reach_it():
    chances = LOGITS.softmax(0)
    assert chances[:2].sum() < 0.8 < chances[:3].sum()
    check(Sampling(temperature=1.0, top_p=0.8, top_k=0), chances * (LOGITS >= 0.5))


def test_top_p_of_nothing_keeps_the_likeliest():
    assert shares(Sampling(temperature=1.0, top_p=0.0, top_k=0))[0] == 1


def test_repetition_makes_a_token_less_likely():
    seen = torch.zeros(40_000, len(LOGITS), dtype=torch.bool)
    seen[:, [0, 4]] = True
    changed = LOGITS.clone()
    changed[0], changed[4] = 2.0 / 1.5, -1.0 * 1.5
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.5)
    check(sampling, changed.softmax(0), seen)


def test_greedy_is_the_likeliest():
    zeros = torch.zeros(1, dtype=torch.int64)
    assert choose(LOGITS[None], None, zeros, zeros).tolist() == [0]


@pytest.mark.parametrize("by", ["seed", "place"])
def test_uniform_numbers_are_spread_evenly(by):
    count = torch.arange(100_000)
    fixed = torch.full_like(count, 3)
    numbers = uniform(count, fixed) if by == "seed" else uniform(fixed, count)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    bins = torch.histc(numbers, bins=100, min=0, max=1)
    chi_square = float(((bins - 1000) ** 2 / 1000).sum())
    assert chi_square < 150  # 99 degrees of freedom: one in a thousand is above 149
    assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 0.02
