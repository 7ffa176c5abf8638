"""A task in containers of a real Docker engine, in jobs of the real Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from cluster import (
    JOB,
    LONG,
    REPOSITORY,
    SERVICES,
    Cluster,
    Task,
    assert_as_if_uninterrupted,
    until,
    words_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
IMAGE = "localhost/baton-of-this-machine"


def folders_of_python() -> list[str]:
    """What this interpreter needs of this machine, so that an image can be empty."""
    found = [Path(name) for name in ("/usr", "/bin", "/lib", "/lib64")]
    found += [Path(sys.prefix), Path(sys.base_prefix), REPOSITORY]
    found += [Path(name) for name in sys.path if name.endswith("site-packages")]
    return list(dict.fromkeys(str(path) for path in found if path.exists()))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of an engine's clients; the engine has one image, with nothing in it."""
    folder = tmp_path_factory.mktemp("docker")
    # Another program of the name may stand before Debian's client.
    env = {"DOCKER_HOST": f"unix://{folder}/d.sock", "PATH": f"/usr/bin:{os.environ['PATH']}"}
    try:
        run([str(SERVICES / "docker_up.sh"), str(folder)], env)
        start = f'ENTRYPOINT ["{sys.executable}", "-m", "baton"]'
        (folder / "empty").mkdir()
        tar = subprocess.run(
            ["tar", "-C", folder / "empty", "-c", "."], capture_output=True, check=True
        )
        source = f"ENV PYTHONPATH={REPOSITORY / 'src'}"
        run(["docker", "import", "-c", start, "-c", source, "-", IMAGE], env, given=tar.stdout)
        yield env
    finally:
        run([str(SERVICES / "docker_down.sh"), str(folder)], env)


def run(words: list[str], env: Mapping[str, str], given: bytes | None = None) -> None:
    ended = subprocess.run(words, env=os.environ | env, input=given, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()


def client_of(name: str) -> int:
    """The process of `docker run --name NAME`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[:2] == [b"docker", b"run"] and name.encode() in words:
            return int(path.parent.name)
    return 0


def test_a_task_in_containers_hands_over_and_outlives_a_lost_client(
    slurm: Cluster, tmp_path: Path, reference: Callable[..., Task], engine: Mapping[str, str]
) -> None:
    slurm.configure(requeue_exit=False)
    mounts = " ".join(f"{folder}:{folder}:ro" for folder in folders_of_python())
    settings = {
        "BATON_STORE": str(tmp_path),
        "BATON_RUNTIME": "docker",
        "BATON_IMAGE": IMAGE,
        "BATON_MOUNTS": mounts,
    }
    words = (JOB, "smoke/medical_qa/lora_long", *words_of(LONG))
    job = slurm.sbatch("--nodelist=n1", *words, env={**engine, **settings})
    task = Task(tmp_path, "lora_long")
    task.wait_for_step(30)
    with slurm.held(job):
        slurm("scancel", "--batch", "--signal=USR2", job.number)
        until(lambda: " signal=USR2" in task.log, "the signal")
    step = task.step
    task.wait_for_step(step + 40)
    with slurm.held(job):
        # The engine does not stop a container whose client is gone.
        os.kill(client_of(f"baton-{job.number}-0"), signal.SIGKILL)
        until(lambda: job.restarts == 2, "the requeue")
    assert job.wait() == "COMPLETED"
    assert job.legs() == ["REQUEUED", "REQUEUED", "COMPLETED"]
    assert_as_if_uninterrupted(task, reference(), legs=3)
    legs = task.legs()
    assert [leg["state"] for leg in legs] == ["handed_over", "lost", "finished"]
    here = os.readlink("/proc/self/ns/pid")
    assert here not in {leg["runner"]["pid_namespace"] for leg in legs}, "none was in a container"
