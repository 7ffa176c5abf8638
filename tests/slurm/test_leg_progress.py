"""Crash loops end and progress does not, however often a job is taken away."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cluster import LEG, REPOSITORY, Cluster, Job, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PREEMPTIONS = 20
# Stands in for `python -m baton run PLAN --task TASK --store ROOT`, without seconds of imports:
# baton's own records and rules, but a leg's work is one number. It saves when asked to stop.
WORKER = """\
#!{python}
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {source!r})
from baton.errors import BatonError
from baton.handover import StopSignal
from baton.identity import this_runner
from baton.legs import Legs, utc_now
from baton.record import LegRecord, replace
from baton.runner import submission_id
from baton.store.local import LocalStore
stop = StopSignal().install()
task = sys.argv[sys.argv.index("--task") + 1]
store = LocalStore(Path(sys.argv[sys.argv.index("--store") + 1]) / task)
legs = Legs(store, task, utc_now)
done = len(list(store.names("work")))
try:
    record = legs.open(LegRecord(
        task=task, number=0, state="active", submission=submission_id(), runner=this_runner(),
        started=utc_now(), position=[done]))
except BatonError as error:
    print("error:", error, flush=True)
    sys.exit(error.exit_status)
while done < {preemptions} and not stop.is_set:
    time.sleep(0.05)
if task == "progress" and stop.is_set:
    store.write(f"work/{{done}}", b"")
    done += 1
state = "handed_over" if stop.is_set else "finished"
legs.close(replace(record, state=state, ended=utc_now(), position_at_end=[done]))
sys.exit(75 if stop.is_set else 0)
"""


def submit(slurm: Cluster, folder: Path, task: str) -> Job:
    worker = folder / "worker"
    if not worker.exists():
        source = str(REPOSITORY / "src")
        text = WORKER.format(python=sys.executable, source=source, preemptions=PREEMPTIONS)
        worker.write_text(text)
        worker.chmod(0o755)
        (folder / "plan.json").write_text("{}")
    settings = {"BATON_PYTHON": str(worker), "BATON_STORE": str(folder)}
    plan = str(folder / "plan.json")
    return slurm.sbatch("--signal=B:USR2@120", LEG, plan, task, env=settings)


def legs_of(folder: Path, task: str) -> int:
    return len(list((folder / task / "legs").glob("*.json")))


def ask(slurm: Cluster, folder: Path, task: str, job: Job, leg: int) -> None:
    """Ask the job's so-many-th leg to stop, once it is there."""
    until(lambda: legs_of(folder, task) == leg, f"leg {leg} of {task}")
    slurm("scancel", "--batch", "--signal=USR2", job.number)


def test_twenty_preemptions_with_progress_use_nothing_up_and_three_without_stop(
    slurm: Cluster, tmp_path: Path
) -> None:
    slurm.configure(requeue_exit=False)
    progress = submit(slurm, tmp_path, "progress")
    idle = submit(slurm, tmp_path, "idle")
    for leg in range(1, PREEMPTIONS + 1):
        ask(slurm, tmp_path, "progress", progress, leg)
        if leg <= 3:
            ask(slurm, tmp_path, "idle", idle, leg)
    assert progress.wait() == "COMPLETED"
    assert progress.legs() == ["REQUEUED"] * PREEMPTIONS + ["COMPLETED"]
    assert legs_of(tmp_path, "progress") == PREEMPTIONS + 1
    assert idle.wait() == "FAILED"
    assert (idle.field("ExitCode"), idle.restarts) == ("78:0", 3)
    said = (tmp_path / "tasks" / "idle" / "log.txt").read_text()
    assert "3 legs in a row left nothing durable behind" in said
