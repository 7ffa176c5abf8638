"""One real Slurm for all tests of a pytest worker, and the runs they are compared with."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# With --import-mode=importlib the tests' own folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))

from cluster import LONG, Cluster, NotInstalled, Task, free_ports, run_locally, words_of


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Fails, rather than skips, where Slurm is not installed: these tests have no substitute."""
    started = Cluster(tmp_path_factory.mktemp("slurm"), port=free_ports(20))
    try:
        started.start()
    except NotInstalled as error:
        started.stop()
        pytest.fail(str(error), pytrace=False)
    yield started
    started.stop()


@pytest.fixture
def slurm(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster as most sites are not: RequeueExit and the user signal are set."""
    yield cluster
    cluster.clear()
    cluster.configure()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Task]:
    """The long task without interruption, once for each number of processes and all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def run(processes: int = 1) -> Task:
        store = base / f"reference-{processes}"
        store.mkdir(exist_ok=True)
        with open(store / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            task = Task(store, "lora_long")
            if not (task.folder / "eval" / "done.json").exists():
                task = run_locally(store, words_of(LONG), "lora_long", processes)
        return task

    return run
