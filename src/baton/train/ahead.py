"""The next micro-batches, made while the device works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Micro-batches waiting on the device; each is small beside the activations of one.
_WAITING = 3


class Ahead:
    """Makes the micro-batches of the steps to come in a thread of its own.

    Steps are asked for in turn. What was made for another step or budget (after running out of
    memory) is dropped.
    """

    def __init__(self, make: Callable[[int, int], Iterator[Any]]) -> None:
        """`make` gives the micro-batches of a step under a budget of tokens."""
        self._make = make
        self._worker: _Worker | None = None

    def take(self, step: int, budget: int) -> Iterator[Any]:
        """The micro-batches of `step`, in order. Raises what making them raised."""
        if self._worker is None or (self._worker.step, self._worker.budget) != (step, budget):
            self.close()
            self._worker = _Worker(self._make, step, budget)
        return self._worker.batches()

    def close(self) -> None:
        """Stop the thread."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    def __init__(self, make: Callable[[int, int], Iterator[Any]], step: int, budget: int) -> None:
        self.step = step
        self.budget = budget
        self._make = make
        self._ready: queue.Queue[tuple[int, Any]] = queue.Queue(_WAITING)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(step,), daemon=True)
        self._thread.start()

    def batches(self) -> Iterator[Any]:
        """What belongs to the step whose turn it is; afterwards it is the next one's."""
        while True:
            kind, value = self._ready.get()
            if kind == _FAILED:
                raise value
            if kind == _STEP_DONE:
                self.step += 1
                return
            yield value

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _work(self, step: int) -> None:
        try:
            while not self._stopped.is_set():
                for batch in self._make(step, self.budget):
                    self._put(_BATCH, batch)
                    if self._stopped.is_set():
                        return
                self._put(_STEP_DONE, None)
                step += 1
        except Exception as error:  # noqa: BLE001  (raised where the batches are taken)
            self._put(_FAILED, error)

    def _put(self, kind: int, value: Any) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return


_BATCH, _STEP_DONE, _FAILED = range(3)
