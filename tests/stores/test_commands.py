"""What people do with a finished task from a machine that has nothing but the store's URL."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from far import Far
from lab import Lab, Task, differences, wait_for
from zygote import Leg

from baton.config.home import scratch_folder
from baton.store.card import CARD

EXPERIMENT = "smoke/medical_qa"


@pytest.fixture(scope="module")
def finished(lab: Lab, server: Far) -> Task:
    """A task that ended somewhere else, after a handover."""
    task = lab.task(url=server.url())
    leg = lab.start(task)
    wait_for(leg, r" step=5/10 ")
    leg.kill(signal.SIGTERM)
    assert leg.wait() == 75, leg.text[-2000:]
    lab.finish(task)
    return task


@pytest.fixture
def elsewhere(finished: Task, tmp_path: Path) -> Task:
    return replace(finished, machine=tmp_path / "elsewhere")


def baton(lab: Lab, task: Task, *words: object) -> Leg:
    """A command on the machine of `task`, told the plan's name in the store and its URL."""
    names = ("AWS_", "HF_", "BATON_HUB_")
    env = {name: value for name, value in os.environ.items() if name.startswith(names)}
    env |= {"BATON_SCRATCH": str(task.machine)}
    log = Path(tempfile.mkdtemp(dir=lab.folder, prefix="command-")) / "log.txt"
    leg = lab.zygote.start([*words, "--store", task.url], log=log, env=env)
    leg.wait()
    return leg


def plan_name(task: Task) -> str:
    digest = json.loads(task.plan.read_bytes())["digest"]
    return f"{EXPERIMENT}/{digest}/plan.json"


def test_a_trained_task_answers(lab: Lab, elsewhere: Task) -> None:
    words = ("--question", "感冒怎么办", "--greedy", "--max-new-tokens", "4", "--json")
    leg = baton(lab, elsewhere, "generate", "--task", plan_name(elsewhere), *words)
    assert leg.status == 0, leg.text
    assert json.loads(leg.text[leg.text.index("[\n") :])[0]["question"] == "感冒怎么办"


def test_a_resume_is_verified(lab: Lab, elsewhere: Task) -> None:
    leg = baton(lab, elsewhere, "verify-resume", plan_name(elsewhere))
    assert leg.status == 0, leg.text
    assert "lora_tiny: train, steps 8 to 10: bit-identical" in leg.text


def test_the_final_model_is_taken_out(lab: Lab, elsewhere: Task, tmp_path: Path) -> None:
    out = tmp_path / "model.zip"
    leg = baton(lab, elsewhere, "export", plan_name(elsewhere), "--out", out)
    assert leg.status == 0, leg.text
    whole = lab.reference(elsewhere).folder / "train" / "final" / "adapter_model.safetensors"
    with zipfile.ZipFile(out) as packed:
        assert packed.read("adapter_model.safetensors") == whole.read_bytes()


def test_results_are_collected_and_their_state_is_known(
    lab: Lab, elsewhere: Task, tmp_path: Path
) -> None:
    leg = baton(lab, elsewhere, "collect", plan_name(elsewhere), "--out", tmp_path / "results")
    assert leg.status == 0, leg.text
    assert "lora_tiny" in (tmp_path / "results" / "report.html").read_text()
    leg = baton(lab, elsewhere, "status", plan_name(elsewhere), "--json")
    [row] = json.loads(leg.text)
    assert (row["state"], row["durable_step"]) == ("finished", 10)
    leg = baton(lab, elsewhere, "run", plan_name(elsewhere))
    assert leg.status == 0, leg.text
    assert "finished already" in leg.text


def test_a_plan_that_is_not_in_the_store_is_named(lab: Lab, elsewhere: Task) -> None:
    leg = baton(lab, elsewhere, "run", f"{EXPERIMENT}/00000000/plan.json")
    assert leg.status == 78
    assert f"there is no plan {EXPERIMENT}/00000000/plan.json" in leg.text
    assert elsewhere.url in leg.text


def test_a_plan_is_known_by_the_path_it_has_on_another_machine(lab: Lab, elsewhere: Task) -> None:
    environ = {**os.environ, "BATON_SCRATCH": str(elsewhere.machine)}
    path = scratch_folder(elsewhere.url, environ) / plan_name(elsewhere)
    assert not path.exists()
    leg = baton(lab, elsewhere, "run", path)
    assert leg.status == 0, leg.text
    assert "finished already" in leg.text


def test_the_store_is_whole_and_its_copy_too(lab: Lab, elsewhere: Task, tmp_path: Path) -> None:
    for words in (("ls",), ("verify",), ("gc",)):
        leg = lab.zygote.start(
            ["store", *words, elsewhere.url], log=tmp_path / "log.txt", env=dict(os.environ)
        )
        assert leg.wait() == 0, leg.text
    assert "could delete 0 names" in leg.text
    leg = lab.zygote.start(
        ["store", "cp", elsewhere.url, tmp_path / "copy"],
        log=tmp_path / "copy.txt",
        env=dict(os.environ),
    )
    assert leg.wait() == 0, leg.text
    [plan] = (tmp_path / "copy").glob("**/plan.json")
    copy = Task(tmp_path / "copy", plan, elsewhere.name)
    assert differences(copy, lab.reference(elsewhere)) == []


def test_the_hub_shows_a_card_and_gives_out_weights_that_load(
    lab: Lab, hub: Far, tmp_path: Path
) -> None:
    """As somebody who has never heard of baton loads them: huggingface_hub, transformers, peft."""
    import torch
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    task = lab.task(url=hub.url())
    lab.finish(task)
    assert hub.hub is not None
    name = task.url.removeprefix("hf://models/")
    repository = hub.hub.repository(name)
    files = repository.commits[repository.head].files
    large = [path for path in files if path.endswith(".safetensors")]
    assert large
    assert all(files[path].lfs for path in large), "weights are LFS objects"
    # Equal files are kept once, whatever their paths.
    assert len({files[path].lfs for path in large}) < len(large)

    endpoint = os.environ["HF_ENDPOINT"]
    token = os.environ["HF_TOKEN"]
    place = Path(snapshot_download(name, endpoint=endpoint, token=token, local_dir=tmp_path))
    [final] = place.glob("smoke/**/train/final")
    card = (place / CARD).read_text(encoding="utf-8")
    assert card == (final / CARD).read_text(encoding="utf-8")
    assert re.match(r"---\nlibrary_name: peft\n(.+\n)*tags: \[baton, medical_qa\]\n---\n", card)
    for said in ("RANDOM WEIGHTS", "95 % interval", "| rouge1 (char) |", "## Configuration"):
        assert said in card, card
    # The lines that the card gives, for the files as they were downloaded.
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert lines
    loaded: dict[str, Any] = {}
    exec(lines[1].replace(f'"{name}"', repr(str(place))), loaded)
    weights = loaded["model"].state_dict()
    tuned = load_file(final / "adapter_model.safetensors")
    assert tuned
    for key, value in tuned.items():
        inside = key.replace(".weight", ".default.weight")
        assert torch.equal(weights[inside], value), key
    tokens = loaded["tokenizer"]("感冒", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(loaded["model"](**tokens).logits).all()
