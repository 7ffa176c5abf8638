"""`docker run IMAGE …` as a person types it: short-cuts, exit statuses, signals, where bytes go."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import IMAGE, LONG, Docker, Ended, until

pytestmark = pytest.mark.slow


class Runs:
    """`docker run` with a store of the test's own."""

    def __init__(self, docker: Docker, store: Path) -> None:
        self.docker, self.store, self.names = docker, store, []
        store.mkdir()
        store.chmod(0o777)
        self.jobs = store.parent / "jobs"
        self.jobs.mkdir()
        (self.jobs / "long.yaml").write_text(
            LONG.replace("{long: 1, other: 2}", "{long: 1}"), encoding="utf-8"
        )

    def options(self) -> list[str]:
        mounts = [f"type=bind,source={self.store},target=/runs"]
        mounts.append(f"type=bind,source={self.jobs},target=/jobs,readonly")
        words = ["--network", "none", "--env", "OMP_NUM_THREADS=1"]
        return [*words, *(word for mount in mounts for word in ("--mount", mount))]

    def __call__(self, *words: str, options: tuple[str, ...] = ()) -> Ended:
        return self.docker("run", "--rm", *self.options(), *options, IMAGE, *words)

    def detached(self, name: str, *words: str) -> str:
        self.docker("rm", "--force", name)  # of a run that was cut off
        self.names.append(name)
        return self.docker.must("run", "--detach", "--name", name, *self.options(), IMAGE, *words)

    def trains(self, step: int) -> None:
        def reached() -> bool:
            for path in self.store.glob("**/progress.json"):
                progress = json.loads(path.read_bytes())
                if progress.get("stage") == "train" and progress.get("step", -1) >= step:
                    return True
            return False

        until(reached, f"step {step}")

    def wait(self, name: str) -> int:
        return int(self.docker.must("wait", name))


@pytest.fixture
def runs(docker: Docker, image: Ended, tmp_path: Path) -> Iterator[Runs]:
    made = Runs(docker, tmp_path / "runs")
    yield made
    for name in made.names:
        docker("rm", "--force", name)


def test_a_stopped_container_ends_in_75_and_the_same_line_again_in_0(runs: Runs) -> None:
    line = ("run", "/jobs/long.yaml", "--task", "long")
    runs.detached("baton-test-a", *line)
    runs.trains(60)
    # The engine sends TERM to the init alone, and KILL when the time is up.
    runs.docker.must("stop", "--time", "100", "baton-test-a")
    assert runs.wait("baton-test-a") == 75

    ended = runs(*line)
    assert ended.status == 0, ended.out + ended.err
    [folder] = runs.store.glob("**/tasks/long")
    states = [json.loads(p.read_bytes())["state"] for p in sorted(folder.glob("legs/*.json"))]
    assert states == ["handed_over", "finished"]
    assert runs(*line).status == 0, "finished already"


def test_a_killed_container_ends_in_137(runs: Runs) -> None:
    runs.detached("baton-test-b", "run", "/jobs/long.yaml")
    runs.docker.must("kill", "baton-test-b")
    assert runs.wait("baton-test-b") == 137


def test_what_cannot_work_is_78_and_other_failures_are_1(runs: Runs) -> None:
    # Somebody else's folder: said, with what to do, and worth another try.
    runs.store.chmod(0o755)
    ended = runs("run", "/jobs/long.yaml")
    assert ended.status == 1
    assert "permission denied; choose another place with --store or mend its owner" in ended.err
    runs.store.chmod(0o777)

    ended = runs("run", "/jobs/long.yaml", "--task", "nope")
    assert ended.status == 78
    assert "no task 'nope'" in ended.err
    ended = runs("medical_qa")
    assert ended.status == 78
    assert ended.err.startswith("error: run is about one task; medical_qa has: lora_20k,")


def test_a_signal_before_anything_was_imported_ends_the_container_at_once(runs: Runs) -> None:
    runs.detached("baton-test-c", "run", "/jobs/long.yaml")
    runs.docker.must("kill", "--signal", "TERM", "baton-test-c")
    # 143 where TERM came before Python could listen; 75 where it could, and saved nothing yet.
    assert runs.wait("baton-test-c") in (143, 75)


def test_a_pipeline_s_name_and_run_are_the_same_and_help_is_quick(runs: Runs) -> None:
    asked = time.monotonic()
    help = runs()
    assert help.status == 0
    assert "Containerized, preemption-safe" in help.out
    assert time.monotonic() - asked < 20
    first, second = runs("medical_qa"), runs("run", "medical_qa")
    assert (first.status, first.err) == (second.status, second.err)
    assert "run is about one task; medical_qa has: lora_20k" in first.err
    assert runs("nope").status == 2


def test_any_user_a_read_only_system_and_no_network_are_enough(runs: Runs) -> None:
    options = ("--user", "4242:4242", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
    ended = runs("run", "/jobs/long.yaml", "--set", "train.max_steps=3", options=options)
    assert ended.status == 0, ended.out[-2000:] + ended.err
    [folder] = runs.store.glob("**/tasks/long")
    [leg] = folder.glob("legs/*.json")
    assert leg.stat().st_uid == 4242
    assert "commit" in json.loads(leg.read_bytes())["environment"]


def test_two_processes_in_one_container_agree_and_hand_over_together(runs: Runs) -> None:
    line = ("run", "/jobs/long.yaml", "--processes", "2")
    runs.detached("baton-test-d", *line)
    runs.trains(20)
    runs.docker.must("stop", "--time", "60", "baton-test-d")
    assert runs.wait("baton-test-d") == 75
    [folder] = runs.store.glob("**/tasks/long")
    [leg] = [json.loads(path.read_bytes()) for path in folder.glob("legs/*.json")]
    assert leg["processes"] == 2
    assert leg["state"] == "handed_over"
    assert leg["durable_step"] >= 20


def test_the_five_commands_of_the_manual_with_volumes(runs: Runs, tmp_path: Path) -> None:
    """docs/containers.md, with a smoke experiment, on volumes that nobody has prepared."""
    docker, volume = runs.docker, "baton-test-manual"
    common = ("run", "--rm", "--network", "none", "--volume", f"{volume}:/runs")
    experiment = ("--volume", f"{runs.jobs}:/jobs:ro", "--volume", "baton-test-caches:/cache")
    try:
        ended = docker(*common, *experiment, IMAGE, "run", "/jobs/long.yaml", "--task", "long",
                       "--set", "train.max_steps=3")  # fmt: skip
        assert ended.status == 0, ended.out[-2000:] + ended.err
        assert "lies in this container" not in ended.out
        ended = docker(*common, *experiment, IMAGE, "collect", "/jobs/long.yaml", "--set",
                       "train.max_steps=3", "--out", "/runs/results")  # fmt: skip
        assert ended.status == 0, ended.err
        listed = docker(*common, "--entrypoint", "sh", IMAGE, "-c",
                        "tar -C /runs/results -cz . | tar -tz")  # fmt: skip
        assert "./report.html" in listed.out.splitlines()
    finally:
        docker("volume", "rm", volume, "baton-test-caches")


def test_a_store_that_goes_with_its_container_is_said(docker: Docker, image: Ended) -> None:
    line = ("run", "smoke/medical_qa/lora_20k", "--stage", "data")
    ended = docker("run", "--rm", "--network", "none", IMAGE, *line)
    assert ended.status == 0, ended.out
    assert "the store /runs lies in this container and goes with it" in ended.out
