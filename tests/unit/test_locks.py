"""The locks of `images/`: whole, hashed, and of one mind with pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = ("torch.lock", "requirements.lock")
EVERY = (*RUNTIME, "torch-cpu.lock", "dev.lock", "cuda.lock", "vllm.lock")


def pins(*locks: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for lock in locks:
        text = (REPOSITORY / "images" / lock).read_text(encoding="utf-8")
        found |= dict(re.findall(r"^([^\s#=]+)==(\S+)", text, re.MULTILINE))
    return found


@pytest.mark.parametrize("lock", EVERY)
def test_every_pin_has_a_hash_and_stands_once(lock: str) -> None:
    text = (REPOSITORY / "images" / lock).read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=\S)", "\n".join(text.splitlines()[1:]))
    names = [block.split("==")[0] for block in blocks]
    assert len(names) == len(set(names))
    for block in blocks:
        first, *hashes = block.split(" \\\n    ")
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][^\s=]*", first), first
        assert hashes, first
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}\n?", h) for h in hashes), first


@pytest.mark.parametrize(
    ("wanted", "locks"),
    [
        (PROJECT["dependencies"], RUNTIME),
        (PROJECT["optional-dependencies"]["dev"], (*RUNTIME, "dev.lock")),
        (PROJECT["dependencies"], (*RUNTIME, "cuda.lock", "vllm.lock")),
    ],
    ids=["images", "development", "vllm"],
)
def test_what_pyproject_asks_for_is_locked_within_its_range(
    wanted: list[str], locks: tuple[str, ...]
) -> None:
    locked = pins(*locks)
    for text in wanted:
        needed = Requirement(text)
        name = canonicalize_name(needed.name)
        assert name in locked, f"{name} is in no lock: make lock"
        assert needed.specifier.contains(locked[name], prereleases=True), f"{text}: {locked[name]}"


def test_a_version_is_decided_in_one_place() -> None:
    assert pins("torch-cpu.lock")["torch"] == pins("torch.lock")["torch"] + "+cpu"
    assert pins("torch-cpu.lock")["setuptools"] == pins("torch.lock")["setuptools"]
    pairs = [("torch", "requirements"), ("requirements", "dev"), ("requirements", "cuda")]
    for first, second in (*pairs, ("torch", "dev")):
        both = pins(f"{first}.lock").keys() & pins(f"{second}.lock").keys()
        assert not both, (first, second)
    # vllm.lock has only what differs.
    mine = pins("torch.lock", "requirements.lock", "cuda.lock")
    assert not {n for n, v in pins("vllm.lock").items() if mine.get(n) == v}
