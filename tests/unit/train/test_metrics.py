"""The curves: exact lines, no duplicates after a resume, events that TensorBoard reads."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from baton.train.metrics import Metrics, read_lines


@pytest.fixture
def open_metrics(tmp_path):
    opened = []

    def make(step, **options):
        metrics = Metrics(tmp_path, run_name="r")
        metrics.resume(step, **options)
        opened.append(metrics)
        return metrics

    yield make
    for metrics in opened:
        metrics.close()


def steps(path):
    return [line["step"] for line in read_lines(path)]


def test_lines_hold_the_exact_values_and_not_what_was_measured(open_metrics):
    metrics = open_metrics(0)
    metrics.write(1, {"loss": 0.1 + 0.2}, {"tokens_per_s": 12.5})
    assert metrics.path.read_text() == '{"step": 1, "loss": 0.30000000000000004}\n'


def test_a_line_is_on_disk_before_anything_is_closed(open_metrics):
    metrics = open_metrics(0)
    metrics.write(1, {"loss": 1.0}, {})
    assert steps(metrics.path) == [1]


def test_a_resumed_run_drops_what_lies_past_its_step(open_metrics):
    metrics = open_metrics(0)
    for step in range(1, 8):
        metrics.write(step, {"loss": float(step)}, {})
    metrics.close()
    metrics = open_metrics(4)
    assert steps(metrics.path) == [1, 2, 3, 4]
    metrics.write(5, {"loss": 50.0}, {})
    assert [line["loss"] for line in read_lines(metrics.path)] == [1, 2, 3, 4, 50]


@pytest.mark.parametrize("dev_pending", [False, True])
def test_the_dev_loss_of_the_resumed_step_stays_unless_it_is_taken_again(dev_pending, open_metrics):
    metrics = open_metrics(0)
    metrics.write(1, {"dev_loss": 3.0}, {})
    metrics.write(2, {"loss": 1.0}, {})
    metrics.write(2, {"dev_loss": 2.0}, {})
    metrics.write(3, {"loss": 1.0}, {})
    metrics.write(3, {"dev_loss": 2.0}, {})
    metrics.close()
    metrics = open_metrics(2, dev_pending=dev_pending)
    kept = [{"step": 1, "dev_loss": 3.0}, {"step": 2, "loss": 1.0}, {"step": 2, "dev_loss": 2.0}]
    assert read_lines(metrics.path) == kept[: 2 if dev_pending else 3]


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 3}', "{", "\ufffd"])
def test_half_a_line_is_removed(half, open_metrics, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + half)
    metrics = open_metrics(5)
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("torn", ["\0\0\0\0\n", '{"step": 2, "lo{"step": 2}\n'])
def test_a_torn_line_does_not_stop_a_leg(torn, open_metrics, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
    assert steps(open_metrics(5).path) == [1]


def test_tensorboard_reads_every_step_once_after_a_resume(open_metrics, tmp_path):
    metrics = open_metrics(0)
    for step in range(1, 8):
        metrics.write(step, {"loss": float(step)}, {"tokens_per_s": 1.0})
    metrics.close()
    metrics = open_metrics(4)
    for step in range(5, 10):
        metrics.write(step, {"loss": 10.0 * step}, {})
    metrics.sync()
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(s, float(s)) for s in range(1, 5)] + [(s, 10.0 * s) for s in range(5, 10)]
    assert [event.step for event in events.Scalars("tokens_per_s")] == [1, 2, 3, 4]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []
