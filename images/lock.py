"""Write the locks: what this environment has, with the hash of every file that may be installed.

    make lock            after `pip install …` has changed the environment and the tests passed

`torch.lock`         torch, and what builds the few packages that come as source
`torch-cpu.lock`     the same with torch's small build, which another index has
`requirements.lock`  everything else that baton needs to run
`dev.lock`           what its developers need besides
`cuda.lock`          what the CUDA build of torch needs besides
`vllm.lock`          what vLLM needs besides, or in another version; x86_64 and Python 3.12 only

A version is decided in one place, what is installed here; only what CUDA and vLLM need is asked of
the index, since a machine without a GPU may have torch's small build. Hashes cover Linux on x86_64
and aarch64 and the Pythons below; a file that is not among them is refused by pip.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

HERE = Path(__file__).parent
INDEX = "https://pypi.org/simple"
# The small build of torch has the same version and another index, without JSON.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The newest that takes our torch.
VLLM = "vllm==0.32.0"
PYTHONS = ((3, 11), (3, 12))
# The C libraries of the images and of the oldest clusters lie within.
GLIBC = range(5, 40)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def main() -> None:
    torch = {"torch", "setuptools"}
    runtime = closure("baton-jobs", extras=()) - {"baton-jobs"}
    dev = closure("baton-jobs", extras=("dev",)) - {"baton-jobs"} - runtime
    pin = installed({"torch"})
    cuda = {n: v for n, v in resolved(f"torch=={pin['torch']}", pin).items() if n not in runtime}
    dev -= set(cuda)
    runtime -= set(cuda)
    image = installed(runtime) | cuda
    vllm = {n: v for n, v in resolved(VLLM, pin | cuda).items() if image.get(n) != v}
    write("torch.lock", "torch, and what builds packages from source", installed(torch))
    write_cpu_torch(installed(torch))
    write("requirements.lock", "What baton needs to run besides torch", installed(runtime - torch))
    write("dev.lock", "What developing baton needs besides", installed(dev - torch))
    write("cuda.lock", "What the CUDA build of torch needs besides", cuda)
    write("vllm.lock", "What vLLM needs besides, or in another version", vllm, PYTHONS[-1:])


def closure(name: str, extras: Iterable[str]) -> set[str]:
    """Canonical names of an installed package and of all that it needs, itself included."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found.add(name)
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), e) for e in ("", *needed.extras)]
    return found


def installed(names: Iterable[str]) -> dict[str, str]:
    """The public version of each; `2.13.0+cpu` is a build of 2.13.0."""
    return {name: Version(metadata.version(name)).public for name in names}


def resolved(requirement: str, pins: dict[str, str]) -> dict[str, str]:
    """What a GPU machine of the newest Python here needs for it, given the pins.

    By uv: pip would take the markers of the Python it runs on.
    """
    if shutil.which("uv") is None:
        raise SystemExit("there is no uv on this machine's path: pip install uv, anywhere")
    major, minor = PYTHONS[-1]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
        pinned.write("".join(f"{name}=={version}\n" for name, version in pins.items()))
        pinned.flush()
        words = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-config"]
        words += ["--index-url", INDEX, "--constraint", pinned.name]
        words += ["--python-version", f"{major}.{minor}"]
        words += ["--python-platform", "x86_64-manylinux_2_39", "-"]
        said = subprocess.run(words, input=requirement, capture_output=True, text=True, check=False)
    if said.returncode:
        raise SystemExit(f"{requirement}: {said.stderr}")
    found = (line.split(" ")[0].split("==") for line in said.stdout.splitlines() if "==" in line)
    return {canonicalize_name(name.partition("[")[0]): version for name, version in found}


