"""Of a sharded model every process saves a share: kills, fewer processes, a damaged share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from lab import EXPERIMENT, TINY, Lab, Task, assert_identical, damage, wait_for, wait_until
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Odd batches of few tokens: one process has more micro-batches than the other.
SETTINGS = {
    "matrix.adapter.method": "[full]",
    "train.sharding": "full",
    "train.batch_samples": "5",
    "train.tokens_per_micro_batch": "100",
    "train.max_steps": "10",
}
SHARDS = ("shards/00000-of-00002.safetensors", "shards/00001-of-00002.safetensors")


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Task:
    """The reference: two processes, not interrupted."""
    task = lab.task(SETTINGS)
    lab.finish_pair(task)
    return task


def test_one_signalled_process_stops_both_and_the_next_leg_has_the_same_bytes(
    lab: Lab, whole: Task
) -> None:
    task = lab.task(SETTINGS)
    pair = lab.start_pair(task)
    wait_for(pair[0], " step=3/10 ")
    pair[1].kill(signal.SIGTERM)
    assert [leg.wait() for leg in pair] == [75, 75], pair[0].text[-2000:] + pair[1].text[-2000:]
    lab.finish_pair(task)
    assert_identical(task, whole)


def test_a_process_killed_while_both_save_costs_that_save_only(lab: Lab, whole: Task) -> None:
    task = lab.task(SETTINGS)
    pair = lab.start_pair(task)
    wait_for(pair[0], " step=5/10 ")
    share = task.folder / ".staging-001" / SHARDS[1]
    wait_until(pair[1], share.exists, "its share of a checkpoint")
    pair[1].kill(signal.SIGKILL)
    # Without a launcher: the survivor notices the closed connection by itself.
    assert pair[0].wait(timeout=60) not in (0, 75)
    assert task.steps()[-1] in (4, 6)
    lab.finish_pair(task)
    assert_identical(task, whole)


def test_one_process_goes_on_where_two_stopped_and_two_where_it_did(lab: Lab, whole: Task) -> None:
    task = lab.task(SETTINGS)
    pair = lab.start_pair(task)
    wait_for(pair[0], " step=3/10 ")
    pair[0].kill(signal.SIGTERM)
    assert [leg.wait() for leg in pair] == [75, 75]
    alone = lab.start(task)
    wait_for(alone, " step=6/10 ")
    alone.kill(signal.SIGTERM)
    assert alone.wait() == 75, alone.text
    assert "nothing to shard" in alone.text
    assert "processes: 2 -> 1" in alone.text
    lab.finish_pair(task)
    ours, theirs = (load_file(t.folder / "train/final/model.safetensors") for t in (task, whole))
    # The order of sums is another one; three steps of Adam make 1e-4 of a rounding at most.
    assert all((ours[name] - tensor).abs().max() < 1e-4 for name, tensor in theirs.items())


def test_a_damaged_share_is_set_aside_and_the_older_checkpoint_used(
    lab: Lab, whole: Task, tmp_path: Path
) -> None:
    saved = lab.task(SETTINGS)
    pair = lab.start_pair(saved)
    wait_for(pair[0], " saved .* step=4 ")
    for leg in pair:
        leg.kill(signal.SIGKILL)
    assert [leg.wait() for leg in pair] == [-signal.SIGKILL] * 2
    newest = saved.steps()[-1]
    for share, how in zip(SHARDS, ("flipped", "removed"), strict=True):
        task = saved.copy_to(tmp_path / how)
        damage(task.checkpoint(newest) / share, how)
        text = lab.finish_pair(task)[0].text
        assert f"using step-{newest - 2:06d} instead" in text
        assert Path(share).name in text
        assert_identical(task, whole)


def test_a_stretch_trained_again_by_two_processes_has_the_same_bytes(
    lab: Lab, whole: Task, tmp_path: Path
) -> None:
    settings = {**TINY, **SETTINGS}
    words = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    command = ["verify-resume", f"{EXPERIMENT}/{whole.name}", "--store", whole.store, *words]
    pair = [
        lab.zygote.start(
            command,
            log=tmp_path / f"{rank}.txt",
            env={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "BATON_RENDEZVOUS": f"file://{tmp_path}/meeting",
            },
        )
        for rank in range(2)
    ]
    assert [leg.wait() for leg in pair] == [0, 0], pair[0].text + pair[1].text
    assert "train, steps 8 to 10: bit-identical" in pair[0].text
    alone = lab.zygote.start(command, log=tmp_path / "alone.txt")
    assert alone.wait() == 78
    assert "use: baton verify-resume --processes 2" in alone.text
