"""What torch compiled in one leg is used by the next one, on a machine that never compiled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.train.compiled import SWITCH, CompiledCode

LEG = Path(__file__).parent / "compiling_leg.py"
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="needs a C++ compiler"
)


def run_leg(task: Path, model: Path, cache: Path, switch: str = "1") -> tuple[dict, str]:
    """A leg on a machine whose compile caches are in `cache`; what it says, and its log."""
    environment = os.environ | {
        SWITCH: switch,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        # Trying out which vector instructions work takes a minute, and is no part of this.
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [sys.executable, str(LEG), str(task), str(model)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@pytest.mark.slow
@needs_compiler
def test_a_leg_with_empty_caches_compiles_nothing_that_an_earlier_one_did(tiny, tmp_path):
    model = tiny("llama").folder
    first, log = run_leg(tmp_path / "first", model, tmp_path / "here")
    assert first["misses"] > 0
    assert first["hits"] == 0
    assert "compiled_code_kept" in log
    # Only what compiled travels, to a machine with caches of its own.
    kept = tmp_path / "first" / "compiled"
    shutil.copytree(kept, tmp_path / "second" / "compiled")
    before = [path.stat().st_mtime_ns for path in kept.iterdir()]
    second, log = run_leg(tmp_path / "second", model, tmp_path / "there")
    assert second["hits"] == first["misses"]
    assert second["misses"] == 0
    assert "compiled_code_loaded" in log
    # It added nothing, so it wrote nothing.
    assert "compiled_code_kept" not in log
    assert before == [path.stat().st_mtime_ns for path in kept.iterdir()]
    losses = [
        (tmp_path / name / "train/metrics.jsonl").read_bytes() for name in ("first", "second")
    ]
    assert losses[0] == losses[1]


def kept_by(run, artifacts: bytes, *, digest: bytes | None = None) -> CompiledCode:
    code = CompiledCode(leg=run.leg(), device=CPU)
    digest = hashlib.sha256(artifacts).digest() if digest is None else digest
    code.leg.store.write(code.name, digest + artifacts)
    return code


@pytest.mark.parametrize(
    ("artifacts", "digest", "says"),
    [
        (b"bytes", b"\0" * 32, "is damaged: compiling anew"),
        (b"", b"", "is damaged: compiling anew"),
        (b"of another torch", None, "is not understood by this torch: compiling anew"),
    ],
    ids=["flipped", "emptied", "unreadable"],
)
def test_what_cannot_be_loaded_is_named_and_compiled(
    task, caplog, monkeypatch, artifacts, digest, says
):
    monkeypatch.setenv(SWITCH, "1")
    kept_by(task(), artifacts, digest=digest).load()
    assert caplog.text.count(says) == 1


def test_nothing_is_loaded_unless_a_person_allows_it(task, caplog, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    kept_by(task(), b"bytes", digest=b"\0" * 32).load()
    assert not caplog.text


def test_a_run_that_compiles_nothing_keeps_nothing(task, settings, drawn, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    run = task()
    run.loop(settings(max_steps=3), drawn(8)).run()
    assert not (run.root / "compiled").exists()
