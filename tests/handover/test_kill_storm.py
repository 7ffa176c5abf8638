"""The kill storm in small: it finds nothing, and it would if there were something."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import kill_storm
import pytest
from lab import Lab, assert_identical, differences
from tally import Tally
from zygote import Leg, Zygote

pytestmark = pytest.mark.slow


def test_a_few_random_kills_change_nothing(zygote: Zygote) -> None:
    tally = kill_storm.storm(Tally(wanted=4), seed=7, jobs=1, names=("qlora",), zygote=zygote)
    assert tally.is_clean, tally
    assert tally.kills >= 4
    assert tally.compared >= 1
    assert re.fullmatch(
        r"kill-storm: kills=\d+ unresumable=0 identical=yes max_lost_steps=\d+"
        r" p50_signal_to_durable_s=(\d+\.\d{3}|none) p99_signal_to_durable_s=(\d+\.\d{3}|none)",
        tally.verdict(),
    )


def test_the_comparison_sees_one_flipped_bit(lab: Lab) -> None:
    task = lab.task()
    lab.run(task)
    assert_identical(task, lab.reference(task))
    for name in ("train/metrics.jsonl", "eval/predictions.jsonl"):
        path = task.folder / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        assert name in differences(task, lab.reference(task))


def test_the_end_of_a_leg_is_heard_when_it_comes_with_the_answer_to_a_signal(
    tmp_path: Path,
) -> None:
    here, there = socket.socketpair()
    there.sendall(b'{"pid": 1}\n')
    leg = Leg(here, tmp_path / "log.txt")
    there.sendall(b'{"sent": true}\n{"status": -9}\n')
    assert leg.kill(signal.SIGKILL)
    assert leg.wait(timeout=1) == -9
