"""The kill storm over remote stores in small: two machines that take turns, faults on the way."""

from __future__ import annotations

import kill_storm
import pytest
from far import Far
from tally import Tally
from zygote import Zygote

pytestmark = pytest.mark.slow
KILLS = 15


@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_and_faults_change_nothing(zygote: Zygote, far: Far, seed: int) -> None:
    names = ("lora", "full") if seed == 1 else ("qlora", "lora_fp16")
    tally = Tally(wanted=KILLS)
    kill_storm.storm(tally, seed=seed, jobs=1, names=names, zygote=zygote, far=far)
    assert tally.is_clean, tally
    assert tally.kills >= KILLS
    assert tally.compared >= 1
