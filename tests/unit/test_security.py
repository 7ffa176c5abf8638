"""Nothing from a store, a file or the Hub is executed, and no name leaves its folder."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import baton
from baton.config.decode import decode
from baton.errors import ConfigError, DamagedError, StoreError
from baton.record import FileEntry, Manifest
from baton.store.base import check_name
from baton.store.checkpoint import Checkpoints
from baton.store.local import LocalStore
from baton.train.config import HubModel, PathModel

SOURCE = Path(baton.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Calls that execute what they read.
REFUSED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "pickle.load",
    "pickle.loads",
    "joblib.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "marshal.loads",
    "shelve.open",
}
REFUSED_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def test_no_source_file_calls_what_executes_data() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{call.lineno}: {ast.unparse(call)[:80]}"
        for path in FILES
        for call in calls(path)
        if ast.unparse(call.func) in REFUSED
    ]
    assert found == []


def test_no_source_file_imports_a_pickler() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & REFUSED_MODULES, f"{path.name}:{node.lineno}"


def test_no_process_is_started_through_a_shell() -> None:
    for path in FILES:
        for call in calls(path):
            shell = [word.value for word in call.keywords if word.arg == "shell"]
            assert not shell, f"{path.name}:{call.lineno}"


def test_remote_code_is_trusted_only_where_an_experiment_says_so() -> None:
    for kind in (HubModel, PathModel):
        [field] = [f for f in dataclasses.fields(kind) if f.name == "trust_remote_code"]
        assert field.default is False
    for path in FILES:
        for call in calls(path):
            for word in call.keywords:
                assert word.arg != "trust_remote_code", f"{path.name}:{call.lineno}"


def test_remote_code_is_passed_on_only_when_asked_for(tmp_path: Path) -> None:
    from baton.train.base import locate

    def options(trust: bool) -> dict[str, object]:
        model = HubModel(source="huggingface", name="a/b", trust_remote_code=trust)
        return locate(model, base_folder=tmp_path, revision="abc")[1]

    assert options(False) == {"revision": "abc"}
    assert options(True) == {"revision": "abc", "trust_remote_code": True}


@pytest.mark.parametrize("value", ["yes", 1, "true", None])
def test_trusting_remote_code_takes_a_plain_true(value: object) -> None:
    data = {"source": "huggingface", "name": "a/b", "trust_remote_code": value}
    with pytest.raises(ConfigError):
        decode(HubModel, data)


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def checkpoints(root: Path) -> Checkpoints:
    return Checkpoints(LocalStore(root), "c", 1, lambda: None, lambda: "now")


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """A checkpoint of step 5 and one of step 10."""
    found = checkpoints(tmp_path / "store")
    for step in (5, 10):
        folder = tmp_path / f"made-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights of step %d" % step)
        found.save(step, folder)
    return found


def replace_file(path: Path, data: bytes) -> None:
    # A checkpoint's files may be hard links; a saboteur replaces the name, not the bytes.
    path.unlink()
    path.write_bytes(data)


def test_a_pickle_in_the_place_of_weights_is_found_and_never_opened(
    saved: Checkpoints, tmp_path: Path
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    replace_file(tmp_path / "store" / "c" / "step-000010" / "model.safetensors", bomb)
    with pytest.raises(DamagedError) as caught:
        saved.fetch(10, tmp_path / "target")
    assert str(caught.value) == (
        f"step-000010: model.safetensors is {len(bomb):,} bytes, manifest says 18"
    )
    manifest = saved.fetch_newest_verified(tmp_path / "target")
    assert manifest is not None
    assert manifest.step == 5
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_with_a_manifest_of_its_own_is_still_not_unpickled(tmp_path: Path) -> None:
    import torch

    from baton.train.state import FullWeights

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        FullWeights(torch.nn.Linear(1, 1)).load(tmp_path)
    assert not (tmp_path / "exploded").exists()


OUTSIDE = [
    "../x",
    "a/../../x",
    "/etc/x",
    "..",
    ".",
    "",
    "a//b",
    "a/./b",
    "a\\..\\x",
    "C:x",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "x" * 201,
    "a/",
    "/",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(StoreError):
        check_name(name)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_crafted_manifest_cannot_write_outside_of_the_target(
    saved: Checkpoints, tmp_path: Path, name: str
) -> None:
    (tmp_path / "store" / "c" / "x").write_bytes(b"evil")
    entry = FileEntry(name=name, size=4, sha256="0" * 64)
    manifest = Manifest(step=10, leg=1, created="now", files=[entry])
    path = tmp_path / "store" / "c" / "step-000010" / "manifest.json"
    replace_file(path, manifest.to_json())
    before = {p for p in tmp_path.rglob("*") if "target" not in p.parts}
    with pytest.raises(StoreError):
        saved.fetch(10, tmp_path / "deep" / "target")
    assert {p for p in tmp_path.rglob("*") if "target" not in p.parts} - before <= {
        tmp_path / "deep"
    }


def test_a_crafted_manifest_does_not_keep_a_run_from_its_older_checkpoint(
    saved: Checkpoints, tmp_path: Path
) -> None:
    manifest = Manifest(
        step=10, leg=1, created="now", files=[FileEntry(name="../x", size=1, sha256="0" * 64)]
    )
    replace_file(tmp_path / "store" / "c" / "step-000010" / "manifest.json", manifest.to_json())
    found = saved.fetch_newest_verified(tmp_path / "target")
    assert found is not None
    assert found.step == 5


def test_the_manifest_of_another_step_is_not_this_checkpoints(
    saved: Checkpoints, tmp_path: Path
) -> None:
    path = tmp_path / "store" / "c" / "step-000010" / "manifest.json"
    replace_file(path, json.dumps(json.loads(path.read_bytes()) | {"step": 7}).encode())
    with pytest.raises(DamagedError):
        saved.fetch(10, tmp_path / "target")


def test_a_file_outside_cannot_be_reached_through_the_store(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    store = LocalStore(tmp_path / "store")
    with pytest.raises(StoreError):
        store.read("../secret")
    with pytest.raises(StoreError):
        store.delete("../secret")
    with pytest.raises(StoreError):
        list(store.names("../"))
    assert (tmp_path / "secret").exists()
