"""Site files of Slurm clusters: what a job asks for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from baton.config.decode import decode
from baton.config.site import SlurmSite
from baton.config.slurm_site import seconds_of
from baton.errors import ConfigError

SITE: dict[str, Any] = {
    "launcher": "slurm",
    "time": "24:00:00",
    "gpu_types": {
        "a100": {"gres": "gpu:a100:1"},
        "four": {"gres": "gpu:a100:4", "partition": "big", "price_per_gpu_hour": 3},
        "any": {"gres": "gpu"},
    },
}


def site(**changes: Any) -> SlurmSite:
    return decode(SlurmSite, SITE | changes, where="s.yaml")


def problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        site(**changes)
    [line] = caught.value.problems
    return line.removeprefix("s.yaml: ")


def test_the_count_of_a_gres_is_what_a_task_gets_unless_it_says_so_itself() -> None:
    assert site().gpus == 0
    assert site(gpu="a100").gpus == 1
    assert site(gpu="any").gpus == 1
    assert site(gpu="four").gpus == 4
    assert site(gpu="four", nodes=2).gpus == 8
    assert site(gpu="a100", gpus_per_task=2).gpus == 2
    assert site(gpu="a100", gpus_per_task=2).processes_per_task == 2


def test_a_gpu_type_may_know_its_partition_and_its_price() -> None:
    four = site(gpu="four", partition="small", price_per_gpu_hour=1)
    assert (four.job_partition, four.price, four.gpu_hours) == ("big", 3, 96.0)
    one = site(gpu="a100", partition="small", price_per_gpu_hour=1)
    assert (one.job_partition, one.price, one.gpu_hours) == ("small", 1, 24.0)


def test_a_stage_changes_what_it_names_and_keeps_the_rest() -> None:
    stages = {"data": {"gpus_per_task": 0, "cpus": 4, "time": "1:00:00"}, "eval": {"gpu": "a100"}}
    found = site(gpu="four", gpus_per_task=8, memory_gb=10, stages=stages)
    data, evaluation = found.for_stage("data"), found.for_stage("eval")
    assert (data.gpus, data.cpus, data.time, data.memory_gb) == (0, 4, "1:00:00", 10)
    assert data.processes_per_task == 1
    assert (evaluation.gpus, evaluation.time) == (1, "24:00:00")
    assert found.for_stage("train").gpus == 8


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:01:00", 60), ("24:00:00", 86400), ("100:00:00", 360000), ("2-12:30:05", 217805)],
)
def test_a_time_limit_is_hours_or_days(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["1440", "24:00", "1:60:00", "1:00:60", "", "0:00:59", "1 day"])
def test_a_time_limit_that_slurm_would_read_otherwise_is_refused(text: str) -> None:
    assert problem(time=text).startswith("time must ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "h100"}, "gpu must be one of gpu_types (a100, four, any), got 'h100'"),
        ({"gpus_per_task": 2}, "gpus_per_task needs gpu: which of gpu_types?"),
        (
            {"gpu": "a100", "gpus_per_task": 3, "nodes": 2},
            "GPUs and processes must spread evenly over nodes, got 3 GPUs and 3 processes on 2"
            " nodes",
        ),
        (
            {"gpu_types": {"x": {"gres": "a100:1"}}},
            "gpu_types.x: gres must look like gpu:a100 or gpu:a100:4, got 'a100:1'",
        ),
        (
            {"time": "0:01:00", "grace_seconds": 60},
            "grace_seconds must be less than time (0:01:00), got 60",
        ),
        ({"grace_seconds": 70000}, "grace_seconds: must be between 1 and 65535, got 70000"),
        (
            {"env": ["HF_TOKEN=hf_secret"]},
            "env: names of variables only, got 'HF_TOKEN=…'; a value stays in the environment you"
            " submit from, or in `setup`",
        ),
        (
            {"flags": ["--array=1-3"]},
            "flags: --array is not yours to give here; baton sets it itself",
        ),
        ({"flags": ["--mem=3G"]}, "flags: --mem is not yours to give here; use memory_gb"),
        ({"flags": ["-p gpu"]}, "flags: expected --name or --name=value, got '-p gpu'"),
        ({"flags": ["--nice", "--nice=3"]}, "flags: --nice stands there twice"),
        (
            {"mounts": ["data:/data"]},
            "mounts: expected /host, /host:/container or /host:/container:ro, got 'data:/data'",
        ),
        ({"runtime": "apptainer"}, "runtime apptainer needs an image"),
        ({"image": "x.sif"}, "image 'x.sif' needs a runtime such as apptainer, got none"),
        (
            {"runtime": "docker", "image": "x", "venv": "v"},
            "venv is for runtime none; with docker the image has python",
        ),
        (
            {"stages": {"eval": {"gpu": "h100"}}},
            "stages.eval: gpu must be one of gpu_types (a100, four, any), got 'h100'",
        ),
        (
            {"requeue": "always"},
            "requeue: expected one of 'auto', 'resubmit', 'never', got the text 'always'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_with_what_was_found(
    changes: dict[str, Any], said: str
) -> None:
    assert problem(**changes) == said


def test_extra_flags_come_by_name() -> None:
    assert site(flags=["--nice=100", "--contiguous"]).flag_values() == {
        "nice": "100",
        "contiguous": True,
    }
