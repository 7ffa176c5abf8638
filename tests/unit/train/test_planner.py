"""The memory planner on devices whose memory and speed are known formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.train.planner import MemoryPlan, Planner, Trial

LAYERS = 36


class Device:
    """Bytes are linear in tokens and kept layers; a pass costs tokens, a constant, recomputing."""

    def __init__(self, *, limit, base=6_000, a_token=3.0, a_pass=600, recomputing=0.5):
        self.limit, self.base, self.a_token = limit, base, a_token
        self.a_pass, self.recomputing = a_pass, recomputing
        self.tried = []

    def bytes(self, plan):
        kept = 1 - 0.85 * plan.recompute_layers / LAYERS
        return self.base + self.a_token * plan.tokens * kept

    def seconds(self, plan):
        share = plan.recompute_layers / LAYERS
        return (plan.tokens + self.a_pass) * (1 + self.recomputing * share)

    def __call__(self, plan):
        self.tried.append(plan)
        if self.bytes(plan) > self.limit:
            return None
        return Trial(tokens=plan.tokens, peak=int(self.bytes(plan)), seconds=self.seconds(plan))


def choose(device, **options):
    settings = {"step_tokens": 26_000, "longest": 1024, "later": 500, "layers": LAYERS}
    return Planner(measure=device, limit=device.limit, **settings | options).choose()


@pytest.mark.parametrize("limit", [139_000, 80_000, 40_000, 24_000, 16_000, 11_000])
@pytest.mark.parametrize("timed", [True, False])
def test_the_choice_fits_and_is_within_a_tenth_of_the_best(limit, timed):
    device = Device(limit=limit)
    plan = choose(device, timed=timed)
    assert device.bytes(plan) + 500 <= limit
    parts = {-(-26_000 // n // 256) * 256 for n in range(1, 30)}
    grid = [
        MemoryPlan(tokens=tokens, recompute_layers=count)
        for tokens in parts
        for count in range(LAYERS + 1)
    ]
    fitting = [p for p in grid if device.bytes(p) + 500 <= limit]
    best = min(device.seconds(p) / p.tokens for p in fitting)
    assert device.seconds(plan) / plan.tokens <= 1.1 * best


def test_ample_memory_recomputes_nothing():
    assert choose(Device(limit=200_000)).recompute_layers == 0


def test_timing_finds_that_recomputing_is_cheap_here():
    # Passes are dear and recomputing is free: one large pass, whatever it recomputes.
    device = Device(limit=50_000, a_pass=20_000, recomputing=0.01)
    assert choose(device).tokens >= 26_000


def test_what_the_configuration_gives_is_kept():
    device = Device(limit=30_000)
    assert choose(device, tokens=5000).tokens == 5000
    assert choose(device, recompute_layers=0).recompute_layers == 0
    plan = choose(device, tokens=5000, recompute_layers=LAYERS)
    assert plan == MemoryPlan(tokens=5000, recompute_layers=LAYERS)


@pytest.mark.parametrize(
    ("limit", "layers"), [(29_000, 0), (25_000, 9), (20_000, 18), (16_000, 27), (14_000, LAYERS)]
)
def test_a_given_size_is_tried_itself_and_recomputes_no_more_than_it_must(limit, layers):
    class BySamples(Device):
        """A micro-batch is whole samples of 900 tokens, each counted as one at its fullest."""

        def bytes(self, plan):
            samples = max(1, plan.tokens // 2300)
            return super().bytes(replace(plan, tokens=900 * samples))

    device = BySamples(limit=limit, a_token=12.0)
    plan = choose(device, tokens=4600, longest=900, step_tokens=7200)
    assert plan == MemoryPlan(tokens=4600, recompute_layers=layers)


def test_the_longest_sample_must_fit_too():
    device = Device(limit=20_000)
    plan = choose(device, longest=16_000)
    assert device.bytes(MemoryPlan(tokens=16_000, recompute_layers=plan.recompute_layers)) <= 20_000


def test_where_even_a_small_trial_fails_the_smallest_is_chosen():
    plan = choose(Device(limit=5_000))
    assert plan == MemoryPlan(tokens=1024, recompute_layers=LAYERS)


def test_where_only_recomputing_fits_nothing_else_is_assumed():
    device = Device(limit=7_500)
    plan = choose(device)
    assert plan.recompute_layers == LAYERS
    assert device.bytes(plan) + 500 <= 7_500
