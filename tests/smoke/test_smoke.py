"""Every experiment in jobs/smoke, submitted once with a preemption and a kill on the way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from baton.pipelines import PIPELINES
from baton.record import EvalRecord, Manifest, Plan

pytestmark = pytest.mark.slow


def test_every_task_finishes_through_a_preemption_and_a_kill(drilled: Any) -> None:
    out = drilled.submitted.out
    assert drilled.submitted.status == 0, out + drilled.submitted.err
    assert f"{drilled.preempted}: drill: SIGTERM at step" in out
    assert f"{drilled.preempted}: handed over, step" in out
    assert f"{drilled.killed}: killed by SIGKILL; starting again" in out
    for task in drilled.tasks:
        assert out.count(f" {task}: finished\n") == 1


def test_status_tells_programs_where_every_task_stands(drilled: Any) -> None:
    rows = drilled.baton.status()
    assert list(rows) == drilled.tasks
    for row in rows.values():
        assert (row["state"], row["reason"]) == ("finished", "")
        assert row["durable_step"] > 0
    again = {drilled.preempted, drilled.killed}
    assert {task for task, row in rows.items() if row["legs"] > 1} == again


def test_leg_records_tell_a_preemption_from_a_kill(drilled: Any) -> None:
    first, second = drilled.baton.legs(drilled.preempted)[:2]
    assert (first["state"], first["signal"], first["exit_status"]) == ("handed_over", "SIGTERM", 75)
    assert second["position"] == first["position_at_end"] != first["position"]
    assert second["from_step"] == first["durable_step"] >= 3
    assert second["state"] == "finished"
    killed = drilled.baton.legs(drilled.killed)[0]
    assert (killed["state"], killed["exit_status"]) == ("lost", None)
    assert killed["reason"] == "ended without a word: killed, or its node was lost"


def test_metrics_have_no_step_twice_and_none_missing(drilled: Any) -> None:
    for task, stage in itertools.product(drilled.tasks, training_stages(drilled)):
        path = drilled.baton.folder / "tasks" / task / stage / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        every = steps[0]
        assert steps == list(range(every, steps[-1] + 1, every)), (task, stage)


def test_every_record_can_be_read_and_says_that_the_weights_are_random(drilled: Any) -> None:
    folder = drilled.baton.folder
    plan = Plan.from_json((folder / "plan.json").read_bytes(), where="plan.json")
    assert [task.name for task in plan.tasks] == drilled.tasks
    for task in drilled.tasks:
        path = folder / "tasks" / task / "eval" / "eval.json"
        record = EvalRecord.from_json(path.read_bytes(), where=task)
        assert (record.task, record.digest) == (task, plan.digest)
        assert "RANDOM WEIGHTS" in path.read_text().splitlines()[1]
        manifests = [*(folder / "tasks" / task).glob("*/checkpoints/*/manifest.json")]
        assert {m.parts[-4] for m in manifests} == set(training_stages(drilled))
        for manifest in manifests:
            files = Manifest.from_json(manifest.read_bytes(), where=str(manifest)).files
            assert {f.name: f.size for f in files} == {
                f.name: (manifest.parent / f.name).stat().st_size for f in files
            }


def test_the_log_of_a_task_holds_all_its_legs(drilled: Any) -> None:
    ended = drilled.baton("logs", task=drilled.preempted)
    assert ended.status == 0, ended.err
    assert "leg ended" in ended.out
    assert "leg=1 state=handed_over" in ended.out
    assert "leg=2 state=finished" in ended.out
    assert "Traceback" not in ended.out


def test_logs_of_an_experiment_ask_for_one_task(drilled: Any) -> None:
    if len(drilled.tasks) == 1:
        pytest.skip("this experiment has one task")
    ended = drilled.baton("logs")
    assert ended.status == 78
    assert drilled.tasks[0] in ended.err


def test_a_stretch_trained_again_has_the_same_bytes_and_leaves_no_trace(drilled: Any) -> None:
    folder = drilled.baton.folder / "tasks" / drilled.preempted
    before = listing(folder)
    ended = drilled.baton("verify-resume", task=drilled.preempted)
    assert ended.status == 0, ended.out + ended.err
    assert ended.out.rstrip().endswith("bit-identical")
    assert listing(folder) == before


def test_submitting_again_runs_nothing(drilled: Any) -> None:
    before = listing(drilled.baton.folder)
    ended = drilled.baton("submit")
    assert ended.status == 0, ended.err
    assert f"0 of {len(drilled.tasks)} tasks to run" in ended.out
    assert "started" not in ended.out
    assert listing(drilled.baton.folder) == before


def test_plan_shows_that_nothing_is_left_to_run(drilled: Any) -> None:
    ended = drilled.baton("plan")
    lines = [line.strip() for line in ended.out.splitlines()]
    assert [line for line in lines if line.endswith("finished -> skip")] == [
        f"{task}: finished -> skip" for task in drilled.tasks
    ]


def test_a_dry_run_shows_what_would_be_skipped(drilled: Any) -> None:
    ended = drilled.baton("submit", "--dry-run")
    assert ended.status == 0
    for task in drilled.tasks:
        assert f"would skip: {task} is finished" in ended.out
    assert "nothing was started" in ended.out


def test_a_finished_task_run_once_more_is_finished_at_once(drilled: Any) -> None:
    before = drilled.baton.legs(drilled.tasks[0])
    ended = drilled.baton("run", "--task", drilled.tasks[0])
    assert ended.status == 0, ended.out + ended.err
    assert "finished already" in ended.out
    assert drilled.baton.legs(drilled.tasks[0]) == before


def test_collect_writes_table_and_report_and_misses_nothing(drilled: Any, tmp_path: Path) -> None:
    ended = drilled.baton("collect", "--out", str(tmp_path / "results"))
    assert ended.status == 0, ended.out + ended.err
    assert "missing:" not in ended.out
    table = (tmp_path / "results" / "results_summary.csv").read_text(encoding="utf-8-sig")
    for task in drilled.tasks:
        assert task in table
    assert "RANDOM WEIGHTS" in (tmp_path / "results" / "report.html").read_text(encoding="utf-8")


def test_what_was_not_submitted_here_is_not_started_yet(drilled: Any, tmp_path: Path) -> None:
    elsewhere = type(drilled.baton)(drilled.baton.experiment, tmp_path / "elsewhere")
    assert {row["state"] for row in elsewhere.status().values()} == {"not started"}
    assert not elsewhere.store.exists()


def training_stages(drilled: Any) -> tuple[str, ...]:
    plan = Plan.from_json((drilled.baton.folder / "plan.json").read_bytes(), where="plan.json")
    return PIPELINES[plan.pipeline]().training_stages


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, to see that nothing was written."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
