"""The processes of one leg on one machine, one for each device."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from baton.errors import ExitStatus
from baton.handover import StopSignal

_POLL_SECONDS = 0.05


@dataclass
class LegProcesses:
    """`baton run` as often as the leg has ranks."""

    processes: list[subprocess.Popen[bytes]]

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        count: int,
        *,
        environment: Mapping[str, str],
        rendezvous: Path,
        output: IO[Any] | None = None,
    ) -> LegProcesses:
        """Start them; they meet at the file `rendezvous`, which must not be an earlier leg's."""
        rendezvous.unlink(missing_ok=True)
        processes = []
        for rank in range(count):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            if count > 1:
                ranks["BATON_RENDEZVOUS"] = f"file://{rendezvous}"
            processes.append(
                subprocess.Popen(
                    command,
                    env=dict(environment) | ranks,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    # Ctrl-C is for whoever started them, who passes it on as TERM.
                    start_new_session=True,
                )
            )
        return cls(processes)

    def send(self, number: signal.Signals) -> None:
        """A signal to all that still live."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def exit_status(self) -> int | None:
        """None while any process lives; then the first process's, or the first failure's."""
        statuses = [process.poll() for process in self.processes]
        if None in statuses:
            if any(status not in (None, 0, ExitStatus.HANDED_OVER) for status in statuses):
                # The others would wait for ever for a peer that is gone.
                self.send(signal.SIGKILL)
            return None
        return next((int(s) for s in statuses if s), 0)


def run_together(command: Sequence[str], count: int, stop: StopSignal) -> int:
    """Run a leg of `count` processes to its end and pass signals on to them.

    Returns:
        The exit status as a shell gives it: 128 and the signal's number for a killed process.
    """
    with tempfile.TemporaryDirectory(prefix="baton-") as place:
        leg = LegProcesses.start(
            command, count, environment=os.environ, rendezvous=Path(place, "rendezvous")
        )
        passed_on = 0
        while (status := leg.exit_status()) is None:
            wanted = 2 if stop.is_urgent else int(stop.is_set)
            if wanted > passed_on:
                passed_on = wanted
                leg.send(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
    return status if status >= 0 else 128 - status
