"""Sampling is part of the exact resume: whenever a leg of GRPO ends, the run is the same run."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest
from lab import Lab, Task, assert_identical, wait_for

EXPERIMENT = "smoke/questions_gen"
# Batches of 8 completions, each gone through twice in halves: four updates a batch, so that a
# leg may end before, between and after them. Saves at every step would hide what is lost.
SETTINGS = {
    "sft.max_steps": "30",
    "sft.eval_every_steps": "30",
    "sft.save_every_steps": "30",
    "grpo.max_steps": "12",
    "grpo.prompts": "2",
    "grpo.group": "4",
    "grpo.batch_samples": "4",
    "grpo.iterations": "2",
    "grpo.beta": "0.04",
    "grpo.clip": "0.01",
    "grpo.learning_rate": "1e-3",
    "grpo.variation_share": "0.5",
    "grpo.log_every_steps": "1",
    "grpo.eval_every_steps": "6",
    "grpo.save_every_steps": "3",
    # Rewards that differ from one completion to the next, or nothing would be learnt.
    "matrix.reward": "{both: {grpo.reward: {keyword: 1.0, independent: 1.0, history: 12}}}",
    "grpo.warmup_steps": "0",
    "distill.max_steps": "4",
    "distill.eval_every_steps": "4",
    "distill.problems": "8",
}


def task_of(lab: Lab, **settings: str) -> Task:
    return lab.task({**SETTINGS, **settings}, name="both", experiment=EXPERIMENT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "where", ["before the batch is kept", "while it is kept", "before its first update"]
)
def test_a_leg_struck_around_the_making_of_a_batch_changes_nothing(
    lab: Lab, where: str, number: signal.Signals
) -> None:
    _, operations = lab.traced(task_of(lab))
    kept = next(i for i, o in enumerate(operations) if re.match(r"rename grpo/rollouts/000004", o))
    opened = max(i for i, o in enumerate(operations[:kept]) if o.startswith("open"))
    at = {"before the batch is kept": opened, "while it is kept": kept}.get(where, kept + 1) + 1
    task = task_of(lab)
    leg, _ = lab.traced(task, at=at, number=int(number))
    assert leg.status == (-signal.SIGKILL if number == signal.SIGKILL else 75), leg.text[-2000:]
    lab.finish(task)
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_legs_killed_in_sampling_and_between_updates_change_nothing(lab: Lab) -> None:
    task = task_of(lab)
    # Steps 0 to 3 share a batch: behind the line of step 2 its second half is gone through,
    # behind that of step 4 the next batch is drawn.
    for pattern, number, status in (
        ("stage=grpo step=2/12 ", signal.SIGKILL, -signal.SIGKILL),
        ("stage=grpo step=4/12 ", signal.SIGKILL, -signal.SIGKILL),
        ("stage=grpo step=5/12 ", signal.SIGTERM, 75),
        ("stage=grpo step=7/12 ", signal.SIGKILL, -signal.SIGKILL),
        ("stage=grpo step=8/12 ", signal.SIGTERM, 75),
    ):
        leg = lab.start(task)
        wait_for(leg, pattern)
        leg.kill(number)
        assert leg.wait() == status, leg.text[-2000:]
    lab.finish(task)
    assert_identical(task, lab.reference(task))
    lines = (task.folder / "grpo" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if '"kl"' in line]
    # Of a batch only the first update is made by the policy that drew it.
    assert all((step["clipped"] > 0) == (step["step"] % 4 != 1) for step in steps), steps
    assert steps[0]["kl"] == 0 < min(step["kl"] for step in steps[1:])


@pytest.mark.slow
def test_a_second_signal_in_the_middle_of_sampling_leaves_the_batch_to_the_next_leg(
    lab: Lab,
) -> None:
    # 800 completions, drawn for seconds; four updates on them, as elsewhere here. Two such batches.
    slow = {"grpo.max_new_tokens": "80", "grpo.prompts": "200", "grpo.batch_samples": "400"}
    slow |= {"grpo.max_steps": "8"}
    task = task_of(lab, **slow)
    leg = lab.start(task)
    wait_for(leg, "stage=grpo step=4/8 ")
    leg.kill(signal.SIGTERM)
    time.sleep(1.1)  # earlier it would count as part of the first
    leg.kill(signal.SIGUSR2)
    assert leg.wait() == 75, leg.text[-2000:]
    assert not (task.folder / "grpo" / "rollouts" / "000004.json").exists()
    assert task.steps("grpo")[-1] == 4
    lab.finish(task)
    assert_identical(task, lab.reference(task))


@pytest.mark.slow
def test_a_resume_says_which_batch_is_gone(lab: Lab) -> None:
    task = task_of(lab)
    leg = lab.start(task)
    wait_for(leg, "stage=grpo step=7/12 ")
    leg.kill(signal.SIGKILL)
    leg.wait()
    (task.folder / "grpo" / "rollouts" / "000004.json").unlink()
    again = lab.run(task, expect=None)
    assert again.status == 1
    assert "the completions drawn at step 4 are gone from grpo/rollouts" in again.text


@pytest.mark.slow
def test_two_processes_share_the_sampling_and_resume_to_the_same_bytes(lab: Lab) -> None:
    def finished(task: Task) -> Task:
        for _ in range(3):
            statuses = {leg.wait() for leg in lab.start_pair(task)}
            if statuses == {0}:
                return task
            assert statuses == {75}
        raise AssertionError("not finished after three legs")

    whole, stopped = finished(task_of(lab)), task_of(lab)
    pair = lab.start_pair(stopped)
    wait_for(pair[0], "stage=grpo step=6/12 ")
    pair[1].kill(signal.SIGTERM)
    assert {leg.wait() for leg in pair} == {75}, pair[0].text[-2000:]
    assert_identical(finished(stopped), whole)
    batch = json.loads((whole.folder / "grpo" / "rollouts" / "000000.json").read_bytes())
    assert len(batch["completions"]) == len(batch["old"]) == len(batch["reference"]) == 8
