"""What a person can do to a run that is under way, and what is left of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_ctrl_c_ends_in_75_with_the_work_saved_and_submit_goes_on(long_run: Any) -> None:
    first = long_run.start("submit")
    long_run.wait_for_step("long", 5)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 75, out + err
    assert "handed over: long" in err
    [leg] = long_run.legs("long")
    assert (leg["state"], leg["signal"]) == ("handed_over", "SIGTERM")
    assert leg["durable_step"] >= 5
    assert long_run.status()["long"]["state"] == "handed over"

    second = long_run("submit")
    assert second.status == 0, second.out + second.err
    assert long_run.legs("long")[1]["from_step"] == leg["durable_step"]
    assert long_run.status()["long"]["durable_step"] == 1000


def test_a_cancelled_run_keeps_its_work_and_submit_goes_on_from_there(long_run: Any) -> None:
    launcher = long_run.start("submit")
    long_run.wait_for_step("long", 5)
    cancelled = long_run("cancel")
    assert cancelled.status == 0, cancelled.err
    assert "leg 1 was asked to stop; its work is saved" in cancelled.out
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 78, out + err
    assert "long: cancelled" in out
    row = long_run.status()["long"]
    assert (row["state"], row["reason"]) == ("cancelled", "cancelled by a person")
    assert row["durable_step"] >= 5

    again = long_run("submit")
    assert again.status == 0, again.out + again.err
    assert long_run.legs("long")[1]["from_step"] == row["durable_step"]


def test_a_task_cancelled_while_it_waits_is_not_started(short_pair: Any) -> None:
    launcher = short_pair.start("submit", "--max-parallel", "1")
    short_pair.wait_for_step("a", 0)
    assert short_pair("cancel", task="b").status == 0
    out, _ = launcher.communicate(timeout=120)
    assert "b: started" not in out


def test_a_detached_run_goes_on_and_its_log_can_be_followed(long_run: Any) -> None:
    ended = long_run("submit", "--detach")
    assert ended.status == 0, ended.err
    said = re.search(r"left running as process (\d+), log in (\S+);", ended.out)
    assert said, ended.out
    long_run.wait_for_step("long", 1)
    followed = long_run("logs", "-f")
    assert followed.status == 0, followed.err
    assert "state=finished" in followed.out
    assert long_run.status()["long"]["state"] == "finished"
    assert Path(said[2]).name == "launcher.log"


def test_two_submissions_at_once_train_once(long_run: Any) -> None:
    first, second = long_run.start("submit"), long_run.start("submit")
    outs = [process.communicate(timeout=120) for process in (first, second)]
    assert 0 in (first.returncode, second.returncode), outs
    assert not any("Traceback" in err for _, err in outs)
    assert long_run.status()["long"]["state"] == "finished"
    working = [leg for leg in long_run.legs("long") if leg["to_step"]]
    assert len(working) == 1
    metrics = long_run.folder / "tasks" / "long" / "train" / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+), "loss"', metrics.read_text())
    assert steps == [str(step) for step in range(50, 1001, 50)]


def test_submitting_what_is_running_leaves_it_alone_and_does_not_fail(long_run: Any) -> None:
    first = long_run.start("submit")
    long_run.wait_for_step("long", 1)
    second = long_run("submit")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert second.status in (0, 75), second.err
    assert "started" not in second.out


def test_max_parallel_one_runs_one_task_after_the_other(short_pair: Any) -> None:
    ended = short_pair("submit", "--max-parallel", "1")
    assert ended.status == 0, ended.err
    events = re.findall(r" ([ab]: (?:started|finished))\b", ended.out)
    assert events == ["a: started", "a: finished", "b: started", "b: finished"]


def test_one_task_of_an_experiment_can_be_submitted_alone(short_pair: Any) -> None:
    ended = short_pair("submit", task="b")
    assert ended.status == 0, ended.err
    assert "1 of 1 tasks to run" in ended.out
    assert {t: row["state"] for t, row in short_pair.status().items()} == {
        "a": "not started",
        "b": "finished",
    }


def test_a_leg_outlives_its_launcher_and_the_next_submission_respects_it(long_run: Any) -> None:
    launcher = long_run.start("submit")
    long_run.wait_for_step("long", 1)
    launcher.kill()
    launcher.communicate()
    assert long_run.status()["long"]["state"] == "running"
    assert "long: running -> leave running" in long_run("plan").out
    cancelled = long_run("cancel")
    assert "leg 1 was asked to stop" in cancelled.out
    followed = long_run("logs", "-f")
    assert "state=cancelled" in followed.out
    assert long_run.status()["long"]["state"] == "cancelled"


def test_run_on_a_terminal_draws_a_progress_bar(long_run: Any) -> None:
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    words = ["run", long_run.experiment, "--store", str(long_run.store), "--task", "long"]
    words += ["--set", "train.max_steps=60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "baton", *words],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm-256color", "BATON_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    long_run.started.append(process)
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:  # what Linux answers when the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main_end)
    assert process.wait(timeout=60) == 0, shown[-2000:]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"long train [━╸╺ ]+ *\d+/60 ", text), text[-2000:]
    assert "ETA" in text
    assert "Traceback" not in text
