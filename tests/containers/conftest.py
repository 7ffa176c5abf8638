"""One real Docker engine for all tests, the CPU image in it, and the run they are compared with."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# With --import-mode=importlib the tests' own folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))

from engine import CANARY, REPOSITORY, Docker, Ended, NotInstalled, Project, run


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Fails, rather than skips, where Docker is not installed: these tests have no substitute.

    With BATON_TEST_DOCKER=DIR the engine stays up in DIR, and the next run begins in seconds; end
    it with `tests/services/docker_down.sh DIR --remove`.
    """
    if kept := os.environ.get("BATON_TEST_DOCKER"):
        started = Docker(Path(kept))
        if started("version").status != 0:
            started.start()
        yield started
        return
    # A socket's path may have 108 characters.
    started = Docker(tmp_path_factory.mktemp("d") / "e")
    try:
        started.start()
    except NotInstalled as error:
        started.stop()
        pytest.fail(str(error), pytrace=False)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def torch_wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """torch's build for CPUs as this machine's own pip finds it, laid where builds look for it.

    Nothing to do where there is none with this machine's Python: then the build asks the index.
    """
    wheels = REPOSITORY / "images" / "wheels"
    if not list(wheels.glob("torch-*.whl")):
        lock = REPOSITORY / "images" / "torch-cpu.lock"
        place = tmp_path_factory.mktemp("wheels")
        words = ["download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(place)]
        words += ["--python-version", "3.11", "--only-binary=:all:", "--requirement", str(lock)]
        ended = run([sys.executable, "-m", "pip", *words])
        if ended.status == 0:
            [wheel] = place.glob("torch-*.whl")
            shutil.copyfile(wheel, wheels / wheel.name)
    return "" if list(wheels.glob("torch-*.whl")) else "https://download.pytorch.org/whl/cpu"


@pytest.fixture(scope="session")
def image(docker: Docker, torch_wheel: str, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The CPU image, built from this repository as `make image-cpu` builds it."""
    conf = tmp_path_factory.mktemp("pip") / "pip.conf"
    conf.write_text(f"[global]\ntimeout = 180\n# {CANARY}\n", encoding="utf-8")
    index = f"--build-arg TORCH_INDEX={torch_wheel}"
    built = docker.make("image-cpu", index, PIP_CONF=str(conf))
    assert built.status == 0, built.err[-3000:]
    return built


@pytest.fixture
def project(docker: Docker, image: Ended, tmp_path: Path) -> Iterator[Project]:
    """A project whose site `cpu` runs the image's containers."""
    made = Project.make(docker, tmp_path)
    yield made
    made.clean_up()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, docker: Docker) -> Callable[[str], Path]:
    """A task as the virtual environment runs it, without interruption; its folder."""
    done: dict[str, Path] = {}

    def of(exp: str) -> Path:
        if exp not in done:
            project = Project.make(docker, tmp_path_factory.mktemp("reference"))
            ended = project("submit", exp, "--site", "local")
            assert ended.status == 0, ended.out + ended.err
            done[exp] = project.task(exp.rpartition("/")[2])
        return done[exp]

    return of
