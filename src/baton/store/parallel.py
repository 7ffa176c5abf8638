"""The same work on many things at once, on threads that never keep a process from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 8


def in_parallel(
    work: Callable[[T], R], items: Iterable[T], *, workers: int = WORKERS
) -> Iterator[R]:
    """Results of `work` on each item, in the order of the items, as they come.

    At most `workers` items are at work and as many results wait, so memory is bounded. The
    first error is raised in its place and what has not begun is left undone. Unlike those of
    `concurrent.futures`, the threads are daemons: a process whose grace is over must be able
    to end while a request hangs.
    """
    # On a busy machine each thread may wait long for its turn: none that finds nothing to do, and
    # none that is waited for when all results are there.
    count = len(items) if isinstance(items, Sized) else None
    workers = workers if count is None else min(workers, count)
    source, lock = enumerate(items), threading.Lock()
    is_over, is_failed = threading.Event(), threading.Event()
    room = threading.Semaphore(2 * workers)
    done: queue.SimpleQueue[tuple[int, R | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        while True:
            room.acquire()
            if is_over.is_set():
                return
            with lock:
                number, item = (-1, None) if is_failed.is_set() else next(source, (-1, None))
            if number < 0:
                done.put((-1, None, None))
                return
            try:
                done.put((number, work(item), None))  # type: ignore[arg-type]
            # Whatever it is, it is raised where the results are used.
            except BaseException as error:  # noqa: BLE001
                done.put((number, None, error))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    waiting: dict[int, tuple[R | None, BaseException | None]] = {}
    at_work, following = len(threads), 0
    try:
        while following != count and (at_work or following in waiting):
            if following in waiting:
                result, error = waiting.pop(following)
                if error is not None:
                    raise error
                yield result  # type: ignore[misc]
                following += 1
                room.release()
                continue
            number, result, error = done.get()
            if number < 0:
                at_work -= 1
                continue
            waiting[number] = (result, error)
            if error is not None:
                # Nothing new begins; what comes before it in order is still delivered.
                is_failed.set()
    finally:
        is_over.set()
        for _ in threads:
            room.release()


def all_of(work: Callable[[T], object], items: Iterable[T], *, workers: int = WORKERS) -> None:
    """Do `work` on every item; raises the first error."""
    for _ in in_parallel(work, items, workers=workers):
        pass