def platforms(machine: str) -> list[str]:
    legacy = [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")]
    return [f"manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)] + legacy


def supported_tags(machine: str, python: tuple[int, int]) -> set[Tag]:
    where = [*platforms(machine), f"linux_{machine}"]
    tags = {*cpython_tags(python, platforms=where)}
    return tags | {*compatible_tags(python, f"cp{python[0]}{python[1]}", platforms=where)}


def write(
    file: str, about: str, pins: dict[str, str], pythons: Sequence[tuple[int, int]] = PYTHONS
) -> None:
    """Write a lock of these versions, with hashes from the index."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pin: hashes_of(pin[0], pin[1], pythons), pins.items()))
    named = (f"{name}=={version}" for name, version in pins.items())
    write_lock(file, about, dict(zip(named, found, strict=True)))


def write_lock(file: str, about: str, hashes: dict[str, set[str]]) -> None:
    lines = [f"# {about}. Linux; written by `make lock`."]
    for pin in sorted(hashes):
        words = [pin, *(f"--hash=sha256:{sha}" for sha in sorted(hashes[pin]))]
        lines.append(" \\\n    ".join(words))
    (HERE / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file}: {len(hashes)} packages")


def write_cpu_torch(pins: dict[str, str]) -> None:
    """As torch.lock; where the other index is out of reach, the hashes we had for it stay."""
    file, pin = "torch-cpu.lock", f"torch=={pins['torch']}+cpu"
    found = cpu_hashes(pins["torch"]) or hashes_in(HERE / file).get(pin)
    if not found:
        raise LookupError(f"{CPU_INDEX} has no {pin} for the Pythons here")
    others = {f"{n}=={v}": hashes_of(n, v) for n, v in pins.items() if n != "torch"}
    write_lock(file, "torch.lock with torch's build for CPUs", {pin: found, **others})


def hashes_of(name: str, version: str, pythons: Sequence[tuple[int, int]] = PYTHONS) -> set[str]:
    """The hashes of a version's wheels for our platforms, or of its source where it has none.

    Raises:
        LookupError: one of the Pythons on x86_64 would find nothing to install.
    """
    request = urllib.request.Request(
        f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    wheels = {file["hashes"]["sha256"]: tags for file, tags in wheels_of(files, Version(version))}
    chosen: set[str] = set()
    for machine in ("x86_64", "aarch64"):
        for python in pythons:
            tags = supported_tags(machine, python)
            fitting = {sha for sha, offered in wheels.items() if tags & offered}
            fitting |= set() if fitting else sources_of(files, Version(version))
            if not fitting and machine == "x86_64":
                raise LookupError(f"{name} {version}: no file for Python {python[0]}.{python[1]}")
            chosen |= fitting
    return chosen


def wheels_of(
    files: list[dict[str, Any]], version: Version
) -> Iterator[tuple[dict[str, Any], frozenset[Tag]]]:
    for file in files:
        # Old releases have names that today's rules do not allow.
        with contextlib.suppress(InvalidWheelFilename):
            _, found, _, tags = parse_wheel_filename(file["filename"])
            if found == version and not file.get("yanked"):
                yield file, tags


def sources_of(files: list[dict[str, Any]], version: Version) -> set[str]:
    found = set()
    for file in files:
        with contextlib.suppress(InvalidSdistFilename):
            if parse_sdist_filename(file["filename"])[1] == version and not file.get("yanked"):
                found.add(file["hashes"]["sha256"])
    return found


def cpu_hashes(version: str) -> set[str]:
    """Hashes of torch's CPU build; empty, and the ones we had stay, where its index is away."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=20) as answer:
            page = answer.read().decode()
    except urllib.error.URLError as error:
        print(f"{CPU_INDEX} does not answer ({error.reason}); its hashes stay as they are")
        return set()
    pythons = "|".join(f"cp{major}{minor}" for major, minor in PYTHONS)
    name = rf"torch-{re.escape(version)}(?:%2B|\+)cpu-(?:{pythons})-[^#\"]*manylinux[^#\"]*\.whl"
    return set(re.findall(rf"{name}#sha256=([0-9a-f]{{64}})", page))


def hashes_in(path: Path) -> dict[str, set[str]]:
    """The hashes of each pin of a lock, as far as there is one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    blocks = re.split(r"\n(?=\S)", text)
    return {block.split()[0]: set(_HASH.findall(block)) for block in blocks if "==" in block}


if __name__ == "__main__":
    main()
