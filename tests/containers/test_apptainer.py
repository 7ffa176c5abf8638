"""Apptainer has no package here: its command line, and what the definition says, on a stand-in.

The stand-in does what Apptainer does with a definition: the image's files, read-only; the host's
user and home; `%environment`, then `%runscript` with the words. What it runs is the real image.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import IMAGE, REPOSITORY, Docker, Ended, assert_same

pytestmark = pytest.mark.slow
DEFINITION = REPOSITORY / "images" / "apptainer.def"
SMOKE = "smoke/medical_qa/lora_20k"
STAND_IN = """\
#!/bin/bash
# apptainer run [--nv] [--bind SOURCE:TARGET]… SIF WORDS…
set -eu
[ "$1" = run ] || {{ echo "unexpected: $*" >&2; exit 255; }}
shift
mounts=()
while true; do
  case $1 in
    --nv) shift ;;
    --bind) mounts+=(--volume "$2"); shift 2 ;;
    --*) echo "unknown option $1" >&2; exit 255 ;;
    *) break ;;
  esac
done
[ "$1" = baton.sif ] || {{ echo "no such file: $1" >&2; exit 255; }}
shift
exec docker run --rm --network host --read-only --tmpfs /tmp --user {user} \\
  --volume {home}:{home} --env HOME={home} --env OMP_NUM_THREADS=1 "${{mounts[@]}}" \\
  --entrypoint sh {image} -c {script} apptainer "$@"
"""


def sections() -> dict[str, str]:
    text = DEFINITION.read_text(encoding="utf-8")
    header, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return {"header": header} | dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_definition_has_what_apptainer_asks_for() -> None:
    found = sections()
    lines = [line for line in found["header"].splitlines() if line and not line.startswith("#")]
    assert lines == ["Bootstrap: docker", "From: {{ from }}"]
    assert found["arguments"].strip() == "from=baton:latest"
    assert {"labels", "environment", "runscript", "test", "help"} <= found.keys()


def test_the_smoke_task_by_apptainer_s_command_line_gives_the_same_bytes(
    docker: Docker, image: Ended, reference: Callable[[str], Path], tmp_path: Path
) -> None:
    home, store = tmp_path / "home", tmp_path / "runs"
    for folder in (home, store):
        folder.mkdir()
        os.chown(folder, 4242, 4242)
    script = tmp_path / "script.sh"
    script.write_text(f"{sections()['environment']}\n{sections()['runscript']}", encoding="utf-8")
    stand_in = tmp_path / "apptainer"
    stand_in.write_text(
        STAND_IN.format(user="4242:4242", home=home, image=IMAGE, script=f'"$(cat {script})"'),
        encoding="utf-8",
    )
    stand_in.chmod(0o755)
    # The line of docs/containers.md.
    words = ["run", "--nv", "--bind", f"{store}:/runs", "baton.sif", "run", SMOKE]
    ended = subprocess.run(
        [str(stand_in), *words, "--store", "/runs"],
        env=docker.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
    [folder] = store.glob("**/tasks/lora_20k")
    assert_same(folder, reference(SMOKE))


def test_caches_go_home_where_the_image_cannot_be_written(docker: Docker, image: Ended) -> None:
    gpu = ("--env", "TORCHINDUCTOR_CACHE_DIR=/cache/inductor", "--env", "TRITON_CACHE_DIR=/cache/t")
    words = ("run", "--rm", "--network", "none", "--read-only", *gpu, "--env", "HOME=/home/me")
    script = f"{sections()['environment']}\nenv"

    def environment(*more: str) -> dict[str, str]:
        said = docker.must(*words, *more, "--entrypoint", "sh", IMAGE, "-c", script)
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    found = environment()
    names = ("HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
    assert all(found[name].startswith("/home/me/.cache") for name in names)
    assert found["TRITON_CACHE_DIR"] == "/home/me/.cache/triton"
    # What the host names stays as it is, and so does everything where /cache is bound.
    assert environment("--env", "HF_HOME=/scratch/hf")["HF_HOME"] == "/scratch/hf"
    assert environment("--tmpfs", "/cache")["HF_HOME"] == "/cache/huggingface"
