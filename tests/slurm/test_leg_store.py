"""A job whose store is far away: what one node saved, another that has nothing goes on from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import (
    JOB,
    LONG,
    Cluster,
    Task,
    assert_as_if_uninterrupted,
    until,
    words_of,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "services"))

from s3 import BUCKET, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def copy_of(scratch: Path) -> Task:
    """What a machine has of the task in its copy of the store."""
    found = list(scratch.glob("*/smoke"))
    return Task(found[0].parent if found else scratch / "nothing yet", "lora_long")


def test_a_preempted_job_goes_on_from_s3_on_a_machine_that_has_nothing(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task]
) -> None:
    scratch, lost, go = tmp_path / "scratch", tmp_path / "lost", tmp_path / "go"
    with s3_server() as server:
        settings = {
            **server.environment,
            "BATON_STORE": f"s3://{BUCKET}/{os.urandom(6).hex()}",
            "BATON_SCRATCH": str(scratch),
        }
        words = (JOB, "smoke/medical_qa/lora_long", *words_of(LONG))
        where = ("--exclusive", "--nodelist=n1")
        job = slurm.sbatch("--partition=lowgrace", *where, *words, env=settings)
        until(lambda: copy_of(scratch).step >= 30, f"step 30: {job.output[-2000:]}")
        # Somebody more important has the node until the first machine's disk is gone.
        slurm.sbatch("--partition=high", *where, f"--wrap=until [ -e {go} ]; do sleep 0.2; done")
        until(lambda: job.state == "PENDING", "the end of the first leg")
        [first] = copy_of(scratch).legs()
        scratch.rename(lost)
        go.touch()
        assert job.wait() == "COMPLETED"
        assert_as_if_uninterrupted(copy_of(scratch), reference(), legs=2)
    assert (first["state"], first["exit_status"]) == ("handed_over", 75)
    assert first["durable_step"] == first["to_step"] >= 30
    assert not first["not_stored"]
    assert copy_of(scratch).legs()[1]["from_step"] == first["durable_step"]
