"""Scenarios 16 and 17: a resumed run is the uninterrupted run, whatever is trained and wherever."""

from __future__ import annotations

import signal

import pytest
from lab import Lab, Task, assert_identical, wait_for

METHODS = {
    "lora": {"matrix.adapter.method": "[lora]"},
    "qlora": {
        "matrix.adapter.method": "[qlora]",
        "model.config.hidden_size": "64",
        "model.config.intermediate_size": "128",
    },
    "full": {"matrix.adapter.method": "[full]", "train.learning_rate": "1e-3"},
    "lora_fp16": {"matrix.adapter.method": "[lora]", "train.precision": "fp16"},
    "lora_bf16": {"matrix.adapter.method": "[lora]", "train.precision": "bf16"},
    "full_fp16": {"matrix.adapter.method": "[full]", "train.precision": "fp16"},
}


def interrupt(lab: Lab, task: Task, pattern: str, number: int = signal.SIGTERM) -> int:
    """Run a leg, send a signal once its log matches, and return its exit status."""
    leg = lab.start(task)
    wait_for(leg, pattern)
    leg.kill(number)
    return leg.wait()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_training_resumes_to_the_same_bytes(lab: Lab, method: str) -> None:
    task = lab.task({**METHODS[method], "adapter.dropout": "0.2"})
    assert interrupt(lab, task, " step=3/10 ", signal.SIGKILL) == -signal.SIGKILL
    assert interrupt(lab, task, " step=5/10 ") == 75
    assert interrupt(lab, task, " step=7/10 ", signal.SIGKILL) == -signal.SIGKILL
    lab.finish(task)
    assert_identical(task, lab.reference(task))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("where", ["epoch end", "evaluation", "last step"])
def test_a_leg_that_ends_at_an_odd_place_changes_nothing(
    lab: Lab, where: str, number: signal.Signals
) -> None:
    # 40 rows in batches of 8: an epoch is 5 steps; evaluations are at 4, 8 and 10.
    step = {"epoch end": 5, "evaluation": 8, "last step": 10}[where]
    task = lab.task()
    # The log line of a step comes before its save and its evaluation.
    status = interrupt(lab, task, rf" step={step}/10 loss", number)
    assert status in ({75, 0} if number == signal.SIGTERM else {-signal.SIGKILL, 0})
    lab.finish(task)
    assert_identical(task, lab.reference(task))


def test_a_signal_during_the_last_evaluation_leaves_it_to_the_next_leg(lab: Lab) -> None:
    _, operations = lab.traced(lab.task())
    # Steps 10 is saved and then evaluated; this is the last file of that save.
    number = operations.index("link train/checkpoints/step-000010/manifest.json") + 1
    task = lab.task()
    leg, _ = lab.traced(task, at=number, number=int(signal.SIGTERM))
    assert leg.status == 75, leg.text[-1500:]
    lab.finish(task)
    assert_identical(task, lab.reference(task))


def test_two_handovers_within_one_epoch_change_nothing(lab: Lab) -> None:
    task = lab.task()
    assert interrupt(lab, task, " step=6/10 ") == 75
    assert interrupt(lab, task, "resumed ") == 75
    lab.finish(task)
    assert len(task.legs()) == 3
    assert_identical(task, lab.reference(task))


def test_a_leg_after_the_end_does_nothing_and_exits_with_0(lab: Lab) -> None:
    task = lab.task()
    lab.run(task)
    before = {path: path.stat().st_mtime_ns for path in task.folder.rglob("*") if path.is_file()}
    leg = lab.run(task)
    assert "finished already" in leg.text
    after = {path: path.stat().st_mtime_ns for path in task.folder.rglob("*") if path.is_file()}
    assert after == before
    assert len(task.legs()) == 1


@pytest.mark.parametrize("pattern", ["stage started .*stage=eval", "answered .*shard=1/"])
def test_an_evaluation_goes_on_with_what_is_not_answered(lab: Lab, pattern: str) -> None:
    task = lab.task({"eval.max_samples": "12", "eval.generate.batch_size": "2"})
    assert interrupt(lab, task, pattern) == 75
    answered = {path: path.read_bytes() for path in task.folder.glob("eval/shards/*")}
    lab.finish(task)
    for path, data in answered.items():
        assert path.read_bytes() == data, "what was answered is not answered again"
    assert_identical(task, lab.reference(task))


def test_metrics_have_no_gap_and_no_step_twice_over_many_legs(lab: Lab) -> None:
    task = lab.task({"train.save_every_steps": "3"})
    for step in (2, 4, 5, 7, 8):
        interrupt(lab, task, rf" step={step}/10 ", signal.SIGKILL if step % 2 else signal.SIGTERM)
    lab.finish(task)
    lines = task.metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "dev_loss" in line] == [4, 8, 10]
    # Eight samples a step, each once an epoch: the order is the uninterrupted one.
    assert [line["samples"] for line in lines if "loss" in line] == list(range(8, 81, 8))
    assert_identical(task, lab.reference(task))


def test_metrics_of_steps_that_a_kill_undid_are_not_kept(lab: Lab) -> None:
    task = lab.task({"train.save_every_steps": "4", "train.eval_every_steps": "100"})
    assert interrupt(lab, task, " step=7/10 ", signal.SIGKILL) == -signal.SIGKILL
    assert max(line["step"] for line in task.metrics()) >= 7
    half = task.folder / "train" / "metrics.jsonl"
    half.write_bytes(half.read_bytes() + b'{"step": 8, "lo')
    lab.finish(task)
    assert_identical(task, lab.reference(task))
