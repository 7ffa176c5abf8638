"""What the smoke tasks of questions_gen show: rewards that are won, and rewards that are hacked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton.record import EvalRecord

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("drilled", ["smoke/questions_gen"], indirect=True),
]
STAGES = ("sft", "grpo", "distill")


def folder_of(drilled: Any, task: str) -> Path:
    return drilled.baton.folder / "tasks" / task


def curve(drilled: Any, task: str, name: str) -> list[float]:
    """A figure of the logged steps of grpo."""
    lines = (folder_of(drilled, task) / "grpo" / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def record_of(drilled: Any, task: str) -> EvalRecord:
    path = folder_of(drilled, task) / "eval" / "eval.json"
    return EvalRecord.from_json(path.read_bytes(), where=task)


def test_a_policy_with_a_checkable_reward_goes_from_below_a_fifth_to_above_four(
    drilled: Any,
) -> None:
    rewards = curve(drilled, "countered", "reward")
    assert np.mean(rewards[:2]) < 0.2
    assert np.mean(rewards[-3:]) > 0.8
    scores = {score.column: score for score in record_of(drilled, "countered").scores}
    assert scores["right_sft"].value < 0.4 < 0.8 < scores["right_grpo"].value
    assert scores["quality_grpo_minus_sft"].low > 0, "more than chance"


def test_keywords_alone_win_their_reward_and_lose_the_problems(drilled: Any) -> None:
    rewards, independent = (curve(drilled, "keyword", name) for name in ("reward", "independent"))
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.1
    assert np.mean(independent[-3:]) < np.mean(independent[:2]) - 0.2
    countered = curve(drilled, "countered", "independent")
    assert np.mean(countered[-3:]) > np.mean(countered[:2]) + 0.2


def test_the_curves_are_in_the_record_and_in_the_report(drilled: Any, tmp_path: Path) -> None:
    record = record_of(drilled, "countered")
    steps = [step for step, _ in record.dev_scores["reward"]]
    before = json.loads((folder_of(drilled, "countered") / "sft" / "summary.json").read_bytes())
    assert steps[0] > before["steps"], "the steps of grpo come after those of sft"
    assert record.training.steps == sum(
        json.loads((folder_of(drilled, "countered") / stage / "summary.json").read_bytes())["steps"]
        for stage in STAGES
    )
    ended = drilled.baton("collect", "--out", str(tmp_path / "results"))
    assert ended.status == 0, ended.err
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "quality gained" in page
    assert "reward" in page
    assert (tmp_path / "results" / "loss_curves.png").exists()


def test_each_stage_leaves_weights_of_its_own(drilled: Any) -> None:
    finals = [
        (folder_of(drilled, "countered") / stage / "final" / "model.safetensors").read_bytes()
        for stage in STAGES
    ]
    assert len(set(finals)) == 3
    steps = [
        json.loads((folder_of(drilled, "countered") / stage / "final" / "task.json").read_bytes())
        for stage in STAGES
    ]
    assert all(one["step"] > 0 for one in steps)


def test_a_group_is_of_one_prompt_and_its_advantages_follow_from_its_rewards(drilled: Any) -> None:
    paths = sorted((folder_of(drilled, "countered") / "grpo" / "rollouts").glob("*.json"))
    assert [int(path.stem) for path in paths] == list(range(0, 72, 2))
    for path in paths:
        batch = json.loads(path.read_bytes())
        assert len(batch["prompts"]) == len(batch["asked"]) == 8
        assert len(batch["completions"]) == len(batch["scored"]) == 64
        rewards = np.array([one["normalised"] for one in batch["scored"]]).reshape(8, 8)
        spread = rewards.std(axis=1, ddof=1, keepdims=True)
        expected = (rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-4)
        assert np.allclose(np.array(batch["advantages"]).reshape(8, 8), expected)


def test_rewards_are_normalised_by_those_of_the_batches_before(drilled: Any) -> None:
    paths = sorted((folder_of(drilled, "countered") / "grpo" / "rollouts").glob("*.json"))
    known: list[float] = []
    for path in paths[:6]:
        scored = json.loads(path.read_bytes())["scored"]
        for one in scored:
            shown = (one["reward"] - np.mean(known)) / max(np.std(known), 0.05) if known else None
            assert one["normalised"] == pytest.approx(one["reward"] if shown is None else shown)
        known += [one["reward"] for one in scored]


def test_validation_is_recorded_at_its_cadence_and_memory_said_at_every_edge(drilled: Any) -> None:
    folder = folder_of(drilled, "countered")
    lines = (folder / "grpo" / "validation.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["step"] for line in found] == [10, 20, 30, 40, 50, 60, 70, 72]
    assert all(len(line["problems"]) == 4 for line in found)
    log = (folder / "log.txt").read_text()
    for where in ("sft begins", "grpo begins", "grpo validation", "distill ends"):
        assert re.search(rf"memory .* where='{where}' resident_gib=\d", log)


def test_the_teacher_taught_and_said_what_it_made(drilled: Any) -> None:
    report = json.loads(
        (folder_of(drilled, "countered") / "distill" / "taught" / "report.json").read_bytes()
    )
    assert report["teacher"] == "sympy"
    assert report["proposals"] == 16
    assert 0 < report["improved"] <= 16
    assert report["tokens"]["samples"] > report["improved"]
    assert 0 < report["mean_score"] <= 1


def test_generate_writes_a_problem(drilled: Any) -> None:
    name, store = f"{drilled.baton.experiment}/countered", str(drilled.baton.store)
    done = subprocess.run(
        [sys.executable, "-m", "baton", "generate", "--task", name, "--store", store, "--greedy"],
        capture_output=True,
        text=True,
        env=os.environ | {"BATON_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "Problem:" in done.stdout
