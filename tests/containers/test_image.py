"""The images themselves: what is in them, what is not, and how quickly they follow a change."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from engine import CANARY, IMAGE, REPOSITORY, Docker, Ended, run

pytestmark = pytest.mark.slow


def pins(lock: str) -> dict[str, str]:
    text = (REPOSITORY / "images" / lock).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))


def checkout(place: Path) -> Path:
    """The repository's files as they are now, and the wheels that lie ready."""
    listed = run(["git", "-C", str(REPOSITORY), "ls-files", "-co", "--exclude-standard"]).out
    for name in [*listed.splitlines(), *_wheels()]:
        if (REPOSITORY / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, place / name)
    git = ["git", "-C", str(place), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "As it is"]):
        assert run([*git, *words]).status == 0
    return place


def _wheels() -> list[str]:
    return [f"images/wheels/{p.name}" for p in (REPOSITORY / "images" / "wheels").glob("*.whl")]


def test_dockerfiles_are_clean() -> None:
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    ended = run([str(hadolint), "Dockerfile.cuda", "images/cpu.Dockerfile"])
    assert ended.status == 0, ended.out


def test_image_check_has_nothing_to_mend(docker: Docker, image: Ended) -> None:
    ended = docker.check(IMAGE)
    assert ended.status == 0, ended.out + ended.err
    assert "mend" not in ended.out
    assert ended.out.count("ok ") == 10


def test_image_check_finds_tokens_weights_and_root(
    docker: Docker, image: Ended, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM {IMAGE}\nUSER 0\nENV HF_TOKEN={CANARY}\n"
        "RUN head -c 2000000 /dev/zero > /opt/baton/adapter.safetensors\n"
        f"RUN echo {CANARY} > /home/baton/notes.txt\n",
        encoding="utf-8",
    )
    docker.must("build", "--quiet", "--network", "none", "--tag", "baton:bad", str(tmp_path))
    ended = docker.check("baton:bad")
    assert ended.status == 1
    assert "mend  user: runs as root" in ended.out
    assert "mend  secrets: settings or history" in ended.out
    assert "weights or data: /opt/baton/adapter.safetensors 2000000" in ended.out
    assert "token: /home/baton/notes.txt" in ended.out


def test_the_pip_configuration_of_the_build_is_not_in_the_image(
    docker: Docker, image: Ended
) -> None:
    assert CANARY not in docker.must("history", "--no-trunc", IMAGE)
    look = (
        f"! grep -rlsF {CANARY} /etc /opt/baton /root /home /tmp /cache && [ ! -s /etc/pip.conf ]"
    )
    words = ("run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh", IMAGE)
    docker.must(*words, "-c", look)


def test_what_is_installed_is_what_the_locks_say(docker: Docker, image: Ended) -> None:
    script = (
        "import importlib.metadata as m;"
        "print(*(f'{d.name.lower()}=={d.version}' for d in m.distributions()), sep='\\n')"
    )
    words = ("run", "--rm", "--network", "none", "--entrypoint", "python", IMAGE, "-c", script)
    found = dict(line.split("==") for line in docker.must(*words).splitlines())
    found = {re.sub("[._]", "-", name): version for name, version in found.items()}
    assert found.pop("baton-jobs")
    assert found.pop("pip")
    assert found == pins("torch-cpu.lock") | pins("requirements.lock")


def test_a_change_in_the_source_rebuilds_the_last_layers_alone(
    docker: Docker, image: Ended, torch_wheel: str, tmp_path: Path
) -> None:
    tree = checkout(tmp_path)
    source = tree / "src" / "baton" / "errors.py"
    source.write_text(source.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    began = time.monotonic()
    index = f"--build-arg TORCH_INDEX={torch_wheel}"
    built = docker.make("image-cpu", index, folder=tree, IMAGE="baton-changed")
    seconds = time.monotonic() - began
    assert built.status == 0, built.err[-2000:]
    steps = _steps(built.err)
    again = [text for text, how in steps.items() if how != "CACHED" and "pip install" in text]
    assert all("/dist/*.whl" in text for text in again), again
    assert seconds < 60, f"{seconds:.0f} s"
    assert docker("run", "--rm", "--network", "none", "baton-changed:cpu", "--version").status == 0


def test_the_cuda_image_s_steps_run_on_a_base_without_cuda(
    docker: Docker, image: Ended, tmp_path: Path
) -> None:
    """Every step is executed; what is exchanged is torch's build and its gigabytes of CUDA."""
    tree = checkout(tmp_path)
    images = tree / "images"
    if _wheels():
        (images / "torch.lock").write_bytes((images / "torch-cpu.lock").read_bytes())
        small = (images / "cuda.lock").read_text(encoding="utf-8").split("\n")
        start = next(i for i, line in enumerate(small) if line.startswith("nvidia-nvtx=="))
        end = next(i for i in range(start, len(small)) if not small[i].endswith("\\"))
        (images / "cuda.lock").write_text("\n".join(small[start : end + 1]), encoding="utf-8")
    built = docker.make("image", folder=tree, IMAGE="baton-gpu")
    assert built.status == 0, built.err[-3000:]
    steps = _steps(built.err)
    assert sum("pip install" in text for text in steps) == 3
    assert not any("vllm" in text for text in steps), "an optional engine is not in the default"
    ended = docker.check("baton-gpu")
    assert ended.status == 0, ended.out
    assert docker("run", "--rm", "--network", "none", "baton-gpu", "--version").status == 0
    # What torch.compile calls: a C compiler and Python's headers.
    compiled = "printf '#include <Python.h>\\nint main(void){return 0;}' | gcc -x c -o /tmp/a - "
    compiled += "$(python3-config --includes) && /tmp/a"
    words = ("run", "--rm", "--network", "none", "--entrypoint", "sh", "baton-gpu")
    docker.must(*words, "-c", compiled)


def _steps(log: str) -> dict[str, str]:
    """Each build step's command, and how it ended: DONE or CACHED."""
    named = dict(re.findall(r"^#(\d+) \[[^\]]*\d+/\d+\] (.*)$", log, re.MULTILINE))
    ended = dict(re.findall(r"^#(\d+) (DONE|CACHED)", log, re.MULTILINE))
    return {text: ended.get(number, "") for number, text in named.items()}
