"""The stop signal: one assignment in the handler, everything else asked for by the loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from baton.handover import SIGNALS, StopSignal


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stop(clock: Clock) -> Iterator[StopSignal]:
    """Installed in this process; the handlers that were there come back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopSignal(grace_seconds=30.0, clock=clock).install()
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_nothing_has_come(stop: StopSignal) -> None:
    assert not stop.is_set
    assert not stop.is_urgent
    assert (stop.name, stop.deadline, stop.seconds_since()) == ("", None, 0.0)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_stop_signal_sets_the_flag(stop: StopSignal, clock: Clock, number: int) -> None:
    send(signal.Signals(number))
    assert stop.is_set
    assert not stop.is_urgent
    assert stop.name == signal.Signals(number).name
    assert stop.deadline == 130.0
    clock.now += 4
    assert stop.seconds_since() == 4.0
    assert stop.deadline == 130.0


def test_term_usr1_usr2_and_ctrl_c_are_all_heard() -> None:
    assert set(SIGNALS) == {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}


def test_signals_that_come_together_are_not_urgent(stop: StopSignal, clock: Clock) -> None:
    send(signal.SIGUSR2)
    clock.now += 0.01
    send(signal.SIGTERM)
    clock.now += 0.9
    send(signal.SIGTERM)
    assert not stop.is_urgent
    assert stop.name == "SIGUSR2"


def test_a_repeat_after_a_second_means_now(stop: StopSignal, clock: Clock) -> None:
    send(signal.SIGTERM)
    clock.now += 1.5
    send(signal.SIGINT)
    assert stop.is_urgent
    assert stop.name == "SIGTERM"
    assert stop.deadline == 130.0


def test_a_signal_does_not_raise_into_what_it_interrupts(stop: StopSignal) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x")
    send(signal.SIGINT)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)
    assert stop.is_set


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_torch_is_not_even_imported_is_not_lost(number: signal.Signals) -> None:
    program = (
        "import sys\n"
        "from baton.handover import StopSignal\n"
        "stop = StopSignal().install()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "print(stop.name, 'torch' in sys.modules)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, f"{number.name} False\n")
